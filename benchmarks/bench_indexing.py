"""Measures how fast an archive is indexed: reading, embedding and writing alone, and all of them together.

    PYTHONPATH=. python benchmarks/bench_indexing.py --model checkpoints/small

Prints a table, then one JSON line. The images are synthetic scenes, as PNG files of `--side` pixels. The plain loop
reads images in turn, embeds a batch with the network as it was loaded, and writes it: one after the other. The
pipeline reads in a thread (0 workers) or in processes, while the network computes with prepacked weights and another
thread writes. The peak is the fastest product of two large matrices on this machine in the same run.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.data.scenes import draw_scene
from ieft.search.archive_files import digest_file, find_images, read_whole
from ieft.search.read_ahead import Job, ReadAhead, read_files

BATCH = 64
PEAK_SIDE = 2048


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/small", help="a checkpoint with contrastive heads")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=96, help="of the images, in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    readers = {count: ReadAhead(count) for count in args.workers}  # before anything starts threads
    model, processor = (kind.from_pretrained(args.model) for kind in (IeftForImageTextRetrieval, IeftProcessor))
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "archive")
        archive.mkdir()
        for number in range(args.images):
            draw_scene(0, number, size=args.side).image.save(archive / f"{number:06}.png")
        measured = measure(folder, find_images(archive), model, processor, readers, args)
    report(measured, model, args)


def measure(folder, files, model, processor, readers, args):
    """Seconds of each stage and of each way to do all of them; FLOP of the network's work, and FLOP/s at the peak."""
    from ieft.search.index import ImageIndex
    from ieft.search.ingestion import embed, write

    def create(name):
        places = {"device": args.device, "dtype": args.dtype}
        return ImageIndex(Path(folder, name), model, processor=processor, create=True, **places)

    index, seconds = create("stages"), {}
    jobs = [Job(file.name, str(file), 0, 0.0, "", frozenset(), processor.image_processor.image_size,
                processor.image_processor.fit) for file in files]  # fmt: skip
    found = clock(seconds, "reading", lambda: [row for each in read_files(jobs) for row in each.rows])
    squares = np.stack([square for _, square in found])
    starts = range(0, len(squares), BATCH)
    with index.network() as network:
        embed(index, network, squares[:BATCH])  # warm
        columns = clock(seconds, "embedding", lambda: [
            row for first in starts for row in embed(index, network, squares[first : first + BATCH])
        ])  # fmt: skip
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        index.model.get_image_features(index.to_pixels(squares[:1]))
    rows = [row | {"file": job.name, "content": "", "tiling": ""} | of_row
            for (row, _), job, of_row in zip(found, jobs, columns, strict=True)]  # fmt: skip
    clock(seconds, "writing", lambda: [
        write(index, rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)
    ])  # fmt: skip
    plain = create("plain")
    clock(seconds, "plain loop", lambda: index_plainly(plain, files))
    for count, reader in readers.items():
        made, name = create(f"workers {count}"), f"pipeline, {count} workers"
        report_of_one = clock(seconds, name, lambda m=made, r=reader: m.add(files, reader=r, progress=False))
        assert report_of_one == {"added": len(files), "unchanged": 0, "unreadable": {}}
    return seconds, counter.get_total_flops() * len(files), find_peak(index.model.device, index.dtype)


def clock(seconds, name, work):
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result


@torch.no_grad()
def index_plainly(index, files):
    """One stage after the other, with the network as it was loaded."""
    from ieft.search.ingestion import write

    for first in range(0, len(files), BATCH):
        found = [(digest_file(file), *read_whole(file)) for file in files[first : first + BATCH]]
        pixels = index.processor(images=[image for *_, image in found])["pixel_values"].to(index.model.device)
        vectors = index.model.get_image_features(pixels).float().cpu().numpy()
        rows = [row | {"file": str(row["file"]), "content": content, "tiling": "", "vector": vector}
                for (content, row, _), vector in zip(found, vectors, strict=True)]  # fmt: skip
        write(index, rows)


def find_peak(device, dtype):
    """The fastest of ten products of two large matrices, in FLOP/s."""
    factors = torch.randn(2, PEAK_SIDE, PEAK_SIDE, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (factors[0] @ factors[1]).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * PEAK_SIDE**3 / min(times)


def report(measured, model, args):
    seconds, work, peak = measured
    print(f"{args.images:,} images of {args.side} x {args.side} pixels, {os.cpu_count()} cores, {model.device}\n")
    print(f"{'':24}{'seconds':>9}{'images/s':>10}{'times':>7}")
    for name, taken in seconds.items():
        ratio = f"{seconds['plain loop'] / taken:>7.2f}" if name.startswith("pipeline") else ""
        print(f"{name:24}{taken:>9.2f}{args.images / taken:>10.1f}{ratio}")
    share = work / seconds["embedding"] / peak
    print(f"\nembedding: {work / args.images / 1e9:.2f} GFLOP an image, {share:.0%} of {peak / 1e9:,.0f} GFLOP/s")
    line = {"benchmark": "indexing", "model": args.model, "images": args.images, "seconds": seconds, "share": share,
            "peak": peak, "torch": torch.__version__, "machine": platform.machine()}  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
