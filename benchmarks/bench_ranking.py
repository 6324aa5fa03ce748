"""How fast images are ranked with captions, against the loop that was published.

    python benchmarks/bench_ranking.py --images 1 --captions 128

In: nothing but these sizes. Out: a table, then one JSON line. Whether the scores are good is not asked, only that both
ways give the same ones.

What bounds it: a pair of the full-size network costs the published loop 22.6 GFLOP. It pads every caption to 40
tokens, embeds both sides again for each pair, and computes all tokens of the last block where one is read. Ranking
leaves that out; the rest is matrix products, bounded by the machine's float32 peak. Captions of one length are read
together, so that a trial with few captions shows ranking slower than it is. The two ways take turns in one run, so
that what else the machine does falls on both.
"""

import argparse
import json
import platform
import time

import numpy as np
import torch
import transformers

from configuration_ieft import IeftConfig
from ieft.ranking import score_matrix
from modeling_ieft import IeftForImageTextRetrieval

PADDED_LENGTH = 40  # of every caption in the published loop
PAIRS_AT_ONCE = 32
LENGTHS = (8, 20)  # tokens of a caption, special ones included, all equally likely


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = IeftForImageTextRetrieval(IeftConfig()).eval()
    images = torch.rand(args.images, 3, model.config.image_size, model.config.image_size) * 2 - 1
    captions = draw_captions(args.captions, model.config.vocab_size)

    ways = {"published loop": score_as_published, "score_matrix": score_matrix}
    seconds = {name: [] for name in ways}
    scores = {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = np.asarray(way(model, images, captions))
            seconds[name].append(time.perf_counter() - start)
    report(scores, {name: min(each) for name, each in seconds.items()}, args)


def draw_captions(count, vocab_size):
    """Token ids of distinct sentences."""
    draw = np.random.default_rng(0)
    return [draw.integers(1000, vocab_size, draw.integers(*LENGTHS, endpoint=True)).tolist() for _ in range(count)]


@torch.no_grad()
def score_as_published(model, images, captions):
    """One plain forward pass for each pair, every caption padded: (I, C)."""
    ids = torch.zeros(len(captions), PADDED_LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        ids[row, : len(caption)] = torch.tensor(caption)
        mask[row, : len(caption)] = 1
    rows = []
    for image in images:
        scores = []
        for some, their_mask in zip(ids.split(PAIRS_AT_ONCE), mask.split(PAIRS_AT_ONCE), strict=True):
            pixels = image.expand(len(some), -1, -1, -1)  # (B, 3, H, W)
            output = model(input_ids=some, attention_mask=their_mask, pixel_values=pixels, output_hidden_states=True)
            scores.append(output.logits[:, 0])  # all tokens of the last block, as hidden states ask for
        rows.append(torch.cat(scores))
    return torch.stack(rows)


def report(scores, seconds, args):
    """The table, then one JSON line."""
    pairs = args.images * args.captions
    slow, fast = scores.values()
    difference = float(np.abs(slow - fast).max())
    print(f"{args.images} images x {args.captions} captions, full-size network, {torch.get_num_threads()} threads\n")
    print(f"{'':16}{'seconds':>10}{'pairs/s':>10}{'ratio':>8}")
    base = seconds["published loop"]
    for name, each in seconds.items():
        print(f"{name:16}{each:>10.2f}{pairs / each:>10.2f}{base / each:>8.2f}")
    print(f"\nlargest difference of scores: {difference:.1e}")
    measured = {"benchmark": "ranking", "pairs": pairs, "seconds": seconds, "largest_difference": difference}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "device": platform.machine()}
    print(json.dumps(measured | versions | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
