"""Measures training of the full-size network on one accelerator; one JSON line a measurement.

    python benchmarks/gpu_training.py                 # all, about 3 minutes of an H200
    python benchmarks/gpu_training.py --tiny          # a small network on any device, to try the script

Weights, pixels and captions are random; captions have the lengths of RSICD's. Needs neither data sets nor the packages
that read them.

- `peak`: the fastest of several large matrix products, in TFLOP/s.
- `training`: steps of the published batch (256 images, 16 captions each) in bfloat16, by the published and by the
  contrastive loss: images a second, peak memory beside the estimate, micro-batch, and share of the measured peak.
- `memory_error`: a step in float32, then the same step where memory is limited to a part of what its micro-batch
  needs: the halved micro-batch, and the difference of loss and gradients.
"""

import argparse
import json
import logging
import time
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from published import draw_captions, pad
from torch.utils.data import Dataset
from transformers import TrainerCallback

from configuration_ieft import IeftConfig
from ieft.training.cost import PASSES
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval

CANDIDATES = 16
PEAK_SIZES = ((8192, 8192, 8192), (16384, 4096, 16384))
TINY = {
    "image_size": 96, "patch_size": 24, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 128, "enhancement_layers": [0, 1, 2], "enhancement_mlp_ratio": 2, "vocab_size": 2000,
}  # fmt: skip
MEASUREMENTS = ("peak", "training", "memory_error")
LOSSES = {"published": 0.0, "contrastive": 1.0}  # -> contrastive_weight


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="measured, after one to warm up")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks = {dtype: measure_peak(dtype, device, args.tiny) for dtype in (torch.float32, torch.bfloat16)}
    if "peak" in args.only:
        report("peak", tflops={str(dtype)[6:]: peak / 1e12 for dtype, peak in peaks.items()})
    if "training" in args.only:
        for name in LOSSES:
            measure_training(args, name, device, peaks[torch.bfloat16])
            clear_device_cache(garbage_collection=True)
    if "memory_error" in args.only:
        for name in LOSSES:
            provoke_memory_error(args, name, device)
            clear_device_cache(garbage_collection=True)


def report(benchmark, **measured):
    """Print one JSON line."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": f"gpu_{benchmark}"} | measured | versions), flush=True)


def wait(device):
    """Wait until the device has computed everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peak(dtype, device, tiny):
    """Operations a second of the fastest of several large matrix products."""
    best = 0.0
    for rows, inner, columns in ((512, 512, 512),) if tiny else PEAK_SIZES:
        left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
        for _ in range(10):
            wait(device)
            start = time.perf_counter()
            left @ right
            wait(device)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


# Training ------------------------------------------------------------------------------------------------------------


class RandomItems(Dataset):
    """Stands for `TrainingItems`: random pixels, and captions of RSICD's lengths.

    Args:
        num_negatives: captions of each item beside its own.
    """

    def __init__(self, count, config, num_negatives):
        self.num_negatives, self.seed, self.epoch, self.config = num_negatives, 0, 0, config
        self.caption_tokens = draw_captions(count, config.vocab_size)
        self.caption_text_id = np.arange(count)
        self.images = self  # whose `image_processor` has the size
        self.image_processor, self.image_size = self, config.image_size

    def __len__(self):
        return len(self.caption_tokens)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, item):
        return item

    def describe(self, items):
        return [{"filename": str(item), "caption": ""} for item in items]

    def collate(self, items):
        generator = torch.Generator().manual_seed(items[0])
        side, count = self.config.image_size, len(self)
        others = np.random.default_rng(items).integers(0, count, (len(items), self.num_negatives))
        rows, columns = np.unique(np.concatenate([np.array(items)[:, None], others], axis=1), return_inverse=True)
        captions = [self.caption_tokens[row] for row in rows]
        ids, mask = pad(captions, max(map(len, captions)))
        candidates = torch.from_numpy(columns.reshape(len(items), -1))
        return {
            "pixel_values": torch.rand(len(items), 3, side, side, generator=generator) * 2 - 1,
            "input_ids": ids,
            "attention_mask": mask,
            "candidates": candidates,
            "is_match": torch.arange(len(rows)) == candidates[:, :1],
            "items": torch.tensor(items),
            "text_ids": torch.tensor(items),
            "image_text_ids": torch.tensor(items)[:, None],
        }


