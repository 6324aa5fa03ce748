"""Measures the time of one training step, compared with the published code, and whether image loading keeps up.

    PYTHONPATH=. python benchmarks/bench_training.py --images 2 --all_pairs 64

Prints two tables, then one JSON line. Only the equality of the losses is checked, not whether training converges.

Cost is dominated by matrix products, three times those of a forward pass. Each image is ranked with its own caption
and 15 others. The published step embeds an image again for each of them, pads every caption to 40 tokens, and computes
all tokens of the last block although only one is used. `IeftTrainer` computes each side of the pairs once up to the
projections of the fusion layer, here of the first block, and puts captions of similar length together; "pairs one by
one" is the step without either. The ways, optimizer included, alternate in one run; medians. With one thread on a CPU
(OMP_NUM_THREADS=1) it is processor time, which other programs lengthen less. Dropout is off, so that the losses are
equal.

The second table is late fusion at the last block of a network of the size of `--network small`: every image of a batch
against every caption, where images are not copied for their pairs; the same pairs put together token by token; and the
contrastive loss alone, which needs the embeddings only.
"""

import argparse
import io
import json
import platform
import statistics
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
from ieft.training.losses import FEATURES, GroupedBatch, call_model, candidate_calls, candidate_loss
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor
from run_retrieval import NETWORKS

NUM_NEGATIVES = 15
PHOTOGRAPH_SIZE = 224  # as RSICD's


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--all_pairs", type=int, default=32, help="images of a batch of the second table")
    parser.add_argument("--repeats", type=int, default=3)
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
        ways = {
            "published step": published_loss(model),
            "pairs one by one": pair_by_pair_loss,
            "IeftTrainer": trainer.compute_loss,
        }
        seconds, losses = alternate(ways, model, batch, optimizer, args.repeats)
    measured = report(seconds, losses, args.images, seconds_to_prepare(), device)
    print(json.dumps(measured | measure_all_pairs(args.all_pairs, args.repeats, device)))


def alternate(ways, model, batch, optimizer, repeats):
    """Median seconds of a step, and the loss, of each of the ways: name -> function of model and batch."""
    seconds, losses = {name: [] for name in ways}, {}
    alone_on_cpu = model.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone_on_cpu else time.perf_counter
    for _ in range(repeats):
        for name, loss_of in ways.items():
            start = clock()
            losses[name] = step(loss_of, model, batch, optimizer)
            seconds[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}, losses


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


def pair_by_pair_loss(model, batch):
    """The loss of a batch from pairs put together token by token, each image embedded once."""
    (call,) = candidate_calls(batch, len(batch["pixel_values"]))
    return candidate_loss(call_model(model, call, in_groups=False)["logits"].view(batch["candidates"].shape))


def measure_all_pairs(num_images, repeats, device):
    """The second table, printed, and what the JSON line says of it."""
    torch.manual_seed(0)
    config = IeftConfig(**NETWORKS["small"] | {"contrastive_dim": 128})
    model = IeftForImageTextRetrieval(config).to(device).train()
    captions = draw_captions(num_images, config.vocab_size)
    ids, mask = (x.to(device) for x in pad(captions, max(map(len, captions))))
    pixels = torch.rand(num_images, 3, config.image_size, config.image_size, device=device) * 2 - 1
    rows = torch.arange(num_images, device=device)
    is_match = torch.eye(num_images, dtype=torch.bool, device=device)

    def loss_of(groups, in_groups):
        def loss(model, batch):
            (call, _), *_ = batch.calls(num_images)
            outputs = call_model(model, call, (*FEATURES, "logits"), in_groups=in_groups)
            features = (outputs[name] for name in FEATURES[:2])
            contrastive = batch.contrastive_loss(*features, outputs["similarity_scale"][0])
            return contrastive + batch.ranking_loss(batch.group_scores(outputs["logits"]))

        return lambda model, _: loss(model, GroupedBatch(pixels, ids, mask, is_match, groups))

    ways = {
        "contrastive alone": loss_of(rows[None, :1], True),
        "pairs one by one": loss_of(rows[None], False),
        "IeftTrainer": loss_of(rows[None], True),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    alternate(ways, model, None, optimizer, 1)  # to warm up
    seconds, losses = alternate(ways, model, None, optimizer, repeats)
    difference = abs(losses["pairs one by one"] - losses["IeftTrainer"])
    print(
        f"\nOne step on {num_images} x {num_images} pairs, small network, fusion at its last block, "
        f"{torch.get_num_threads()} threads; the losses of all pairs differ by {difference:.1e}\n\n"
        f"{'':18}{'seconds':>8}{'ratio':>8}"
    )
    for name, each in seconds.items():
        print(f"{name:18}{each:>8.2f}{seconds['pairs one by one'] / each:>8.2f}")
    return {"all_pairs": num_images, "all_pairs_seconds": seconds, "all_pairs_loss_difference": difference}


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
    """Print the first table; returns what the JSON line says of it."""
    published, ours = seconds["published step"], seconds["IeftTrainer"]
    difference = max(losses.values()) - min(losses.values())
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
    return {
        "benchmark": "training",
        "speedup": published / ours,
        "speedup_over_pairs_one_by_one": seconds["pairs one by one"] / ours,
        "loss_difference": difference,
        "seconds": seconds,
        "seconds_to_prepare_an_image": preparing,
        "images": num_images,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
