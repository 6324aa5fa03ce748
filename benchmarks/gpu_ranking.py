"""Measures ranking by the full-size network on one accelerator, and checks it there; one JSON line a measurement.

    python benchmarks/gpu_ranking.py                  # under 5 minutes on an H100
    python benchmarks/gpu_ranking.py --tiny           # a small network on any device, to try the script

Weights, pixels and captions are random; captions have the lengths of RSICD's. The types are float32, TF32 (float32
whose products are rounded), bfloat16 and float16.

- `golden`: in float32, the largest difference from the scores of the published network (only full size).
- `ranking`: pairs a second of the published loop and of the engine in each type, with the steps between them in
  float32 and bfloat16; the share of the fastest matrix product of that type; what RSICD's test split would take
  (1,093 images x 3,619 captions); and the lowest rank correlation of a query with float32, of captions and of images.
- `processes`: two processes on this device against one.
- `embedding`, `late_fusion`: images a second, and pairs a second with features that were computed before.
"""

import argparse
import time
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from bench_ranking import loop
from gpu_training import TINY, measure_peak, report, wait
from published import as_published, draw_captions

from configuration_ieft import IeftConfig
from ieft.evaluation.ranking import score_matrix
from ieft.training.cost import measure_ranking
from modeling_ieft import IeftForImageTextRetrieval

TYPES = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
EACH_STEP = ("float32", "bfloat16")  # types in which the steps between loop and engine are timed too
PUBLISHED_BATCH = 64
RSICD_PAIRS = 1093 * 3619
MEASUREMENTS = ("golden", "ranking", "processes", "embedding", "late_fusion")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--captions", type=int, default=1024)
    parser.add_argument("--loop_images", type=int, default=1, help="images that the published loop ranks")
    args = parser.parse_args()
    if args.tiny:
        args.images, args.captions = 4, 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure = {
        "golden": check_golden, "ranking": measure_all_types, "processes": compare_processes,
        "embedding": measure_embedding, "late_fusion": measure_late_fusion,
    }  # fmt: skip
    for name in args.only:
        measure[name](args, device)


def make_network(args, device, **fields):
    """The network with random weights that depend on nothing but its fields."""
    torch.manual_seed(0)
    return IeftForImageTextRetrieval(IeftConfig(**(TINY if args.tiny else {}), **fields)).eval().to(device)


def make_inputs(args, config):
    """Pixels (I, 3, H, W) and captions, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(args.images, 3, config.image_size, config.image_size, generator=generator) * 2 - 1
    return images, draw_captions(args.captions, config.vocab_size)


@contextmanager
def computing_in(name):
    """Meanwhile products of float32 are rounded, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def timed(device, function, *inputs, warm_up=None):
    """Result and seconds of a function of inputs, after a call with others."""
    function(*(warm_up or inputs))
    wait(device)
    start = time.perf_counter()
    result = function(*inputs)
    wait(device)
    return result, time.perf_counter() - start


def lowest_rank_correlation(scores, exact):
    """Spearman's, the lowest of the rows of two matrices."""
    ranks = [np.argsort(np.argsort(each, axis=1), axis=1) for each in (scores, exact)]
    return min(float(np.corrcoef(*rows)[0, 1]) for rows in zip(*ranks, strict=True))


def check_golden(args, device):
    """Scores of the published network, stored with the tests."""
    if args.tiny:
        return
    from golden_recipe import load_golden, make_inputs, make_published_state_dict

    from convert_checkpoint import rename_published

    images, input_ids, attention_mask = make_inputs()
    captions = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    with computing_in("float32"):
        for seed in (0, 1):
            model = IeftForImageTextRetrieval(IeftConfig()).eval()
            model.load_state_dict(rename_published(make_published_state_dict(seed))[0])
            scores = score_matrix(model.to(device), images, captions, progress=False)
            golden = np.array(load_golden(seed)["scores"])
            report("golden", seed=seed, largest_difference=float(np.abs(scores - golden).max()), allowed=1e-4)


