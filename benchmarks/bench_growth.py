"""Measures how the cost of a query, and of the index, grows with the archive.

    PYTHONPATH=. python benchmarks/bench_growth.py --model checkpoints/small --states pq16 --figure docs/growth.png

The same index grows from one size to the next, and with `--states` another beside it that keeps features; vectors are
synthetic (see bench_search.py), images for re-ranking are scenes, which many rows share (and their features, so that
the bytes of these say nothing and are not measured). Prints a table, then one JSON
line; `--figure` draws it.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from bench_search import SHORTLIST, add_vectors, clock, create_index, draw_vectors, timed

from ieft.data.scenes import draw_scene
from ieft.search.ingestion import look_up

SIZES = [10**3, 10**4, 10**5, 10**6]
FROM_FILES, FROM_FEATURES = f"{SHORTLIST} re-ranked from files", "from features"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--states", help="features that a second index keeps, such as pq16")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--figure", help="a PNG file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        indexes = [
            create_index(folder, args.model, states)[0] for states in (None, args.states)[: 1 + bool(args.states)]
        ]
        files = sorted(map(str, Path(folder).glob("*.png")))
        found = [grow(indexes, files, size, args.queries) for size in args.sizes]
    report(found)
    if args.figure:
        draw(found, args.figure)


def grow(indexes, files, size, count):
    """Seconds and bytes of an index that is enlarged to `size` rows, and of re-ranking in one that keeps features."""
    index = indexes[0]
    seconds = {"adding": clock(lambda: add_vectors(index, files, size, start=len(index)))}
    seconds["optimizing"] = clock(index.optimize)
    assert len(index) == size
    captions = [draw_scene(1, number).captions[0] for number in range(count)]
    _, hits = timed(lambda caption: index.search(caption, rerank_top_k=SHORTLIST), captions)
    queries = draw_vectors(count, index.model.config.contrastive_dim, 0)
    names, _ = timed(lambda number: look_up(index.table, [f"{number}/{n}.png" for n in range(64)]), range(count))
    exact, _ = timed(lambda query: index.table.search(query).bypass_vector_index().limit(10).to_list(), queries)
    milliseconds = {"shortlist": middle(hits, "shortlist"), FROM_FILES: middle(hits, "re-rank")}
    bytes_a_row = {"index": size_of(index) / size}
    for other in indexes[1:]:
        add_vectors(other, files, size, start=len(other))
        other.optimize()
        _, hits = timed(lambda caption: other.search(caption, rerank_top_k=SHORTLIST), captions)  # noqa: B023
        milliseconds[FROM_FEATURES] = middle(hits, "re-rank")
    milliseconds |= {"every vector compared": np.median(exact), "64 names looked up": np.median(names)}
    return {"rows": size, "bytes a row": bytes_a_row, "seconds": seconds, "milliseconds": milliseconds}


def middle(hits, stage):
    """Median milliseconds of a stage."""
    return 1000 * float(np.median([found.seconds[stage] for found in hits]))


def size_of(index):
    return sum(path.stat().st_size for path in Path(index.uri).rglob("*") if path.is_file())


def report(found):
    names = list(found[0]["milliseconds"])
    print(f"{os.cpu_count()} cores; medians in milliseconds; kB a row of {', '.join(found[0]['bytes a row'])}\n")
    print(f"{'rows':>10}{'kB a row':>14}{'added, s':>10}{'indexed, s':>11}" + "".join(f"{name:>28}" for name in names))
    for of_size in found:
        of_names = "".join(f"{of_size['milliseconds'][name]:>28.1f}" for name in names)
        adding, optimizing = of_size["seconds"].values()
        kilobytes = ", ".join(f"{count / 1e3:.2f}" for count in of_size["bytes a row"].values())
        print(f"{of_size['rows']:>10,}{kilobytes:>14}{adding:>10.1f}{optimizing:>11.1f}{of_names}")
    print(json.dumps({"benchmark": "growth", "found": found}))


def draw(found, file):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = [of_size["rows"] for of_size in found]
    for axes, part, title, unit in zip(
        panels, ("milliseconds", "bytes a row"), ("milliseconds (median)", "bytes"), (1, np.array(rows)), strict=True
    ):
        for name in found[0][part]:
            axes.plot(rows, np.array([of_size[part][name] for of_size in found]) * unit, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="images or tiles in the index", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
