"""Measures what stored image features of fewer bytes cost in recall, and how fast they are re-ranked from.

    PYTHONPATH=. python benchmarks/bench_feature_bytes.py recall --data twins --steps 2700
    PYTHONPATH=. python benchmarks/bench_feature_bytes.py recall --data DIR --steps 1500
    PYTHONPATH=. python benchmarks/bench_feature_bytes.py recall --data DIR --checkpoint checkpoints/small
    PYTHONPATH=. python benchmarks/bench_feature_bytes.py speed
    PYTHONPATH=. python benchmarks/bench_feature_bytes.py table --plot docs/feature_bytes.png

`recall` trains small networks with fusion at the last block as `bench_late_join.py` does, and keeps them in a folder;
or it takes a checkpoint.
Two-stage retrieval in both directions re-ranks the 32 nearest by embedding, for all captions and images of the test
split. The codebooks of product quantisation are learnt from 256 training images, as `ieft-search index` learns them
from the first images. Sizes are named by the bytes of a token for each number of it.

`speed` re-ranks shortlists of 32 stored images for one caption each, decoding included, by the full-size network with
random weights; kinds alternate, and the best CPU time of each counts.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench_late_join import SHORTLIST, TYPICAL_LENGTH, add_result, make_processor, read_results, train

from configuration_ieft import IeftConfig
from ieft.evaluation import ranking
from ieft.evaluation.two_stage import make_shortlists, two_stage_recalls
from ieft.search.feature_cache import bytes_per_token, decode_state, encode_state
from ieft.search.ingestion import IMAGES_TO_LEARN
from ieft.search.product_quantization import Codebooks
from ieft.training.items import EvaluationSet
from modeling_ieft import IeftForImageTextRetrieval
from prepare_datasets import load_retrieval_dataset
from processing_ieft import IeftProcessor

LAST_BLOCK = 5
SHARES = (4, 8, 16, 32, 64)  # numbers of a token for each byte
IMAGES_AT_ONCE = 64
WHOLE = "float32"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("feature_bytes.jsonl"), help="file of JSON lines")
    commands = parser.add_subparsers(required=True, metavar="recall | speed | table")
    recall = commands.add_parser("recall", help="train, quantise and rank")
    recall.set_defaults(command=measure_recalls)
    recall.add_argument("--data", default="twins", help="name or folder of a dataset, as for run_retrieval.py")
    recall.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    recall.add_argument("--steps", type=int, default=2700)
    recall.add_argument("--batch", type=int, default=32)
    recall.add_argument("--checkpoint", help="a checkpoint with fusion at the last block, instead of training")
    recall.add_argument("--models", type=Path, default=Path("feature_bytes_models"), help="folder for the networks")
    speed = commands.add_parser("speed", help="pairs a second from stored features, full size")
    speed.set_defaults(command=measure_speed)
    speed.add_argument("--rounds", type=int, default=10)
    table = commands.add_parser("table", help="table and plot of the recalls")
    table.set_defaults(command=make_table)
    table.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.command(args)


# Recall --------------------------------------------------------------------------------------------------------------


def measure_recalls(args):
    """Measure each seed that is not yet in the file."""
    name = Path(args.data).name
    splits = load_retrieval_dataset(args.data)
    if args.checkpoint:
        model = IeftForImageTextRetrieval.from_pretrained(args.checkpoint).eval()
        result = {"part": "recall", "data": f"{name}, {args.checkpoint}", "steps": 0, "seed": 0}
        add_result(args.results, result | judge(model, splits, IeftProcessor.from_pretrained(args.checkpoint)))
        return
    processor = make_processor(splits)
    known = [[result.get(field) for field in ("data", "steps", "seed")] for result in read_results(args.results)]
    for seed in args.seeds:
        if [name, args.steps, seed] not in known:
            folder = args.models / f"{name}_{seed}_{args.steps}"
            if not folder.is_dir():
                train(splits["train"], processor, seed, LAST_BLOCK, args, teacher=None).save_pretrained(folder)
            model = IeftForImageTextRetrieval.from_pretrained(folder).eval()
            result = {"part": "recall", "data": name, "steps": args.steps, "seed": seed}
            add_result(args.results, result | judge(model, splits, processor))


@torch.no_grad()
def judge(model, splits, processor):
    """By kind of features: bytes of an image, mean recall, and correlation of the scores with those of float32."""
    test, first = (EvaluationSet.from_split(splits[name], processor) for name in ("test", "train"))
    lists = make_shortlists(model, test, SHORTLIST, progress=False)
    asked = lists.of_captions | lists.of_images
    states = read_states(model, test.images, range(len(test.images)))
    chosen = np.linspace(0, len(first.images) - 1, IMAGES_TO_LEARN).round().astype(int)
    learnt_from = read_states(model, first.images, chosen)
    width = states.shape[2]
    results, exact = {}, None
    for kind in (WHOLE, "int8", *(f"pq{width // share}" for share in SHARES)):
        stored, size = list(states), states[0].numel() * 4
        if kind != WHOLE:
            stored, size = store(model, states, kind, learnt_from)
        scores = np.zeros_like(lists.scores)
        scores[asked] = ranking.score_pairs(model, stored, test.caption_tokens, np.argwhere(asked), progress=False)
        exact = scores[asked] if exact is None else exact
        results[kind] = {
            "bytes": size,
            "mean_recall": two_stage_recalls(replace(lists, scores=scores), test)["dedup_mean_recall"],
            "correlation": float(np.corrcoef(exact, scores[asked])[0, 1]),
        }
    return {"width": width, "kinds": results}


def read_states(model, images, rows):
    parts = np.array_split(np.asarray(rows), -(-len(rows) // IMAGES_AT_ONCE))
    return torch.cat([model.read_images(torch.stack([images[int(row)] for row in part])) for part in parts])


def store(model, states, kind, learnt_from):
    """Features as they come back from bytes, and the bytes of one image."""
    size, codebooks = bytes_per_token(kind), None
    if size:
        states = model.read_keys_and_values(states)
        codebooks = Codebooks.learn(model.read_keys_and_values(learnt_from).flatten(0, 1), size)
    contents = [encode_state(state, kind, codebooks) for state in states]
    return [decode_state(content, codebooks) for content in contents], len(contents[0])


# Speed ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_speed(args):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = IeftForImageTextRetrieval(IeftConfig(first_joint_layer=LAST_BLOCK)).eval()
    pixels = torch.rand(SHORTLIST, 3, model.config.image_size, model.config.image_size) * 2 - 1
    states = torch.cat([model.read_images(part) for part in pixels.split(8)])
    captions, pairs = [list(range(1000, 1000 + TYPICAL_LENGTH))], [(row, 0) for row in range(SHORTLIST)]
    kinds = {}
    for kind in ("int8", "bf16", "pq96", "pq24"):
        size = bytes_per_token(kind)
        features = model.read_keys_and_values(states) if size else states
        start = time.process_time()
        codebooks = Codebooks.learn(features.flatten(0, 1), size) if size else None
        learnt = time.process_time()
        contents = [encode_state(state, kind, codebooks) for state in features]
        seconds = {"learn": learnt - start, "encode_image": (time.process_time() - learnt) / SHORTLIST}
        kinds[kind] = SimpleNamespace(contents=contents, codebooks=codebooks, seconds=seconds, best={})
    for _ in range(args.rounds):
        for kind in kinds.values():
            start = time.process_time()
            stored = [decode_state(content, kind.codebooks) for content in kind.contents]
            decoded = time.process_time()
            ranking.score_pairs(model, stored, captions, pairs, progress=False)
            spent = {"decode": decoded - start, "rerank": time.process_time() - start}
            kind.best = {name: min(value, kind.best.get(name, value)) for name, value in spent.items()}
    usual = SHORTLIST / kinds["int8"].best["rerank"]
    for name, kind in kinds.items():
        rate = SHORTLIST / kind.best["rerank"]
        result = {"part": "speed", "kind": name, "bytes": len(kind.contents[0]), "pairs_per_second": rate}
        result |= {"of_int8": rate / usual, **kind.seconds, "decode_image": kind.best["decode"] / SHORTLIST}
        add_result(args.results, result)


# Report --------------------------------------------------------------------------------------------------------------


def make_table(args):
    """Print a Markdown table for each dataset, and save the plot."""
    groups = {}
    for result in read_results(args.results):
        if result["part"] == "recall":
            groups.setdefault((result["data"], result["steps"], result["width"]), []).append(result["kinds"])
    for (data, steps, width), seeds in groups.items():
        trained = f": {steps} steps, {len(seeds)} seeds" if steps else ""
        print(f"\n{data}{trained}, tokens of {width} numbers\n")
        print("| features | bytes an image | of int8 | two-stage mean recall | lost | correlation of scores |")
        print("| --- | --- | --- | --- | --- | --- |")
        for kind, each in seeds[0].items():
            recalls, lost, correlations = series(seeds, kind)
            share = f"1/{seeds[0]['int8']['bytes'] / each['bytes']:.1f}" if bytes_per(kind) else ""
            print(
                f"| {kind} | {each['bytes']:,} | {share} | {summary(recalls)} | {summary(lost, 2)} | "
                f"{np.mean(correlations):.4f} |"
            )
    if args.plot:
        draw(groups, args.plot)


def bytes_per(kind):
    return kind != WHOLE and bytes_per_token(kind)


def series(seeds, kind):
    """Of each seed: recall, what is lost of the recall with float32, correlation."""
    recalls = [seed[kind]["mean_recall"] for seed in seeds]
    lost = [seed[WHOLE]["mean_recall"] - recall for seed, recall in zip(seeds, recalls, strict=True)]
    return recalls, lost, [seed[kind]["correlation"] for seed in seeds]


def summary(values, digits=1):
    return f"{np.mean(values):.{digits}f} ({np.ptp(values):.{digits}f})"


def draw(groups, path):
    """Plot lost recall over the size of features."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 4))
    for number, ((data, steps, width), seeds) in enumerate(groups.items()):
        kinds = [kind for kind in seeds[0] if bytes_per(kind)]
        shares = [width / bytes_per(kind) for kind in kinds]
        lost = [series(seeds, kind)[1] for kind in kinds]
        panel.plot(
            shares, np.mean(lost, axis=1), "o-", color=f"C{number}", label=f"{data}, {steps} steps" if steps else data
        )
        for row in np.transpose(lost):
            panel.plot(shares, row, ".", color=f"C{number}", alpha=0.5)
    for kind, share in (("pq96: 14 kB", 8), ("pq24: 3.5 kB", 32)):
        panel.axvline(share, color="grey", ls=":")
        panel.annotate(f"{kind} at full size", (share, 0.6), xycoords=("data", "axes fraction"), rotation=90,
                       va="top", ha="right", fontsize=8)  # fmt: skip
    panel.axhline(0, color="grey", lw=0.5)
    panel.set(xscale="log", xlabel="numbers of a token for each byte", ylabel="two-stage mean recall lost, points")
    panel.set_xticks(SHARES, map(str, SHARES))
    panel.minorticks_off()
    panel.invert_yaxis()
    panel.legend(loc="lower center")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
