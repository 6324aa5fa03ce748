"""Checks over ten thousand training steps that memory, open files, processes and the run's folder do not grow.

    python benchmarks/soak_long.py --steps 10000

Prints a table, then one JSON line. A network of a few thousand parameters trains on 40 scenes with a persistent
worker. At every fortieth of the steps it ranks, saves a checkpoint, and is measured together with its workers.
"""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from transformers import TrainerCallback

from configuration_ieft import IeftConfig
from ieft.training.items import EvaluationSet, TrainingItems, learn_tokenizer
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval
from prepare_datasets import load_retrieval_dataset
from processing_ieft import IeftImageProcessor, IeftProcessor

COLUMNS = ("step", "megabytes", "tensors", "files", "processes", "checkpoints", "kilobytes on disk")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        samples = measure(folder, args.steps, every=max(1, args.steps // 40))
    print("".join(f"{name:>20}" for name in COLUMNS))
    for sample in samples:
        print("".join(f"{sample[name]:>20,.1f}" for name in COLUMNS))
    measured = {"benchmark": "soak_long", "steps": args.steps, "seconds": round(time.perf_counter() - start)}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print("\n" + json.dumps(measured | summarise(samples) | versions))


def measure(folder, steps, *, every):
    """Train and take samples: a list of dicts with `COLUMNS`."""
    trainer = make_trainer(folder, steps, every)
    sampler = Sampler(Path(folder))
    trainer.add_callback(sampler)
    trainer.train()
    return sampler.samples


def summarise(samples):
    """Growth after the first quarter of the run, when all lasting data has been loaded, and the maximum."""
    later = [sample for sample in samples if sample["step"] > samples[-1]["step"] / 4]
    steps, megabytes = ([sample[name] for sample in later] for name in ("step", "megabytes"))
    per_thousand = float(np.polyfit(steps, megabytes, 1)[0]) * 1000
    most = {f"most {name}": max(sample[name] for sample in later) for name in COLUMNS[1:]}
    least = {f"least {name}": min(sample[name] for sample in later) for name in COLUMNS[1:5]}
    return {"megabytes per 1000 steps": round(per_thousand, 3)} | most | least


class Sampler(TrainerCallback):
    """Takes a sample whenever a checkpoint has been saved."""

    def __init__(self, folder):
        self.folder = folder
        self.samples = []

    def on_save(self, args, state, control, **kwargs):
        gc.collect()
        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        figures = (
            state.global_step,
            sum(each.memory_info().rss for each in family) / 1e6,
            sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
            process.num_fds(),
            len(family),
            len(list(self.folder.glob("checkpoint-*"))),
            sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) / 1e3,
        )
        self.samples.append(dict(zip(COLUMNS, figures, strict=True)))


def make_trainer(folder, steps, every):
    splits = load_retrieval_dataset("scenes")
    train, validation = splits["train"].select(range(40)), splits["validation"].select(range(2))
    tokenizer = learn_tokenizer(caption for of_image in train["captions"] for caption in of_image)
    processor = IeftProcessor(IeftImageProcessor(image_size=16), tokenizer)
    config = IeftConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8, enhancement_layers=[0],
        enhancement_mlp_ratio=1, contrastive_dim=4,
    )  # fmt: skip
    args = IeftTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3,
        contrastive_weight=1.0, num_negatives=1, use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, logging_steps=every, eval_strategy="steps", eval_steps=every,
        save_strategy="steps", save_steps=every, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="mean_recall", dataloader_num_workers=1, dataloader_persistent_workers=True,
    )  # fmt: skip
    items = TrainingItems(train, processor, num_negatives=0, augmentation="turns")
    validation = EvaluationSet.from_split(validation, processor)
    model = IeftForImageTextRetrieval(config)
    return IeftTrainer(model, args, train_dataset=items, eval_dataset=validation, processing_class=processor)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