@torch.no_grad()
def measure_all_types(args, device):
    """The published loop and the engine, in each type."""
    model = make_network(args, device)
    images, captions = make_inputs(args, model.config)
    length = round(sum(map(len, captions)) / len(captions))
    operations = measure_ranking(model, length).of(len(images), len(set(map(tuple, captions))))
    exact = None
    for name, dtype in TYPES.items():
        with computing_in(name):
            peak = measure_peak(dtype or torch.float32, device, args.tiny)
            steps = measure_loops(args, device, model, images, captions, name, dtype)
            engine = partial(score_matrix, model, dtype=dtype, progress=False)
            scores, seconds = timed(device, engine, images, captions, warm_up=(images[:8], captions))
        exact = scores if exact is None else exact
        rate = scores.size / seconds
        report(
            "ranking", dtype=name, images=len(images), captions=len(captions), pairs_a_second=rate,
            pairs_a_second_before=steps, speedup=rate / steps["published loop"], peak_tflops=peak / 1e12,
            share_of_peak=operations / seconds / peak, minutes_for_rsicd=RSICD_PAIRS / rate / 60,
            largest_difference_from_float32=float(np.abs(scores - exact).max()),
            lowest_correlation_by_image=lowest_rank_correlation(scores, exact),
            lowest_correlation_by_caption=lowest_rank_correlation(scores.T, exact.T),
        )  # fmt: skip


def measure_loops(args, device, model, images, captions, name, dtype):
    """Pairs a second of the published loop and, in some types, of what takes its steps one by one."""
    published, some = as_published(model), images[: args.loop_images]
    ways = {
        "published loop": partial(loop, published, batch=PUBLISHED_BATCH),
        "captions of one length together": partial(loop, published, batch=PUBLISHED_BATCH, trimmed=True),
        "fused attention, linear maps": partial(loop, model, batch=PUBLISHED_BATCH, trimmed=True),
        "last block for the text CLS alone": partial(loop, model, batch=PUBLISHED_BATCH, trimmed=True, whole=False),
    }
    if name not in EACH_STEP:
        ways = {"published loop": ways["published loop"]}
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        return {
            way: len(some) * len(captions) / timed(device, score, some, captions, warm_up=(some[:1], captions[:64]))[1]
            for way, score in ways.items()
        }


def compare_processes(args, device):
    """Two processes that share the device against one: scores must be the same."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_in_process, args=(args, device, folder), nprocs=2)
        both = np.load(f"{folder}/scores.npy")
    model = make_network(args, device)
    alone = score_matrix(model, *make_inputs(args, model.config), progress=False)
    report("processes", equal=bool((both == alone).all()), largest_difference=float(np.abs(both - alone).max()))


def rank_in_process(rank, args, device, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = make_network(args, device)
    scores = score_matrix(model, *make_inputs(args, model.config), progress=False)
    if rank == 0:
        np.save(f"{folder}/scores.npy", scores)
    dist.destroy_process_group()


@torch.no_grad()
def measure_embedding(args, device):
    """Images a second that are embedded for a search, from pixels on the CPU."""
    model = make_network(args, device, contrastive_dim=256)
    images, _ = make_inputs(args, model.config)
    for name, dtype in TYPES.items():
        with computing_in(name), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            _, seconds = timed(device, lambda: model.get_image_features(images.to(device)).float().cpu())
        report("embedding", dtype=name, images=len(images), images_a_second=len(images) / seconds)


@torch.no_grad()
def measure_late_fusion(args, device):
    """Pairs a second of fusion in the last block, with features of images that were computed before."""
    last = make_network(args, device).config.num_hidden_layers - 1
    model = make_network(args, device, first_joint_layer=last)
    images, captions = make_inputs(args, model.config)
    states = list(torch.cat([model.read_images(some.to(device)).cpu() for some in images.split(16)]))
    for name, dtype in TYPES.items():
        with computing_in(name):
            engine = partial(score_matrix, model, dtype=dtype, progress=False)
            scores, seconds = timed(device, engine, states, captions)
        report("late_fusion", dtype=name, pairs=scores.size, pairs_a_second=scores.size / seconds)


if __name__ == "__main__":
    main()
