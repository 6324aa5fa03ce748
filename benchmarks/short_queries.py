"""Class names as queries: how well a checkpoint finds images for the short queries that people type.

    export PYTHONPATH=.
    python benchmarks/short_queries.py outputs/ucm --classes ucm --dataset_name ucm --data_dir UCM
    python benchmarks/short_queries.py checkpoints/small --classes rsicd --dataset_name rsicd --data_dir RSICD
    python benchmarks/short_queries.py outputs/demo --classes phrases --dataset_name scenes

Prints precision at 10 and mean average precision in percent, over the class names as queries, for three ways to rank:
by embedding alone, its nearest re-ranked, and every pair. An image is right if it is of the class: in UCM Merced Land
Use 100 images in a row are of one class, numbered from 1; in RSICD a file is named after its class, and files that are
not are left out. Of a dataset without classes, queries are the phrases of its captions (`ieft.training.phrases`) that
stand with ten images to a quarter of all; an image is right if a caption of it has the phrase. With several
checkpoints (seeds), their mean and standard deviation follow; then one JSON line.
"""

import argparse
import json
import re
from collections import Counter

import numpy as np

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.evaluation.metrics import average_precision, precision_at
from ieft.evaluation.ranking import score_matrix
from ieft.evaluation.two_stage import embed_and_compare, nearest
from ieft.training.items import SplitImages, tokenize
from ieft.training.phrases import find_phrases
from prepare_datasets import load_and_check

CLASSES = {
    "ucm": (
        "agricultural", "airplane", "baseball diamond", "beach", "buildings", "chaparral", "dense residential",
        "forest", "freeway", "golf course", "harbor", "intersection", "medium residential", "mobile home park",
        "overpass", "parking lot", "river", "runway", "sparse residential", "storage tanks", "tennis court",
    ),
    "rsicd": (
        "airport", "bare land", "baseball field", "beach", "bridge", "center", "church", "commercial",
        "dense residential", "desert", "farmland", "forest", "industrial", "meadow", "medium residential", "mountain",
        "park", "parking", "playground", "pond", "port", "railway station", "resort", "river", "school",
        "sparse residential", "square", "stadium", "storage tanks", "viaduct",
    ),
}  # fmt: skip
IMAGES_OF_A_CLASS = 100  # of UCM, one after another
FEWEST_IMAGES = 10  # of a phrase


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders or Hub ids; several are taken as seeds of one recipe")
    parser.add_argument(
        "--classes", required=True, choices=(*CLASSES, "phrases"), help="whose class names, and how files tell them"
    )
    parser.add_argument("--dataset_name", required=True, help="as for run_retrieval.py")
    parser.add_argument("--data_dir")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--on_bad_rows", default="stop", choices=("stop", "skip"))
    parser.add_argument("--rerank_top_k", type=int, default=32)
    args = parser.parse_args()
    split, names, relevant = load_queries(args)
    measured = [judge(checkpoint, split, names, relevant, args.rerank_top_k) for checkpoint in args.checkpoints]
    kind = "phrases" if args.classes == "phrases" else "class names"
    print(f"{len(names)} {kind} as queries, {len(split)} images of {args.dataset_name} {args.split}")
    print(f"chance: precision at 10 and average precision about {100 * relevant.mean():.1f}\n")
    print(f"{'ranked by':<28}{'precision at 10':>20}{'mean average precision':>28}")
    for way in measured[0]:
        cells = [show([each[way][name] for each in measured]) for name in ("precision_at_10", "map")]
        print(f"{way:<28}{cells[0]:>20}{cells[1]:>28}")
    names_of_args = ("checkpoints", "classes", "dataset_name", "split", "rerank_top_k")
    print("\n" + json.dumps({name: getattr(args, name) for name in names_of_args} | {"measured": measured}))


def load_queries(args):
    """A split, of which those images are left that have a class; the queries; which images are right, (Q, I)."""
    splits, _ = load_and_check(args.dataset_name, args.data_dir, on_bad_rows=args.on_bad_rows)
    split = splits[args.split]
    if args.classes == "phrases":
        of_images = [set().union(*map(find_phrases, captions)) for captions in split["captions"]]
        counts = Counter(phrase for phrases in of_images for phrase in phrases)
        names = sorted(name for name, count in counts.items() if FEWEST_IMAGES <= count <= len(split) / 4)
        return split, names, np.array([[name in phrases for phrases in of_images] for name in names])
    classes = np.array([class_of(name, args.classes) for name in split["filename"]])
    if (classes < 0).all():
        raise SystemExit(f"No file of {args.dataset_name} is named as those of {args.classes} are.")
    split, classes = split.select(np.flatnonzero(classes >= 0)), classes[classes >= 0]
    found = np.unique(classes)
    return split, [CLASSES[args.classes][number] for number in found], classes == found[:, None]


def class_of(filename, classes):
    """The place of a file's class among the names, or -1."""
    stem = filename.rpartition("/")[2].rpartition(".")[0]
    if classes == "ucm":
        number = int(stem) if stem.isdecimal() else 0
        return (number - 1) // IMAGES_OF_A_CLASS if 0 < number <= IMAGES_OF_A_CLASS * len(CLASSES["ucm"]) else -1
    of_files = [name.replace(" ", "") for name in CLASSES["rsicd"]]
    prefix = re.match(r"[a-z]*", stem.lower())[0]
    return of_files.index(prefix) if prefix in of_files else -1


def judge(checkpoint, split, names, relevant, top_k):
    """Precision at 10 and mean average precision in percent, by way of ranking."""
    model, processor = (kind.from_pretrained(checkpoint) for kind in (IeftForImageTextRetrieval, IeftProcessor))
    images, queries = SplitImages(split, processor), tokenize(names, processor)
    scores = score_matrix(model, images, queries, progress=False).T  # (Q, I)
    ways = {"every pair": scores}
    if model.config.contrastive_dim:
        similarity = embed_and_compare(model, images, queries).T
        behind = similarity - (similarity.max() - scores.min() + 1)  # below every score of a shortlist
        re_ranked = np.where(nearest(similarity, top_k), scores, behind)
        ways = {"embedding alone": similarity, f"{top_k} candidates re-ranked": re_ranked} | ways
    return {
        way: {
            "precision_at_10": 100 * float(np.mean(precision_at(10, ranked, relevant))),
            "map": 100 * float(np.mean(average_precision(ranked, relevant))),
        }
        for way, ranked in ways.items()
    }


def show(values):
    """Mean and, of several, standard deviation."""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


if __name__ == "__main__":
    main()
