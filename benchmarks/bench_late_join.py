"""Measures what late fusion (a fusion layer above 0) costs in recall, and what it saves in time.

    PYTHONPATH=. python benchmarks/bench_late_join.py speed
    PYTHONPATH=. python benchmarks/bench_late_join.py recall
    PYTHONPATH=. python benchmarks/bench_late_join.py recall --distilled --joins 1 2 3 4 5
    PYTHONPATH=. python benchmarks/bench_late_join.py recall --steps 2700 --joins 0 5
    PYTHONPATH=. python benchmarks/bench_late_join.py recall --photographs DIR --steps 300 --queries 100
    PYTHONPATH=. python benchmarks/bench_late_join.py table --plot docs/late_join.png

`recall` takes a dataset by name, or a folder of photographs with captions, and appends one JSON line per network to a
file, so that an interrupted measurement resumes; `table` makes a table and a plot of that file.

`speed` uses the full-size network with random weights and reports CPU time, so that other work on the machine does not
count. With fusion layer 0, cost is dominated by the matrix products of 160 tokens in six blocks for each pair. With
fusion in the last block, a pair is one attention with a single query and the MLP of one token; with few captions per
image, cost is then dominated by reading the weights and the image's keys and values.

`recall` trains small networks of six blocks from scratch, equal except for their fusion layer, with the ranking and
the contrastive loss; with `--distilled` also on the scores of the network with fusion layer 0 of the same seed.
Candidates are all test images, and the first caption of each; queries are the first `--queries` of them. Two-stage
retrieval re-ranks the 32 nearest by embedding. Recalls are duplicate-aware.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from configuration_ieft import IeftConfig
from ieft.evaluation import ranking
from ieft.evaluation.metrics import expected_hits
from ieft.evaluation.ranking import score_matrix, score_pairs
from ieft.search.feature_cache import KINDS, decode_state, encode_state
from ieft.training.items import EvaluationSet, TrainingItems, learn_tokenizer
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval
from prepare_datasets import load_retrieval_dataset
from processing_ieft import IeftImageProcessor, IeftProcessor

TYPICAL_LENGTH = 15  # tokens of a caption
SHORTLIST = 32
IMAGES_AT_ONCE = 128
FEW = 8  # distinct captions
SMALL_NETWORK = {
    "image_size": 96, "patch_size": 24, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
    "intermediate_size": 128, "enhancement_layers": [1, 2, 3], "enhancement_mlp_ratio": 2, "initializer_range": 0.08,
    "hidden_dropout_prob": 0.0, "contrastive_dim": 64,
}  # fmt: skip
RECIPE = {
    "learning_rate": 2e-3, "weight_decay": 0.01, "adam_beta2": 0.98, "warmup_steps": 0.1, "contrastive_weight": 0.5,
    "batches": "neighbours", "num_negatives": 7, "groups_per_step": 2, "mining_start": 0.2, "use_cpu": True,
    "report_to": "none", "remove_unused_columns": False, "save_strategy": "no", "logging_steps": 50,
}  # fmt: skip
SETTINGS = ("steps", "batch", "queries")  # runs with other settings are separate runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("late_join.jsonl"), help="file of JSON lines")
    commands = parser.add_subparsers(required=True, metavar="speed | recall | table")
    speed = commands.add_parser("speed", help="pairs per core-second, operations and bytes at full size")
    speed.set_defaults(command=measure_speed)
    speed.add_argument("--joins", type=int, nargs="+", default=list(range(6)))
    speed.add_argument("--seconds", type=float, default=5.0, help="minimum CPU time for each measurement")
    recall = commands.add_parser("recall", help="train and rank")
    recall.set_defaults(command=measure_recalls)
    source = recall.add_mutually_exclusive_group()
    source.add_argument("--data", default="twins", help="name of a dataset, as for run_retrieval.py")
    source.add_argument("--photographs", metavar="DIR", help="a folder in the distributed format")
    recall.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    recall.add_argument("--joins", type=int, nargs="+", default=list(range(6)))
    recall.add_argument("--distilled", action="store_true", help="also distill the scores of fusion layer 0")
    recall.add_argument("--steps", type=int, default=1000)
    recall.add_argument("--batch", type=int, default=32)
    recall.add_argument("--queries", type=int, default=200)
    recall.add_argument("--models", type=Path, default=Path("late_join_models"), help="folder for the teachers")
    table = commands.add_parser("table", help="table and plot of the results")
    table.set_defaults(command=make_table)
    table.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.command(args)


def read_results(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_result(path, result):
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


# Speed ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_speed(args):
    """Print one line for each fusion layer, alternating between them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = IeftForImageTextRetrieval(IeftConfig()).eval()
    pixels = torch.rand(1, 3, model.config.image_size, model.config.image_size) * 2 - 1
    for join in args.joins:
        result = {"part": "speed", "join": join, "torch": torch.__version__, "machine": platform.machine()}
        model.config.first_joint_layer = join
        result |= count_operations(model, pixels)
        state = model.read_images(pixels)[0]
        result |= {f"bytes_{kind}": len(encode_state(state, kind)) for kind in KINDS}
        with ranking.inference_network(model, None) as network:  # oneDNN-prepacked weights, in float32
            add_result(args.results, result | time_pairs(network, state, args.seconds))


