"""Measures how fast images are ranked with captions, compared with the published loop.

    python benchmarks/bench_ranking.py --images 1 --captions 192

Prints a table, then one JSON line. Only the equality of the scores is checked, not their quality.

Cost is dominated by matrix products. A pair costs the published loop 22.6 GFLOP: it pads every caption to 40 tokens,
embeds both sides again for each pair, computes all tokens of the last block although only one is used, and scores a
sentence again for every image that carries it. Each row of the table adds one optimization to those above it; the last
row computes in bfloat16. Captions have the lengths and repeats of RSICD's test split. All variants alternate in one
run, so that other load on the machine affects all of them; ratios are most accurate on an idle machine.
"""

import argparse
import json
import platform
import time
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import transformers
from published import PADDED_LENGTH, as_published, draw_captions, pad
from torch.utils.flop_counter import FlopCounterMode

from configuration_ieft import IeftConfig
from ieft.cpu.prepacked import PrepackedLinear, can_prepack
from ieft.evaluation import ranking
from modeling_ieft import IeftForImageTextRetrieval

PUBLISHED_BATCH, SMALL_BATCH = 64, 8
TYPICAL_LENGTH = 15  # tokens of a caption, for counting operations
PEAK_SHAPES = ((2048, 768, 3072), (2048, 2048, 2048), (4096, 4096, 4096))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--captions", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = IeftForImageTextRetrieval(IeftConfig()).eval().to(device)
    images = torch.rand(args.images, 3, model.config.image_size, model.config.image_size) * 2 - 1
    captions = draw_captions(args.captions, model.config.vocab_size)
    ways = ways_to_score(model)
    seconds, scores = {name: [] for name in ways}, {}
    peaks = {dtype: np.zeros(2) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = np.asarray(way(images, captions))
            seconds[name].append(time.perf_counter() - start)
        peaks = {dtype: np.maximum(peak, matrix_product_peaks(dtype, device)) for dtype, peak in peaks.items()}
    scored = args.images * len({tuple(caption) for caption in captions})
    report(scores, {name: min(each) for name, each in seconds.items()}, scored * gflop_of_a_pair(model), peaks, device)


def ways_to_score(model):
    """Name -> function of images and captions; each adds an optimization to the one before."""
    published = as_published(model)
    sdpa = partial(loop, model, batch=SMALL_BATCH, trimmed=True)
    without_prepacking = patch.object(ranking, "can_prepack", lambda model, dtype: False)
    return {
        "published loop": partial(loop, published, batch=PUBLISHED_BATCH),
        "8 pairs at once": partial(loop, published, batch=SMALL_BATCH),
        "captions of one length together": partial(loop, published, batch=SMALL_BATCH, trimmed=True),
        "fused attention, linear maps": sdpa,
        "last block for the text CLS alone": partial(sdpa, whole=False),
        "each side once, equal captions once": partial(score, model, setting=without_prepacking),
        "matrices laid out (score_matrix)": partial(score, model),
        "bfloat16 (score_matrix)": partial(score, model, dtype=torch.bfloat16),
    }


@torch.no_grad()
def loop(model, images, captions, *, batch, trimmed=False, whole=True):
    """Plain forward passes, `batch` captions at once with one image, padded or in batches of one length: (I, C)."""
    groups = [np.arange(len(captions))]
    if trimmed:
        lengths = np.array([len(caption) for caption in captions])
        groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    scores = torch.empty(len(images), len(captions))
    for group in groups:
        ids, mask = pad([captions[row] for row in group], len(captions[group[0]]) if trimmed else PADDED_LENGTH)
        for rows, some, their_mask in zip(
            np.split(group, range(batch, len(group), batch)), ids.split(batch), mask.split(batch), strict=True
        ):
            for image, pixels in enumerate(images):
                output = model(
                    input_ids=some.to(model.device),
                    attention_mask=None if trimmed else their_mask.to(model.device),
                    pixel_values=pixels.to(model.device).expand(len(some), -1, -1, -1),  # (B, 3, H, W)
                    output_hidden_states=whole,  # this computes all tokens of the last block
                )
                scores[image, rows] = output.logits[:, 0].float().cpu()
    return scores


def score(model, images, captions, *, dtype=None, setting=None):
    """The engine: (I, C)."""
    with setting or nullcontext():
        return ranking.score_matrix(model, images, captions, dtype=dtype, progress=False)


@torch.no_grad()
def gflop_of_a_pair(model):
    """GFLOP of the engine for one pair with cached features."""
    images = model.prepare_images(torch.zeros(1, *model.vilt.embeddings.patch_embeddings.expected).to(model.device))
    captions = model.prepare_captions(torch.ones(1, TYPICAL_LENGTH, dtype=torch.long, device=model.device))
    written_out = as_published(model)  # so that the products of attention are counted
    with FlopCounterMode(display=False) as counter:
        written_out.score_prepared(captions, images)
    return counter.get_total_flops() / 1e9


def matrix_product_peaks(dtype, device, repeats=5):
    """The fastest of several large matrix products, in GFLOP/s: by torch, and with oneDNN-prepacked weights.

    They are the work of two libraries (MKL and oneDNN), of which on some CPUs the first is far from what is possible.
    """
    best = np.zeros(2)
    for rows, inner, columns in PEAK_SHAPES:
        left = torch.rand(rows, inner, device=device).to(dtype)
        linear = torch.nn.Linear(inner, columns, bias=False, device=device).requires_grad_(False)
        laid_out = PrepackedLinear(linear, dtype) if can_prepack(linear, dtype) else None
        linear = linear.to(dtype)
        for way, product in enumerate(filter(None, (linear, laid_out))):
            for _ in range(repeats):
                start = time.perf_counter()
                product(left).sum().item()  # the sum waits for an accelerator
                best[way] = max(best[way], 2 * rows * inner * columns / (time.perf_counter() - start) / 1e9)
    return best


def report(scores, seconds, gflop, peaks, device):
    """Print the table, then one JSON line. `gflop` is the work of the engine."""
    (published, *_, exact, half), pairs = scores.values(), next(iter(scores.values())).size
    num_images, num_captions = published.shape
    print(
        f"{num_images} images x {num_captions} captions of RSICD's lengths and repeats, full-size network, "
        f"{torch.get_num_threads()} threads\n\n{'':38}{'seconds':>8}{'pairs/s':>9}{'ratio':>7}"
    )
    base = seconds["published loop"]
    for name, each in seconds.items():
        print(f"{name:38}{each:>8.1f}{pairs / each:>9.2f}{base / each:>7.2f}")
    print()
    of_exact, of_half = list(seconds.values())[-2:]
    measured = {
        "benchmark": "ranking",
        "speedup_exact": base / of_exact,
        "speedup_bf16": base / of_half,
        "peak_gflops": peaks[torch.float32].tolist(),
        "peak_gflops_bf16": peaks[torch.bfloat16].tolist(),
        "peak_fraction": gflop / of_exact / peaks[torch.float32].max(),
        "peak_fraction_bf16": gflop / of_half / peaks[torch.bfloat16].max(),
        "torch_fraction": gflop / of_exact / peaks[torch.float32][0],
        "torch_fraction_bf16": gflop / of_half / peaks[torch.bfloat16][0],
        "max_abs_diff": max(float(np.abs(each - published).max()) for each in list(scores.values())[:-1]),
        "max_abs_diff_bf16": float(np.abs(half - exact).max()),
        "pairs": pairs,
        "seconds": seconds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for dtype, each, ending in ((torch.float32, of_exact, ""), (torch.bfloat16, of_half, "_bf16")):
        print(
            f"{str(dtype)[6:]}: {gflop / each:,.0f} GFLOP/s, {measured[f'peak_fraction{ending}']:.0%} of the fastest "
            f"matrix product here and {measured[f'torch_fraction{ending}']:.0%} of torch's own."
        )
    print(
        f"Largest difference of scores: float32 {measured['max_abs_diff']:.1e}, bfloat16 "
        f"{measured['max_abs_diff_bf16']:.1e}."
    )
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
