"""Measures how the cost of a query, and of the index, grows with the archive.

    PYTHONPATH=. python benchmarks/bench_growth.py --model checkpoints/small --figure docs/growth.png

The same index grows from one size to the next; vectors are synthetic (see bench_search.py), images for re-ranking are
scenes, which many rows share. Prints a table, then one JSON line; `--figure` draws it.
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
STAGES = {"shortlist": "shortlist", "re-rank": f"{SHORTLIST} re-ranked from files"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--figure", help="a PNG file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index, files = create_index(folder, args.model)
        found = [grow(index, files, size, args.queries) for size in args.sizes]
    report(found)
    if args.figure:
        draw(found, args.figure)


def grow(index, files, size, count):
    """Seconds and bytes of an index that is enlarged to `size` rows."""
    seconds = {"adding": clock(lambda: add_vectors(index, files, size, start=len(index)))}
    seconds["optimizing"] = clock(index.optimize)
    assert len(index) == size
    captions = [draw_scene(1, number).captions[0] for number in range(count)]
    _, hits = timed(lambda caption: index.search(caption, rerank_top_k=SHORTLIST), captions)
    queries = draw_vectors(count, index.model.config.contrastive_dim, 0)
    names, _ = timed(lambda number: look_up(index.table, [f"{number}/{n}.png" for n in range(64)]), range(count))
    exact, _ = timed(lambda query: index.table.search(query).bypass_vector_index().limit(10).to_list(), queries)
    milliseconds = {name: 1000 * np.median([found.seconds[stage] for found in hits]) for stage, name in STAGES.items()}
    milliseconds |= {"every vector compared": np.median(exact), "64 names looked up": np.median(names)}
    of_index = Path(index.uri)
    size_of = sum(path.stat().st_size for path in of_index.rglob("*") if path.is_file())
    return {"rows": size, "bytes a row": size_of / size, "seconds": seconds, "milliseconds": milliseconds}


def report(found):
    names = list(found[0]["milliseconds"])
    print(f"{os.cpu_count()} cores; medians in milliseconds\n")
    print(f"{'rows':>10}{'kB a row':>10}{'added, s':>10}{'indexed, s':>11}" + "".join(f"{name:>28}" for name in names))
    for of_size in found:
        of_names = "".join(f"{of_size['milliseconds'][name]:>28.1f}" for name in names)
        adding, optimizing = of_size["seconds"].values()
        print(
            f"{of_size['rows']:>10,}{of_size['bytes a row'] / 1e3:>10.2f}{adding:>10.1f}{optimizing:>11.1f}{of_names}"
        )
    print(json.dumps({"benchmark": "growth", "found": found}))


def draw(found, file):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    rows = [of_size["rows"] for of_size in found]
    for name in found[0]["milliseconds"]:
        axes.plot(rows, [of_size["milliseconds"][name] for of_size in found], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="images or tiles in the index", ylabel="milliseconds (median)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
