"""A one-page report on a collection: its contents, its faults, and the highest recalls that it allows.

The facts are a dict, shown as text, PNG or JSON. Statistics of captions cover every row, those of images the rows
whose image can be read.
"""

import io
import json
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from ieft.data.images import describe_image, read_image
from ieft.data.invalid_examples import check_captions

SPLITS = ("train", "validation", "test")
RANKS = (1, 5, 10)  # of recall at k
COLOURS = {"train": "#57606a", "validation": "#bf8700", "test": "#0969da"}
HASH_SIDE = 16  # dHash of 16 x 16 bits
ALIKE_BITS = 16  # of 256; unrelated images differ in about half of the bits
COMPARED_AT_ONCE = 256
SHOWN = 5


def measure_collection(rows, bad_rows, *, bands=None, num_proc=None):
    """The facts of a collection.

    Args:
        rows: dicts of `filename`, `split`, `captions` and `image` (path, bytes or None), as distributed.
        bad_rows: the invalid examples that `ieft.data.invalid_examples.usable_rows` found in them.

    Returns:
        dict: `splits`, by name, each with counts, number of `words` of each caption, `ceiling` (`recall_ceiling`
        with a sentence counted once per image, as in `ieft.evaluation.metrics`) and `ceiling_with_repeats` (every
        caption counted);
        `shared_sentences` and `near_duplicates` between splits; counts of `sizes`, `modes` and `bad_rows`.
    """
    captions = [check_captions(row["captions"])[0] for row in rows]
    with ThreadPoolExecutor(num_proc or os.cpu_count()) as pool:
        looks = list(pool.map(lambda row: look_at(row["image"], bands=bands), rows))
    names = [name for name in SPLITS if any(row["split"] == name for row in rows)]
    members = {name: [number for number, row in enumerate(rows) if row["split"] == name] for name in names}
    splits = {name: _measure_split([captions[number] for number in members[name]]) for name in names}
    for name in names:
        splits[name]["readable_images"] = sum(looks[number] is not None for number in members[name])
    seen = [each for each in looks if each]
    return {
        "splits": splits,
        "shared_sentences": _shared_sentences(captions, members),
        "near_duplicates": _near_duplicates(rows, looks, members),
        "sizes": dict(Counter(f"{width} x {height}" for width, height, _, _ in seen).most_common()),
        "modes": dict(Counter(mode for _, _, mode, _ in seen).most_common()),
        "bad_rows": dict(Counter(bad.reason.split(":")[0] for bad in bad_rows).most_common()),
    }


def look_at(image, *, bands=None):
    """Width, height, mode and perceptual hash of an image, or None if it cannot be read."""
    try:
        return None if image is None else (*describe_image(image), hash_image(read_image(image, bands=bands)))
    except (OSError, ValueError):
        return None


def hash_image(picture):
    """dHash (Krawetz 2013): whether each of 16 x 16 cells is brighter than its left neighbour, as 4 x 64 bits."""
    grey = picture.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(grey)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).view(np.uint64)


def recall_ceiling(captions_per_image):
    """Strict text-to-image recalls that no ranking can exceed, in percent, for k = 1, 5, 10.

    A sentence is one query for each of its captions, but has a single ranking: at best, the captions of k of its
    images are retrieved.
    """
    copies = defaultdict(Counter)
    for image, captions in enumerate(captions_per_image):
        for sentence in captions:
            copies[sentence][image] += 1
    most_first = [sorted(each.values(), reverse=True) for each in copies.values()]
    total = max(1, sum(map(sum, most_first)))
    return {k: 100 * sum(sum(each[:k]) for each in most_first) / total for k in RANKS}


def _measure_split(captions_per_image):
    sentences = [sentence for captions in captions_per_image for sentence in captions]
    carriers = Counter(sentence for captions in captions_per_image for sentence in set(captions))
    return {
        "images": len(captions_per_image),
        "captions": len(sentences),
        "distinct_sentences": len(carriers),
        "on_several_images": sum(carriers[sentence] > 1 for sentence in sentences),
        "repeated_on_one_image": len(sentences) - sum(carriers.values()),
        "ceiling": recall_ceiling([set(captions) for captions in captions_per_image]),
        "ceiling_with_repeats": recall_ceiling(captions_per_image),
        "words": [len(sentence.split()) for sentence in sentences],
    }


def _shared_sentences(captions, members):
    """For each pair of splits, the distinct sentences in both, and the number of their captions in the second."""
    sentences = {name: [each for row in rows for each in captions[row]] for name, rows in members.items()}
    shared = []
    for first, second in _pairs(members):
        both = set(sentences[first]) & set(sentences[second])
        count = sum(each in both for each in sentences[second])
        shared.append({"splits": [first, second], "sentences": len(both), "captions": count, "all": sorted(both)})
    return shared


