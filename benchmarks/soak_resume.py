"""Kills the training command at random moments and checks that the resumed run reproduces the uninterrupted one.

    python benchmarks/soak_resume.py --kills 20

Prints each kill, then one JSON line, and fails if the final weights differ from those of an uninterrupted run in any
bit. Real processes of `run_retrieval.py` are killed by SIGKILL at any point: while they load, train, save, rank and
report.

A network of 10,000 parameters with dropout trains for two epochs, with a checkpoint and a ranking every third step, so
that much of the time is spent in each. The runs alternate between the contrastive loss with mined groups, the
published loss by micro-batches, and persistent workers.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import torch
import transformers

import run_retrieval
from configuration_ieft import IeftConfig
from ieft.training.checkpoints import UNFINISHED, find_last_checkpoint
from ieft.training.items import learn_tokenizer
from modeling_ieft import IeftForImageTextRetrieval
from prepare_datasets import load_retrieval_dataset
from processing_ieft import IeftImageProcessor, IeftProcessor

COMMON = [
    "--dataset_name", "scenes", "--max_train_samples", "16", "--max_eval_samples", "3", "--max_predict_samples", "3",
    "--train_batch_size", "4", "--eval_steps", "3", "--save_steps", "3", "--logging_steps", "1",
    "--use_cpu", "--disable_tqdm", "true", "--augmentation", "randaugment", "--resume_from_checkpoint", "true",
]  # fmt: skip
SETTINGS = {
    "contrastive": ["--max_steps", "30", "--mining_start", "0.3", "--num_negatives", "3",
                    "--per_device_train_batch_size", "3"],
    "published": ["--max_steps", "18", "--contrastive_weight", "0", "--num_negatives", "3", "--train_batch_size", "12",
                  "--per_device_train_batch_size", "4"],
    "workers": ["--max_steps", "30", "--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true"],
}  # fmt: skip
COMPARED = ("model.safetensors", "test_results.json", "eval_results.json")
PROCESSES = multiprocessing.get_context("forkserver")  # one process imports, the others start at once


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    PROCESSES.set_forkserver_preload(["run_retrieval"])
    warm_up = PROCESSES.Process(target=platform.python_version)  # so that imports are not counted
    warm_up.start()
    warm_up.join()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_start(folder / "start")
        moments, ends = soak(folder, args.kills, args.settings, random.Random(args.seed))
    kinds = Counter(moment.split(",")[0] for _, moment in moments)
    print(f"\n{len(moments)} kills, {ends} runs finished, each with the same bits as an uninterrupted run")
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(
        json.dumps({"benchmark": "soak_resume", "kills": len(moments), "ends": ends} | {"moments": kinds} | versions)
    )


def save_start(folder):
    """A small network with dropout, from which every run starts."""
    splits = load_retrieval_dataset("scenes")
    tokenizer = learn_tokenizer(caption for of_image in splits["train"]["captions"] for caption in of_image)
    config = IeftConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8, enhancement_layers=[1],
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    IeftForImageTextRetrieval(config).save_pretrained(folder)
    IeftProcessor(IeftImageProcessor(image_size=32), tokenizer).save_pretrained(folder)


def soak(folder, kills, settings, moments_of):
    """Start, kill and resume until every run has finished: the moments of the kills, and the number of runs."""
    unharmed = {}
    moments, ends = [], 0
    for number, name in enumerate(cycle(settings)):
        if len(moments) >= kills:
            return moments, ends
        if name not in unharmed:
            start = time.perf_counter()
            live_to_the_end(folder, folder / name, name)
            unharmed[name] = fingerprint(folder / name), time.perf_counter() - start
        expected, seconds = unharmed[name]
        run, finished = folder / f"run{number}", False
        while len(moments) < kills and not finished:
            finished = live(folder, run, name, moments_of.uniform(0, seconds))
            if not finished:
                moments.append((name, describe_moment(run)))
                print(f"{len(moments):4}  {name:12} {moments[-1][1]}", flush=True)
        live_to_the_end(folder, run, name)
        if fingerprint(run) != expected:
            raise SystemExit(f"{run}: not the same bits as {folder / name}. Kills: {moments}")
        ends += 1


def live_to_the_end(folder, run, name):
    if not live(folder, run, name, 3600):
        raise SystemExit(f"{run} did not end:\n{(run.with_suffix('.txt')).read_text()[-3000:]}")


def live(folder, run, name, seconds):
    """Run the command in a process and kill it after some seconds: whether it had finished before."""
    arguments = [*COMMON, *SETTINGS[name], "--model_name_or_path", str(folder / "start"), "--output_dir", str(run)]
    process = PROCESSES.Process(target=run_command, args=(arguments, str(run.with_suffix(".txt"))))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        raise SystemExit(f"{run} failed:\n{(run.with_suffix('.txt')).read_text()[-3000:]}")
    return process.exitcode == 0


def run_command(arguments, output):
    torch.set_num_threads(1)
    with open(output, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run_retrieval.main(arguments)


def describe_moment(run):
    """The progress of a killed run, from its folder."""
    last = Path(find_last_checkpoint(run)[0] or "none").name
    if (run / "test_results.json").exists():
        return f"reporting, last checkpoint {last}"
    if (run / "model.safetensors").exists():
        return f"judging the trained model, last checkpoint {last}"
    if (run / UNFINISHED).exists():
        half = sum(len(files) for _, _, files in os.walk(run / UNFINISHED))
        return f"saving, {half} files written, last checkpoint {last}"
    return f"training, last checkpoint {last}" if last != "none" else "before the first checkpoint"


def fingerprint(run):
    """Hashes of the result of a run: its files, and the weights and optimizer of its last checkpoint."""
    last = Path(find_last_checkpoint(run)[0])
    paths = [*(run / name for name in COMPARED), last / "model.safetensors", last / "optimizer.pt"]
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]


if __name__ == "__main__":
    main()