def make_trainer(args, loss, device, folder, *, batch, dropout=0.1, **options):
    """A trainer of a network of random weights on random items."""
    torch.manual_seed(0)
    weight = LOSSES[loss]
    config = IeftConfig(
        **(TINY if args.tiny else {}), contrastive_dim=256 if weight else 0, hidden_dropout_prob=dropout,
    )  # fmt: skip
    items = RandomItems(max(64, 4 * batch), config, 0 if weight else CANDIDATES - 1)
    training = IeftTrainingArguments(
        folder, train_batch_size=batch, contrastive_weight=weight, num_negatives=CANDIDATES - 1, ranking_start=0.0,
        use_cpu=device == "cpu", disable_tqdm=True, remove_unused_columns=False, save_strategy="no", report_to="none",
        learning_rate=1e-5, logging_steps=1, **options,
    )  # fmt: skip
    return IeftTrainer(IeftForImageTextRetrieval(config), training, train_dataset=items)


class Clock(TrainerCallback):
    """The time of each optimizer step, without waiting for data."""

    def __init__(self, device):
        self.device, self.seconds = device, []

    def on_step_begin(self, args, state, control, **kwargs):
        wait(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait(self.device)
        self.seconds.append(time.perf_counter() - self.start)


def measure_training(args, loss, device, peak):
    """Steps of the published batch in bfloat16."""
    with TemporaryDirectory() as folder:
        trainer = make_trainer(args, loss, device, folder, batch=args.batch, max_steps=args.steps + 1, bf16=True)
        clock = Clock(device)
        trainer.add_callback(clock)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        micro_batch = trainer.args.per_device_train_batch_size
        seconds = min(clock.seconds[1:])
        operations = PASSES * trainer.batch_cost[0]
        estimate = trainer.image_bytes * micro_batch + trainer.fixed_bytes
        report(
            "training", loss=loss, batch=args.batch, captions_of_an_image=CANDIDATES, micro_batch=micro_batch,
            parameters=trainer.model.num_parameters(), seconds_a_step=seconds, images_a_second=args.batch / seconds,
            steps=clock.seconds, tflop_a_step=operations / 1e12, share_of_peak=operations / seconds / peak,
            peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
            reserved_memory_gb=torch.cuda.max_memory_reserved() / 1e9 if device == "cuda" else None,
            estimated_memory_gb=estimate / 1e9, losses=[each["loss"] for each in trainer.state.log_history
                                                         if "loss" in each],
        )  # fmt: skip


def provoke_memory_error(args, loss, device):
    """One step with enough memory, and again with a part of it. Without CUDA, memory is not limited."""
    batch = min(args.batch, 32)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            args, loss, device, folder, batch=batch, dropout=0.0, per_device_train_batch_size=batch, max_steps=1
        )
        trainer.state.max_steps = 1
        items = trainer.train_dataset
        inputs = items.collate(list(range(batch)))
        found = []
        for limited in (False, True):
            trainer.model.zero_grad()
            trainer.args.per_device_train_batch_size = batch
            if limited and device == "cuda":
                torch.cuda.empty_cache()
                total = torch.cuda.get_device_properties(0).total_memory
                room = trainer.image_bytes * batch / 3
                allowed = torch.cuda.memory_allocated() + trainer.fixed_bytes + room
                torch.cuda.set_per_process_memory_fraction(allowed / total)
            start = time.perf_counter()
            value = trainer.training_step(trainer.model, dict(inputs)).item()
            gradients = torch.cat([weight.grad.flatten().cpu() for weight in trainer.model.parameters()])
            found.append((value, gradients, time.perf_counter() - start))
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        (before, expected, _), (after, gradients, seconds) = found
        report(
            "memory_error", loss=loss, batch=batch, dtype="float32", limited=device == "cuda",
            micro_batch_before=batch, micro_batch_after=trainer.args.per_device_train_batch_size, value=before,
            value_after=after, difference=abs(after - before), seconds_with_errors=seconds,
            largest_gradient=expected.abs().max().item(),
            largest_difference_of_gradients=(gradients - expected).abs().max().item(),
        )  # fmt: skip


if __name__ == "__main__":
    main()
