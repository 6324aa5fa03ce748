"""Measures speed and accuracy of search in an archive of a million images.

    PYTHONPATH=. python benchmarks/bench_search.py --model outputs/demo

`--model` is a checkpoint with contrastive heads. Prints a table, then one JSON line. Embeddings are synthetic points
around 2,000 centres; the images for re-ranking are scenes, so that their scores are real but not their positions in
the index.

Exact search is dominated by reading every vector, 1 GB for a million of 256 numbers. The vector index reads the codes
of a few partitions and the full vectors of some dozens of candidates. Re-ranking is dominated by reading and scoring
images.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import torch

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.data.scenes import draw_scene
from ieft.search.index import METADATA, ImageIndex

CENTRES, SPREAD = 2000, 0.7
ROWS_AT_ONCE = 50_000
FILES = 64  # scenes, each shared by many rows
SHORTLIST = 32
FILTER = "width < 100"  # holds for a tenth of the rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index, files = create_index(folder, args.model)
        seconds = {"add": clock(lambda: add_vectors(index, files, args.vectors))}
        seconds["build"] = clock(index.optimize)
        megabytes = sum(path.stat().st_size for path in Path(folder, "index").rglob("*") if path.is_file()) / 1e6
        report(measure(index, args.queries), seconds, megabytes, args)


def create_index(folder, model, states=None):
    """An index, empty or, if it keeps states, of the files that its rows will name; and these files."""
    model, processor = (kind.from_pretrained(model) for kind in (IeftForImageTextRetrieval, IeftProcessor))
    files = [str(Path(folder, f"{number}.png")) for number in range(FILES)]
    for number, file in enumerate(files):
        draw_scene(0, number).image.save(file)
    index = ImageIndex(Path(folder, states or "index"), model, processor=processor, create=True, states=states)
    if states:
        index.add(files, progress=False)
    return index, files


def clock(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def draw_vectors(count, width, seed):
    """Unit vectors around centres that are the same for every seed: (count, width)."""
    centres = np.random.default_rng(0).normal(size=(CENTRES, width))
    draw = np.random.default_rng([1, seed])
    vectors = centres[draw.integers(CENTRES, size=count)] + SPREAD * draw.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def add_vectors(index, files, count, start=0):
    """Add rows `start` to `count`, with the states of their files if the index keeps states."""
    width = index.model.config.contrastive_dim
    states = index.table.search().limit(FILES).to_list() if index.states else []
    for first in range(start, count, ROWS_AT_ONCE):
        numbers = np.arange(first, min(count, first + ROWS_AT_ONCE))
        columns = {name: pa.nulls(len(numbers), kind) for name, kind in METADATA.items()}
        columns["file"] = pa.array([files[number % FILES] for number in numbers])
        columns["content"] = pa.array([str(number) for number in numbers])
        columns["tiling"] = pa.array([""] * len(numbers))
        columns["col"] = pa.array(numbers, pa.int32())  # tiles of a pixel, so that none overlap
        columns |= {name: pa.array(np.full(len(numbers), n), pa.int32())
                    for name, n in (("row", 0), ("tile_width", 1), ("tile_height", 1))}  # fmt: skip
        columns["width"] = pa.array(numbers % 1000, pa.int32())
        vectors = draw_vectors(len(numbers), width, first + 1).ravel()
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors), width)
        if index.states:
            columns["state"] = pa.array([states[number % FILES]["state"] for number in numbers])
        index.table.add(pa.table(columns, schema=index.table.schema))


def measure(index, count):
    """Milliseconds of each query for each kind of search, and the recall of the ten nearest by the shortlists."""
    queries = draw_vectors(count, index.model.config.contrastive_dim, 0)
    captions = [draw_scene(1, number).captions[0] for number in range(count)]
    milliseconds, recalls = {}, {}
    for name, where in (("", None), (", filtered", FILTER)):
        milliseconds[f"every vector{name}"], exact = timed(lambda q, w=where: compare_all(index, q, w), queries)
        _, found = timed(lambda q, w=where: index.shortlist(q, SHORTLIST, where=w), queries)
        recalls[f"ten nearest in a shortlist of {SHORTLIST}{name}"] = np.mean(
            [overlap(a, b) for a, b in zip(exact, found, strict=True)]
        )
        milliseconds[f"text, shortlist only{name}"], _ = timed(
            lambda caption, w=where: index.search(caption, rerank_top_k=0, top_k=SHORTLIST, where=w), captions
        )
    rerank = {"rerank_top_k": SHORTLIST}
    milliseconds[f"text, {SHORTLIST} re-ranked"], found = timed(lambda c: index.search(c, **rerank), captions)
    for stage in ("embed", "shortlist", "re-rank"):
        milliseconds[f"    of these, {stage}"] = [1000 * hits.seconds[stage] for hits in found]
    return milliseconds, recalls


def compare_all(index, vector, where):
    query = index.table.search(vector, vector_column_name="vector").distance_type("dot").bypass_vector_index()
    query = query.select(["content", "_distance"]).limit(10)
    return (query.where(where, prefilter=True) if where else query).to_list()


def timed(search, queries):
    search(queries[0])  # warm
    times, hits = [], []
    for query in queries:
        start = time.perf_counter()
        hits.append(search(query))
        times.append(1000 * (time.perf_counter() - start))
    return times, hits


def overlap(exact, found):
    return len({hit["content"] for hit in exact} & {hit["content"] for hit in found}) / len(exact)


def report(measured, seconds, megabytes, args):
    milliseconds, recalls = measured
    print(f"{args.vectors:,} vectors, {args.queries} queries, {os.cpu_count()} cores")
    print(f"added in {seconds['add']:.0f} s, indexed in {seconds['build']:.0f} s, {megabytes:,.0f} MB\n")
    print(f"{'milliseconds':34}{'p50':>8}{'p99':>8}")
    percentiles = {name: np.percentile(times, (50, 99)).tolist() for name, times in milliseconds.items()}
    for name, (median, slowest) in percentiles.items():
        print(f"{name:34}{median:>8.1f}{slowest:>8.1f}")
    print("\n" + "\n".join(f"{name}: {recall:.3f}" for name, recall in recalls.items()))
    saved = args.vectors // SHORTLIST
    print(f"pairs scored for a sentence: {SHORTLIST}, of {args.vectors:,}: {saved:,} times fewer")
    recalls = {name: float(recall) for name, recall in recalls.items()}
    line = {
        "benchmark": "search",
        "vectors": args.vectors,
        "seconds": seconds,
        "megabytes": megabytes,
        "pairs_saved": saved,
    }
    versions = {"lancedb": lancedb.__version__, "torch": torch.__version__, "device": platform.machine()}
    print(json.dumps(line | {"milliseconds_p50_p99": percentiles} | recalls | versions))


if __name__ == "__main__":
    main()
