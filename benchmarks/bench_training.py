"""Measures the time of one training step, compared with the published code, and whether image loading keeps up.

    python benchmarks/bench_training.py --images 2

Prints a table, then one JSON line. Only the equality of the losses is checked, not whether training converges.

Cost is dominated by matrix products, three times those of a forward pass. Each image is ranked with its own caption
and 15 others. The published step embeds an image again for each of them, pads every caption to 40 tokens, and computes
all tokens of the last block although only one is used. Both steps, optimizer included, alternate in one run. Dropout
is off, so that the losses are equal.
"""

import argparse
import io
import json
import platform
import time
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from published import PADDED_LENGTH, as_published, draw_captions, pad
from torch.nn.functional import cross_entropy

from configuration_ieft import IeftConfig
from ieft.training.items import TrainingItems, learn_tokenizer
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

NUM_NEGATIVES = 15
PHOTOGRAPH_SIZE = 224  # as RSICD's


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = IeftConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = IeftForImageTextRetrieval(config).to(device).train()
    batch = draw_batch(args.images, config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # so that every step has the same weights
    with TemporaryDirectory() as folder:
        options = {"use_cpu": device == "cpu", "disable_tqdm": True, "remove_unused_columns": False}
        trainer = IeftTrainer(model, IeftTrainingArguments(folder, **options))
        ways = {"published step": published_loss(model), "IeftTrainer": trainer.compute_loss}
        seconds, losses = {name: [] for name in ways}, {}
        for _ in range(args.repeats):
            for name, loss_of in ways.items():
                start = time.perf_counter()
                losses[name] = step(loss_of, model, batch, optimizer)
                seconds[name].append(time.perf_counter() - start)
    report({name: min(each) for name, each in seconds.items()}, losses, args.images, seconds_to_prepare(), device)


def draw_batch(num_images, config, device):
    """A batch as from `TrainingItems.collate`: each image's own caption and its negatives, each caption once."""
    num_captions = num_images * (1 + NUM_NEGATIVES)
    captions = draw_captions(num_captions, config.vocab_size)
    ids, mask = pad(captions, max(map(len, captions)))
    batch = {
        "pixel_values": torch.rand(num_images, 3, config.image_size, config.image_size) * 2 - 1,
        "input_ids": ids,
        "attention_mask": mask,
        "candidates": torch.arange(num_captions).view(num_images, -1),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def published_loss(model):
    """The loss of a batch by one plain forward pass over all pairs, padded and with all tokens of the last block."""
    published = as_published(model)

    def loss(_, batch):
        chosen = batch["candidates"].flatten()
        longer = (0, PADDED_LENGTH - batch["input_ids"].shape[1])
        ids, mask = (torch.nn.functional.pad(batch[name], longer)[chosen] for name in ("input_ids", "attention_mask"))
        pixels = batch["pixel_values"].repeat_interleave(batch["candidates"].shape[1], dim=0)  # (B, 3, H, W)
        output = published(input_ids=ids, attention_mask=mask, pixel_values=pixels, output_hidden_states=True)
        scores = output.logits.view(batch["candidates"].shape)  # (I, N)
        return cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))

    return loss


def step(loss_of, model, batch, optimizer):
    """Take one step and return its loss."""
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def seconds_to_prepare(count=32):
    """Seconds to decode, augment and resize one photograph for training, in one process."""
    draw = np.random.default_rng(0)
    rows = []
    for row in range(count):
        encoded = io.BytesIO()
        small = Image.fromarray(draw.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        small.resize((PHOTOGRAPH_SIZE, PHOTOGRAPH_SIZE), Image.Resampling.BICUBIC).save(encoded, "JPEG")
        rows.append({"image": {"path": None, "bytes": encoded.getvalue()}, "captions": [f"scene {row} ."]})
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    split = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    tokenizer = learn_tokenizer(row["captions"][0] for row in rows)
    items = TrainingItems(split, IeftProcessor(IeftImageProcessor(), tokenizer))
    start = time.perf_counter()
    for item in range(len(items)):
        items[item]
    return (time.perf_counter() - start) / len(items)


def report(seconds, losses, num_images, preparing, device):
    """Print the table, then one JSON line."""
    published, ours = seconds.values()
    difference = abs(float(np.diff(list(losses.values()))[0]))
    print(
        f"One step on {num_images} images, each with {1 + NUM_NEGATIVES} captions, full-size network, "
        f"{torch.get_num_threads()} threads\n\n{'':16}{'seconds':>10}{'ratio':>8}"
    )
    for name, each in seconds.items():
        print(f"{name:16}{each:>10.2f}{published / each:>8.2f}")
    print(
        f"\nThe losses differ by {difference:.1e}. Decoding, augmenting and resizing a photograph takes "
        f"{preparing * 1e3:.1f} ms in one process, {preparing * num_images / ours:.1%} of the step that reads it."
    )
    measured = {
        "benchmark": "training",
        "speedup": published / ours,
        "loss_difference": difference,
        "seconds": seconds,
        "seconds_to_prepare_an_image": preparing,
        "images": num_images,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