def _near_duplicates(rows, looks, members):
    """Pairs of images in different splits whose hashes differ in few bits, the most similar first."""
    found = []
    for first, second in _pairs(members):
        ours, theirs = ([row for row in members[name] if looks[row]] for name in (first, second))
        if not ours or not theirs:
            continue
        hashes = np.stack([looks[row][3] for row in ours])  # (N, 4)
        others = np.stack([looks[row][3] for row in theirs])
        for start in range(0, len(others), COMPARED_AT_ONCE):
            part = others[start : start + COMPARED_AT_ONCE]
            bits = np.bitwise_count(part[:, None] ^ hashes).sum(axis=2)  # (M, N)
            for other, own in zip(*np.nonzero(bits <= ALIKE_BITS), strict=True):
                images = [rows[ours[own]]["filename"], rows[theirs[start + other]]["filename"]]
                found.append({"splits": [first, second], "images": images, "bits": int(bits[other, own]),
                              "rows": [ours[own], theirs[start + other]]})  # fmt: skip
    return sorted(found, key=lambda pair: (pair["bits"], pair["rows"]))


def _pairs(names):
    names = list(names)
    return [(first, second) for place, first in enumerate(names) for second in names[place + 1 :]]


# The report ----------------------------------------------------------------------------------------------------------


def write_report(title, rows, facts):
    """The files of a report as name -> content: `report.txt`, `report.png` and, with every sentence and pair,
    `report.json`."""
    picture = io.BytesIO()
    report_figure(title, rows, facts).savefig(picture, dpi=110, format="png")
    return {
        "report.txt": f"{report_text(title, facts)}\n".encode(),
        "report.json": f"{json.dumps(facts, indent=2)}\n".encode(),
        "report.png": picture.getvalue(),
    }


def report_text(title, facts):
    """The facts as text."""
    splits = facts["splits"]

    def line(label, value):
        return f"{label:42}" + "".join(f"{value(each):>14}" for each in splits.values())

    def count(name):
        return lambda each: f"{each[name]:,}"

    lines = [title, "", f"{'':42}" + "".join(f"{name:>14}" for name in splits)]
    lines += [line("images listed", count("images")), line("images that can be read", count("readable_images"))]
    lines += [line("captions that can be used", count("captions"))]
    lines += [line("words per caption: min, median, max", lambda each: _spread(each["words"]))]
    lines += [line("distinct sentences", count("distinct_sentences"))]
    lines += [line("captions that other images also have", count("on_several_images"))]
    lines += [line("captions repeated on their own image", count("repeated_on_one_image"))]
    for k in RANKS:
        label = f"text-to-image R@{k} cannot exceed (strict)"
        lines.append(line(label, lambda each, k=k: f"{each['ceiling'][k]:.1f}"))
    label = "  R@1 with repeats on one image counted"
    lines.append(line(label, lambda each: f"{each['ceiling_with_repeats'][1]:.1f}"))
    lines += ["", *_between_splits(facts), ""]
    for label, name in (("Image sizes", "sizes"), ("Image modes", "modes"), ("Invalid examples", "bad_rows")):
        lines.append(f"{label}: {_listed(facts[name])}")
    return "\n".join(lines)


def _spread(words):
    return f"{min(words)}, {np.median(words):.0f}, {max(words)}" if words else "-"


def _between_splits(facts):
    lines = []
    for shared in facts["shared_sentences"]:
        first, second = shared["splits"]
        total = max(1, facts["splits"][second]["captions"])
        lines.append(
            f"Sentences in both {first} and {second}: {shared['sentences']:,}, which are {shared['captions']:,} "
            f"captions of {second} ({100 * shared['captions'] / total:.1f}%)."
        )
        near = [pair for pair in facts["near_duplicates"] if pair["splits"] == [first, second]]
        images = len({pair["images"][1] for pair in near})
        lines.append(f"Images of {second} that are near duplicates of one of {first}: {images:,}.")
        lines += [f"  {pair['images'][1]} like {pair['images'][0]}" for pair in near[:SHOWN]]
    return lines


def _listed(counts):
    shown = [f"{count:,} x {name}" for name, count in list(counts.items())[:SHOWN]]
    more = sum(list(counts.values())[SHOWN:])
    return ", ".join([*shown, *([f"{more:,} x other"] if more else [])]) or "none"


