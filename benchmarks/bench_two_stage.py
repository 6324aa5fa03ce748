"""Two-stage retrieval on hard scenes: accuracy and cost compared with exhaustive ranking.

    PYTHONPATH=. python benchmarks/bench_two_stage.py --output_dir outputs/two_stage

Prints a table for each seed, a table of their means, and one JSON line. For each seed a network is trained on `twins`
(families of scenes that differ in one fact) with the command that is printed; then test scenes of other families, with
one sentence each, are ranked exhaustively and in two stages. An interrupted run resumes.

Cost is the number of pairs: N images and N sentences are N x N pairs for the exhaustive matrix, and at most 64 N with
shortlists of 32 for each image and each sentence. The weight of the similarity relative to the matching score is
chosen on validation scenes.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.data.builders import SCENES_SEED
from ieft.data.hard_scenes import SPLITS, draw_twin
from ieft.evaluation.metrics import retrieval_recalls
from ieft.evaluation.ranking import score_matrix
from ieft.evaluation.report import two_stage_table
from ieft.evaluation.two_stage import choose_similarity_weight, compare_stages, make_shortlists
from ieft.training.items import EvaluationSet
from prepare_datasets import load_retrieval_dataset

ROOT = Path(__file__).parent.parent
RECIPE = (
    "--dataset_name twins --enhancement_layers 0 --batches neighbours --max_steps 1600 --num_negatives 7 "
    "--groups_per_step 4 --mining_start 0.2 --contrastive_weight 0.2 --eval_steps 800 --save_steps 800 "
    "--max_eval_samples 40"
)
WAYS = ("shortlist", "re_ranked", "fused", "exhaustive")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/two_stage", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1200, help="test scenes, in families of four")
    parser.add_argument("--rerank_top_k", type=int, default=32)
    parser.add_argument("--recipe", default=RECIPE, help="options of run_retrieval.py")
    args = parser.parse_args()
    test = draw_test_scenes(args.images)
    judged = [judge_seed(seed, test, args) for seed in args.seeds]
    report(judged, args)


def draw_test_scenes(count):
    """Scenes of families beyond those of all splits, one sentence each."""
    first = sum(SPLITS.values())
    scenes = [draw_twin(SCENES_SEED, first + number) for number in range(count)]
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    rows = {"image": [scene.image for scene in scenes], "captions": [scene.captions[:1] for scene in scenes]}
    return datasets.Dataset.from_dict(rows, features=features)


def judge_seed(seed, test, args):
    """Train, rank exhaustively and in two stages, and save the result; an existing result is reused."""
    folder = args.output_dir / f"seed_{seed}"
    result = folder / f"judged_{args.images}_{args.rerank_top_k}.json"
    if not result.exists():
        train(folder, seed, args.recipe)
        judged = judge(folder, test, args.rerank_top_k)
        result.write_text(json.dumps(judged | {"seed": seed}), encoding="utf-8")
    judged = json.loads(result.read_text(encoding="utf-8"))
    print(f"seed {seed}\n{two_stage_table(judged)}\n", flush=True)
    return judged


def train(folder, seed, recipe):
    """`run_retrieval.py`, unless it has finished before."""
    if (folder / "model.safetensors").exists():
        return
    command = f"run_retrieval.py {recipe} --seed {seed} --do_train --resume_from_checkpoint true --output_dir {folder}"
    print(f"python {command}", flush=True)
    subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def judge(folder, test, top_k):
    """Two-stage and exhaustive results of a checkpoint, as input of `two_stage_table`."""
    model, processor = (kind.from_pretrained(folder) for kind in (IeftForImageTextRetrieval, IeftProcessor))
    validation = EvaluationSet.from_split(load_retrieval_dataset("twins")["validation"], processor)
    weight = choose_similarity_weight(make_shortlists(model, validation, top_k), validation)
    test = EvaluationSet.from_split(test, processor)
    judged = compare_stages(make_shortlists(model, test, top_k), test, similarity_weight=weight)
    start = time.perf_counter()
    scores = score_matrix(model, test.images, test.caption_tokens, score_cache=folder / "scores")
    judged["seconds"]["exhaustive"] = time.perf_counter() - start
    exhaustive = retrieval_recalls(scores, test.caption_image, test.caption_text_id)
    return judged | {"rerank_top_k": top_k, "exhaustive": exhaustive}


def report(judged, args):
    """Print means over the seeds, then one JSON line."""
    means = {way: float(np.mean([each[way]["mean_recall"] for each in judged])) for way in WAYS}
    print(f"mean recall, {args.images:,} test scenes, mean of {len(judged)} seeds (lowest to highest)\n")
    for way, mean in means.items():
        each = [one[way]["mean_recall"] for one in judged]
        print(f"{way.replace('_', '-'):12}{mean:8.1f}  ({min(each):.1f} to {max(each):.1f})")
    measured = {
        "benchmark": "two_stage",
        "images": args.images,
        "seeds": args.seeds,
        "mean_recall": means,
        "re_ranked_over_shortlist": means["re_ranked"] - means["shortlist"],
        "fused_over_shortlist": means["fused"] - means["shortlist"],
        "re_ranked_under_exhaustive": means["exhaustive"] - means["re_ranked"],
        "times_fewer_pairs": min(each["pairs_exhaustive"] / each["pairs"] for each in judged),
        "ceiling": float(np.mean([(each["ceiling_ir"] + each["ceiling_tr"]) / 2 for each in judged])),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print("\n" + json.dumps(measured))


if __name__ == "__main__":
    main()