def count_operations(model, pixels):
    """GFLOP for a pair with cached features, and for encoding each side."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # so that the products of attention are counted
    tokens = torch.ones(1, TYPICAL_LENGTH, dtype=torch.long)
    halves, counts = {}, {}
    for name, work in (
        ("gflop_image", lambda: halves.update(images=model.prepare_images(pixels))),
        ("gflop_caption", lambda: halves.update(captions=model.prepare_captions(tokens))),
        ("gflop_pair", lambda: model.score_prepared(**halves)),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        counts[name] = counter.get_total_flops() / 1e9
    model.set_attn_implementation(implementation)
    return counts


def time_pairs(network, state, seconds):
    """Pairs with cached features per core-second: an image with many captions, and a caption with many images.

    Where all tokens of pairs are computed, one way is as the other.
    """
    count = 1024 if network.config.joins_last else ranking.BATCH_TOKENS // (TYPICAL_LENGTH + len(state))
    captions = network.prepare_captions(torch.randint(1000, 30000, (FEW, TYPICAL_LENGTH)))
    captions = captions.take(torch.arange(count) % FEW)  # encoding them is not timed
    rates = {"pairs_per_second": rate(network, captions, network.prepare_images(image_states=state[None]), seconds)}
    if network.config.joins_last:
        images = network.prepare_images(image_states=state.expand(IMAGES_AT_ONCE, -1, -1))
        rates["pairs_per_second_of_a_caption"] = rate(network, captions.take([0]), images, seconds)
    return rates


def rate(network, captions, images, seconds):
    network.score_prepared(captions.take([0]), images.take([0]))
    best, end = 0.0, time.process_time() + seconds
    while not best or time.process_time() < end:
        start = time.process_time()
        scored = len(network.score_prepared(captions, images))
        best = max(best, scored / (time.process_time() - start))
    return best


# Recall --------------------------------------------------------------------------------------------------------------


def measure_recalls(args):
    """Measure each seed and fusion layer that is not yet in the file."""
    name = Path(args.photographs).name if args.photographs else args.data
    splits = load_retrieval_dataset(args.photographs or args.data)
    processor = make_processor(splits)
    known = [key_of(result) for result in read_results(args.results) if result["part"] == "recall"]
    for seed in args.seeds:
        for join in args.joins:
            result = {"part": "recall", "data": name, "seed": seed, "join": join, "distilled": args.distilled}
            result |= {setting: getattr(args, setting) for setting in SETTINGS}
            if key_of(result) in known:
                continue
            start = time.process_time()
            model = train(splits["train"], processor, seed, join, args, teacher=find_teacher(name, seed, args))
            result["train_seconds"] = time.process_time() - start
            if join == 0 and not args.distilled:
                model.save_pretrained(teacher_folder(name, seed, args))
            add_result(args.results, result | judge(model, splits["test"], processor, args.queries))


def key_of(result):
    return tuple(result[name] for name in ("data", "seed", "join", "distilled", *SETTINGS))


def make_processor(splits):
    tokenizer = learn_tokenizer(caption for captions in splits["train"]["captions"] for caption in captions)
    return IeftProcessor(IeftImageProcessor(SMALL_NETWORK["image_size"], "crop"), tokenizer)


def teacher_folder(name, seed, args):
    return args.models / f"{name}_{seed}_{args.steps}_{args.batch}"


def find_teacher(name, seed, args):
    """The network with fusion layer 0 of this seed, which must exist; None for networks without a teacher."""
    if not args.distilled:
        return None
    folder = teacher_folder(name, seed, args)
    if not folder.is_dir():
        raise FileNotFoundError(f"A teacher expected in {folder}: measure --joins 0 without --distilled first.")
    return IeftForImageTextRetrieval.from_pretrained(folder)


def train(split, processor, seed, join, args, teacher):
    set_seed(seed)
    tokenizer = processor.tokenizer
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "first_joint_layer": join}
    model = IeftForImageTextRetrieval(IeftConfig(**SMALL_NETWORK, **sizes))
    settings = {"max_steps": args.steps, "per_device_train_batch_size": args.batch, "seed": seed}
    arguments = IeftTrainingArguments(str(args.models / "run"), **RECIPE, **settings)
    items = TrainingItems(split, processor, num_negatives=0, augmentation="turns", seed=seed)
    IeftTrainer(model, arguments, train_dataset=items, teacher=teacher).train()
    return model.eval()


@torch.no_grad()
def judge(model, split, processor, num_queries):
    """Mean recalls: exhaustive, by embedding only, two-stage, and two-stage from features cached as int8."""
    test = EvaluationSet.from_split(split, processor)
    first = np.unique(test.caption_image, return_index=True)[1]  # one caption for each image
    captions = [test.caption_tokens[column] for column in first]
    carries = np.zeros((len(first), test.caption_text_id.max() + 1), dtype=bool)
    carries[test.caption_image, test.caption_text_id] = True
    right = carries[:, test.caption_text_id[first]]  # (N, N) images with captions
    queries = np.arange(min(num_queries, len(captions)))
    right = {"images": right.T[queries], "captions": right[queries]}
    pixels = torch.stack([test.images[row] for row in range(len(test.images))])
    asked = {
        "images": score_matrix(model, pixels, [captions[row] for row in queries], progress=False).T,
        "captions": score_matrix(model, pixels[queries], captions, progress=False),
    }  # each (Q, N): captions look for images, images for captions
    image_features = torch.cat([model.get_image_features(part) for part in pixels.split(64)])
    text_features = torch.cat([model.get_text_features(torch.tensor([caption])) for caption in captions])
    similarity = (text_features @ image_features.T).numpy()  # (N, N) captions with images
    near = {"images": similarity[queries], "captions": similarity.T[queries]}
    staged = {name: rerank(near[name], lambda rows, name=name: asked[name][rows]) for name in near}
    recalls = {"alone": asked, "embedding": near, "two_stage": staged}
    if model.config.first_joint_layer:
        read = [state for part in pixels.split(64) for state in model.read_images(part)]
        states = [decode_state(encode_state(state, "int8")) for state in read]
        recalls["two_stage_int8"] = {
            "images": rerank(near["images"], lambda rows: score_stored(model, states, captions, rows[::-1])),
            "captions": rerank(near["captions"], lambda rows: score_stored(model, states, captions, rows)),
        }
    return {name: mean_recall(scores, right) for name, scores in recalls.items()}


def rerank(similarity, score):
    """Scores (Q, N) that rank the shortlist of each row first, in the order of `score` of (rows, columns)."""
    columns = np.argsort(-similarity, axis=1, kind="stable")[:, :SHORTLIST]
    rows = np.repeat(np.arange(len(similarity)), columns.shape[1])
    scores = similarity.astype(np.float64) - 1e6
    scores[rows, columns.ravel()] = score((rows, columns.ravel()))
    return scores


def score_stored(model, states, captions, pairs):
    return score_pairs(model, states, captions, np.stack(pairs, axis=1), progress=False)


def mean_recall(scores, right):
    """The mean of recall at 1, 5 and 10 in both directions, in percent."""
    return float(np.mean([expected_hits(each, right[way]).mean() for way, each in scores.items()]) * 100)


# Report --------------------------------------------------------------------------------------------------------------

COLUMNS = ("alone", "two_stage", "two_stage_int8", "embedding")


def make_table(args):
    """Print Markdown tables, one for each dataset and one of speeds, and save the plot."""
    results = read_results(args.results)
    speeds = {result["join"]: result for result in results if result["part"] == "speed"}
    print_speeds(speeds)
    recalls = [result for result in results if result["part"] == "recall"]
    groups = sorted({(result["data"], *(result[name] for name in SETTINGS)) for result in recalls})
    for group in groups:
        some = [result for result in recalls if (result["data"], *(result[name] for name in SETTINGS)) == group]
        print_recalls(group, some)
    if args.plot and recalls and speeds:
        draw(groups, recalls, speeds, args.plot)


def print_speeds(speeds):
    print(
        "| first joint block | GFLOP a pair | pairs/s of one core | times | once an image | bytes bf16 | bytes int8 |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    base = speeds.get(0, {}).get("pairs_per_second", float("nan"))
    for join, each in sorted(speeds.items()):
        shown = each["pairs_per_second"]
        print(
            f"| {join} | {each['gflop_pair']:.3g} | {shown:,.1f} | {shown / base:,.1f} | {each['gflop_image']:.1f} "
            f"GFLOP | {each['bytes_bf16']:,} | {each['bytes_int8']:,} |"
        )


def print_recalls(group, results):
    data, steps, batch, queries = group
    print(f"\n{data}: {steps} steps of {batch} images, {queries} queries per direction, mean recall over seeds\n")
    print("| fusion layer | distilled | seeds | exhaustive | two-stage | two-stage, int8 features | embedding only |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for distilled, join in sorted({(result["distilled"], result["join"]) for result in results}):
        some = [each for each in results if (each["distilled"], each["join"]) == (distilled, join)]
        cells = [summary([each[name] for each in some if name in each]) for name in COLUMNS]
        print(f"| {join} | {'yes' if distilled else 'no'} | {len(some)} | {' | '.join(cells)} |")


def summary(values):
    """Mean and, for several values, standard deviation."""
    if not values:
        return ""
    return f"{np.mean(values):.1f}" + (f" ({np.std(values, ddof=1):.1f})" if len(values) > 1 else "")


def draw(groups, recalls, speeds, path):
    """Plot mean recall of two-stage search over pairs per second, one panel for each dataset."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(groups), figsize=(5.5 * len(groups), 4), squeeze=False)
    for panel, group in zip(panels[0], groups, strict=True):
        some = [result for result in recalls if (result["data"], *(result[name] for name in SETTINGS)) == group]
        for way, marker in (("alone", "o"), ("two_stage", "s")):
            for distilled in sorted({result["distilled"] for result in some}):
                joins = sorted({each["join"] for each in some if each["distilled"] == distilled} & set(speeds))
                values = [
                    np.mean([e[way] for e in some if (e["distilled"], e["join"]) == (distilled, join)])
                    for join in joins
                ]
                rates = [speeds[join]["pairs_per_second"] for join in joins]
                label = f"{way.replace('_', '-')}{', distilled' if distilled else ''}"
                panel.plot(rates, values, marker=marker, ls="--" if distilled else "-", label=label)
                for join, rate, value in zip(joins, rates, values, strict=True) if label == "two-stage" else ():
                    panel.annotate(str(join), (rate, value), textcoords="offset points", xytext=(4, 4))
        panel.set(
            title=f"{group[0]}, {group[1]} steps", xscale="log", xlabel="pairs a second of one core, full size",
            ylabel="mean recall, %",
        )  # fmt: skip
        low, high = panel.get_ylim()
        panel.set_ylim(low - 5, high + 5)  # so that small differences do not look large
        panel.legend(loc="lower center")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
