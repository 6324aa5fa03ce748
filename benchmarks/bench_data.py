"""Measures how long a collection of RSICD's size takes to prepare, and to open again.

    python benchmarks/bench_data.py

Prints a table, then one JSON line. Images are noise over a gradient, saved as 224 x 224 JPEG files of about the same
size as RSICD's.

Cost is dominated by decoding every image once, about a millisecond on one core, to find truncated files. The second
call reads only the annotations and the modification time and size of each file.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from prepare_datasets import load_retrieval_dataset, save_parquet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10921)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_collection(folder / "data", args.images, args.size)
        seconds = {}
        for call in ("first call", "second call"):
            start = time.perf_counter()
            splits = load_retrieval_dataset(folder / "data", num_proc=args.num_proc, cache_dir=str(folder / "cache"))
            seconds[f"{call}, splits"] = time.perf_counter() - start
            written = save_parquet(splits, folder / "parquet", title="benchmark")
            seconds[f"{call}, with parquet"] = time.perf_counter() - start
            assert sum(map(len, splits.values())) == args.images and written == (call == "first call")
        megabytes = sum(path.stat().st_size for path in folder.glob("parquet/data/*")) / 1e6
    report(seconds, megabytes, args)


def write_collection(folder, count, size):
    """`count` JPEG images with five captions each, in the distributed format."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    slope = np.linspace(60, 190, size)[:, None, None]
    entries = []
    for number in range(count):
        pixels = slope + generator.normal(0, 12, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.jpg", quality=80)
        split = ("train", "train", "train", "train", "train", "train", "train", "train", "val", "test")[number % 10]
        sentences = [{"raw": f"field {number} seen for the {look}. time ."} for look in range(5)]
        entries.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))


def report(seconds, megabytes, args):
    """Print the table, then one JSON line."""
    print(f"{args.images:,} images of {args.size} x {args.size}, {megabytes:.0f} MB, {args.num_proc} at once\n")
    for name, value in seconds.items():
        print(f"{name:28}{value:8.1f} s")
    measured = {"benchmark": "data", "images": args.images, "size": args.size, "megabytes": round(megabytes)}
    versions = {"datasets": datasets.__version__, "python": platform.python_version(), "num_proc": args.num_proc}
    print("\n" + json.dumps(measured | {"seconds": seconds} | versions))


if __name__ == "__main__":
    main()