def report_figure(title, rows, facts):
    """The report as a matplotlib figure: counts, lengths, ceilings, sentences, sizes and near duplicates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.5), layout="constrained", facecolor="white")
    images = sum(each["images"] for each in facts["splits"].values())
    captions = sum(each["captions"] for each in facts["splits"].values())
    figure.suptitle(
        f"{title}: {images:,} images, {captions:,} captions", fontsize=17, weight="bold", x=0.01, ha="left"
    )
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 0.8 if facts["near_duplicates"] else 0.1))
    _draw_sizes(figure.add_subplot(grid[0, 0]), facts)
    _draw_words(figure.add_subplot(grid[0, 1]), facts)
    _draw_ceilings(figure.add_subplot(grid[0, 2]), facts)
    _draw_sentences(figure.add_subplot(grid[1, 0]), facts)
    _draw_counts(figure.add_subplot(grid[1, 1]), facts["sizes"], "Image sizes, in pixels", "#57606a")
    modes = {f"mode {name}": count for name, count in facts["modes"].items()}
    _draw_counts(figure.add_subplot(grid[1, 2]), modes | facts["bad_rows"], "Image modes, invalid examples", "#cf222e")
    _draw_pairs(figure, grid[2, :], rows, facts["near_duplicates"])
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_sizes(axes, facts):
    splits = facts["splits"]
    axes.barh(list(splits), [each["images"] for each in splits.values()], color="#d0d7de", label="named")
    colours = [COLOURS[name] for name in splits]
    bars = axes.barh(list(splits), [each["readable_images"] for each in splits.values()], color=colours, height=0.45)
    labels = [f" {each['readable_images']:,} of {each['images']:,} readable" for each in splits.values()]
    axes.bar_label(bars, labels, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_title("Images", loc="left")


def _draw_words(axes, facts):
    longest = max((max(each["words"], default=0) for each in facts["splits"].values()), default=0)
    edges = np.arange(0.5, min(longest, 40) + 1.5)
    for name, each in facts["splits"].items():
        shares = np.full(len(each["words"]), 100 / max(1, len(each["words"])))
        words = np.minimum(each["words"], 40)
        axes.hist(words, edges, weights=shares, histtype="step", color=COLOURS[name], label=name, linewidth=1.6)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("Words per caption, % of captions" + (" (40: or more)" if longest > 40 else ""), loc="left")


def _draw_ceilings(axes, facts):
    width = 0.8 / len(facts["splits"])
    for place, (name, each) in enumerate(facts["splits"].items()):
        heights = [each["ceiling"][k] for k in RANKS]
        bars = axes.bar(np.arange(3) + (place + 0.5) * width - 0.4, heights, width * 0.94, color=COLOURS[name])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(3), [f"R@{k}" for k in RANKS])
    axes.set_ylim(0, 112)
    axes.set_title("Highest strict image R@k, %", loc="left")


def _draw_sentences(axes, facts):
    labels, shares, colours = [], [], []
    for name, each in facts["splits"].items():
        labels.append(f"{name}: on several images")
        shares.append(100 * each["on_several_images"] / max(1, each["captions"]))
        colours.append(COLOURS[name])
    for shared in facts["shared_sentences"]:
        first, second = shared["splits"]
        labels.append(f"{second}: also in {first}")
        shares.append(100 * shared["captions"] / max(1, facts["splits"][second]["captions"]))
        colours.append(COLOURS[second])
    axes.bar_label(axes.barh(labels, shares, color=colours, height=0.6), fmt=" %.1f", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title("Repeated sentences, % of captions", loc="left")


def _draw_counts(axes, counts, title, colour):
    axes.set_title(title, loc="left")
    if not counts:
        axes.text(0, 0.5, "no image can be read", transform=axes.transAxes, color="#57606a")
        axes.set_axis_off()
        return
    shown = dict(list(counts.items())[:8])
    colours = ["#57606a" if name.startswith("mode ") else colour for name in shown]
    axes.bar_label(axes.barh(list(shown), list(shown.values()), color=colours, height=0.6), fmt=" {:,.0f}", fontsize=9)
    axes.set_ylim(max(len(shown), 5) - 0.5, -0.5)
    axes.margins(x=0.2)


def _draw_pairs(figure, place, rows, pairs):
    """The nearest duplicates in different splits, side by side."""
    slots = place.subgridspec(1, 10, wspace=0.05)
    heading = f"Near duplicates in different splits: {len(pairs):,} pairs" + (", the nearest:" if pairs else "")
    whole = figure.add_subplot(place)
    whole.set_axis_off()
    whole.set_title(heading, loc="left")
    for number in range(10):
        if number // 2 < len(pairs):
            axes = figure.add_subplot(slots[0, number])
            axes.set_axis_off()
            pair, side = pairs[number // 2], number % 2
            axes.imshow(read_image(rows[pair["rows"][side]]["image"]).resize((160, 160)))
            label = f"{pair['splits'][side]}\n{pair['images'][side][-20:]}"
            axes.text(0, 1, label, transform=axes.transAxes, fontsize=7, va="top", backgroundcolor="#ffffffc0")
