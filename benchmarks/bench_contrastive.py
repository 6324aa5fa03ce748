"""Measures whether training with the contrastive loss, which search needs, lowers the recall of the ranking head.

    PYTHONPATH=. python benchmarks/bench_contrastive.py --output_dir outputs/contrastive

For each seed, a network is trained on scenes with and without the contrastive loss; the mean recalls of exhaustive
ranking are printed, then one JSON line. An interrupted run resumes.

Cost is dominated by the number of training pairs. The published loss scores 1,024 pairs in a step of 64 images; the
contrastive recipe scores 121 pairs and encodes each side once. Step counts are chosen for about equal time, and the
time that each took is printed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
WAYS = {"with": ("1.0", 800), "without": ("0.0", 250)}  # --contrastive_weight, steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/contrastive", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    found = {way: [train(way, seed, args.output_dir) for seed in args.seeds] for way in WAYS}
    print(f"{'contrastive loss':18}{'steps':>7}{'seconds':>9}   mean recall of each seed, their mean")
    for way, runs in found.items():
        recalls = [recall for recall, _ in runs]
        shown = "  ".join(f"{recall:.1f}" for recall in recalls)
        seconds = np.mean([seconds for _, seconds in runs])
        print(f"{way:18}{WAYS[way][1]:>7}{seconds:>9.0f}   {shown}   {np.mean(recalls):.1f}")
    means = {way: float(np.mean([recall for recall, _ in runs])) for way, runs in found.items()}
    print(json.dumps({"benchmark": "contrastive", "seeds": args.seeds, "mean_recall": means}))


def train(way, seed, output_dir):
    """Mean recall on the test scenes, and seconds of the run; existing results are reused."""
    folder = output_dir / f"{way}_{seed}"
    done = folder / "seconds.json"
    if not done.exists():
        weight, steps = WAYS[way]
        options = ["--dataset_name", "scenes", "--contrastive_weight", weight, "--max_steps", steps, "--seed", seed]
        options += ["--eval_steps", steps, "--save_steps", steps, "--num_negatives", 10 if way == "with" else 15]
        command = [sys.executable, "run_retrieval.py", *options, "--output_dir", folder]
        start = time.perf_counter()
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(time.perf_counter() - start), encoding="utf-8")
    recall = json.loads((folder / "test_results.json").read_text(encoding="utf-8"))["mean_recall"]
    return recall, json.loads(done.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
