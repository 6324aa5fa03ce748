"""Time of a hundred queries: as single commands, one after the other in one process, and at once.

    PYTHONPATH=. python benchmarks/bench_queries.py --model checkpoints/small

Images are noise drawn here, or those of `--archive`. A command starts Python, loads the network and opens the index; a
few of them are run, in turn with the file of all queries, and their mean is multiplied.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.search.archive_files import find_images
from ieft.search.index import ImageIndex

PLACES = ("storage tanks", "a river", "many planes", "a parking lot", "buildings", "a beach", "a road", "trees",
          "a harbour with boats", "houses")  # fmt: skip
AROUND = ("", " beside a road", " and trees", " near water", " in a desert", " with buildings", " beside a lawn",
          " in two rows", " in a residential area", " and many cars")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--archive", help="a folder of images or a list, instead of noise")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--single", type=int, default=6, help="single commands to run")
    args = parser.parse_args()
    model = IeftForImageTextRetrieval.from_pretrained(args.model)
    processor = IeftProcessor.from_pretrained(args.model)
    queries = [place + around for place in PLACES for around in AROUND]
    with tempfile.TemporaryDirectory() as folder:
        archive = args.archive or draw_noise(Path(folder, "archive"), args.images)
        index = ImageIndex(Path(folder, "index"), model, processor=processor, create=True)
        index.add(find_images(archive)[: args.images])
        index.optimize()
        seconds = measure_commands(args, folder, queries)
        seconds |= measure_python(index, queries)
        report(index, seconds, queries, args)


def draw_noise(folder, count):
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        pixels = noise.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(folder / f"{number:06}.png")
    return folder


def measure_commands(args, folder, queries):
    """Seconds of single commands, half of them before and half after the file of all queries, and of that file."""
    Path(folder, "queries.txt").write_text("\n".join(queries))
    half = args.single // 2
    first = [run(args, folder, query) for query in queries[:half]]
    many = run(args, folder, "--queries", f"{folder}/queries.txt", "--output", f"{folder}/hits.csv")
    second = [run(args, folder, query) for query in queries[-(args.single - half) :]]
    seconds = {"single commands": len(queries) * np.mean(first + second), "one command": many}
    print(
        json.dumps({"single": first + second, **seconds}), flush=True
    )  # what follows takes as long on a busy machine
    return seconds


def run(args, folder, *arguments):
    start = time.perf_counter()
    command = [sys.executable, "-m", "ieft.search.command", "query", *arguments]
    command += ["--model", args.model, "--index", f"{folder}/index"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_python(index, queries):
    index.search(queries[0])  # warm
    start = time.perf_counter()
    alone = [index.search(query) for query in queries]
    middle = time.perf_counter()
    together = list(index.search_many(queries))
    end = time.perf_counter()
    pairs = zip(alone, together, strict=True)
    same = np.mean([[hit["file"] for hit in one] == [hit["file"] for hit in other] for one, other in pairs])
    return {"one after the other": middle - start, "at once": end - middle, "same order": float(same)}


def report(index, seconds, queries, args):
    same = seconds.pop("same order")
    print(f"{len(index):,} images, {len(queries)} queries, {os.cpu_count()} cores, {args.single} single commands run")
    for name, spent in seconds.items():
        print(f"{name:22}{spent:9.1f} s")
    ratios = {
        "commands": seconds["single commands"] / seconds["one command"],
        "python": seconds["one after the other"] / seconds["at once"],
    }
    print(
        f"one command: {ratios['commands']:.1f} times faster than single ones; in Python {ratios['python']:.1f} times"
    )
    print(f"queries with the same hits in the same order: {100 * same:.0f}%")
    print(
        json.dumps({"benchmark": "queries", "images": len(index), "seconds": seconds, "times": ratios, "same": same})
    )


if __name__ == "__main__":
    main()
