"""Figures and tables of a run: a contact sheet of ranked results, training curves and a table of recalls."""

import textwrap
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# The sheet, in pixels: a column for the query, then the results.
WIDTH, MARGIN, GAP = 1200, 32, 14
QUERY_WIDTH, THUMB = 270, 160
RESULTS_LEFT = MARGIN + QUERY_WIDTH + GAP
LINE, FRAME = 24, 5
MAX_TOP_K = 10  # more do not fit side by side
INK, FAINT, RULE = (31, 35, 40), (101, 109, 118), (208, 213, 219)
GREEN, PALE_GREEN = (26, 127, 55), (221, 244, 228)


def ranked_sheet(scores, images, captions, caption_image, *, caption_text_id=None, num_queries=6, top_k=5):
    """A picture of what was found: captions with their best images, then images with their best captions.

    The queries stand at even distances through the data, whatever their results. Right results are green: those the
    query belongs to, and those that carry the same sentence. Equal scores stand in the order of the data.

    Args:
        scores: (I, C), image first, higher is better.
        images: a sequence of PIL images by row, or a function that gives one for a row; asked only for those shown.
        captions: C sentences.
        caption_image: (C,) row of the image each caption was written for.
        caption_text_id: (C,) equal for equal sentences; None where all sentences are distinct.
        num_queries: on the whole sheet, captions and images by turns.
        top_k: results for each query; fewer where there are fewer.

    Returns:
        PIL.Image.Image: RGB, 1200 wide, as high as its rows.

    Raises:
        ValueError: sizes that do not fit, no query, no result, or more results than fit the width.
    """
    scores, caption_image = np.asarray(scores), np.asarray(caption_image)
    text_id = np.arange(len(captions)) if caption_text_id is None else np.asarray(caption_text_id)
    _check_sheet(scores, images, captions, caption_image, text_id)
    if num_queries < 1 or not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"expected num_queries from 1, top_k from 1 to {MAX_TOP_K}; got {num_queries} and {top_k}.")
    picture = images if callable(images) else images.__getitem__
    places = (np.arange(num_queries) + 0.5) / num_queries
    asking_captions = np.unique((places[0::2] * len(captions)).astype(int))
    owners = np.unique(caption_image)
    asking_images = owners[np.unique((places[1::2] * len(owners)).astype(int))]

    strips = [_heading("Text to image", f"the best of {len(scores):,} images for a sentence")]
    for caption in asking_captions:
        right = caption_image[text_id == text_id[caption]]
        order = _best_first(scores[:, caption])
        strips.append(_caption_strip(captions[caption], picture, scores[:, caption], order, right, top_k))
    if len(asking_images):
        strips.append(_heading("Image to text", f"the best of {len(captions):,} sentences for an image"))
    for image in asking_images:
        right = np.flatnonzero(np.isin(text_id, text_id[caption_image == image]))
        order = _best_first(scores[image])
        strips.append(_image_strip(picture(int(image)), captions, scores[image], order, right, top_k))
    return _stack(strips)


def training_curves(log_history, path):
    """Draw the loss and, where the run was evaluated, the mean recalls against the step, as a PNG file.

    Args:
        log_history: `trainer.state.log_history`: dicts with `step` and, some, `loss` or `eval_..._mean_recall`.
        path: the file to write; one that is there is written over.
    """
    from matplotlib.figure import Figure

    logged = {name for entry in log_history for name in entry}
    recalls = sorted(name for name in logged if name.startswith("eval_") and name.endswith("mean_recall"))
    recalls.sort(key=lambda name: "dedup" in name)  # dashed, so drawn over the strict ones: the two often coincide
    # A Figure of its own, not pyplot: it draws with Agg, needs no screen and leaves the user's figures alone.
    figure = Figure(figsize=(10 if recalls else 5, 3.6), dpi=120, layout="constrained")
    loss_axes, *recall_axes = figure.subplots(1, 2 if recalls else 1, squeeze=False)[0]
    _draw_curves(loss_axes, log_history, ["loss"], "training loss")
    for axes in recall_axes:
        _draw_curves(axes, log_history, recalls, "mean recall on validation, %")
        axes.set_ylim(0, 101)
    figure.savefig(path, format="png")


def reliability_diagram(judged, path):
    """Draw how many pairs of each probability belong together, as a PNG file: on the diagonal, probabilities are true.

    Args:
        judged: as `ieft.evaluation.calibration.judge_probability` gives it.
        path: the file to write; one that is there is written over.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.6), dpi=120, layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    probability, share, pairs = ([each[name] for each in judged["bins"]] for name in ("probability", "share", "pairs"))
    axes.plot([0, 1], [0, 1], "--", color="#656d76", linewidth=1)
    axes.plot(probability, share, "-o", markersize=4)
    axes.set_title(f"expected calibration error {judged['ece']:.3f}", loc="left", fontsize=11)
    axes.set_ylabel("share that belongs together")
    axes.set_ylim(-0.02, 1.02)
    counts.bar(probability, pairs, width=0.04)
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.7)
    counts.set_ylabel("pairs")
    counts.set_xlabel("probability")
    counts.set_xlim(-0.02, 1.02)
    for each in (axes, counts):
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def recall_table(results):
    """The recalls as text: both directions, strict beside duplicate-aware, under 80 columns.

    Args:
        results: recalls in percent, named as `ieft.evaluation.metrics.retrieval_recalls` names them; and, as far as
        known, what
            the heading says: `dataset`, `num_images`, `num_captions`, `protocol`. With both numbers the last line is
            the strict mean recall of constant scores, "about" because it takes the captions as evenly spread.
    """
    words = {"dataset": "", "num_images": " images", "num_captions": " captions", "protocol": " protocol"}
    heading = ", ".join(f"{results[name]}{word}" for name, word in words.items() if name in results)
    lines = [*textwrap.wrap(heading, 79), ""] if heading else []
    lines.append(f"{'':16}{'strict':>24}   {'duplicate-aware':>24}")
    lines.append(f"{'':16}" + "   ".join(["     R@1     R@5    R@10"] * 2))
    for title, way in (("text to image", "ir"), ("image to text", "tr")):
        cells = ["".join(f"{results[f'{prefix}{way}_r{k}']:8.1f}" for k in (1, 5, 10)) for prefix in ("", "dedup_")]
        lines.append(f"{title:16}" + "   ".join(cells))
    lines.append(f"{'mean recall':16}{results['mean_recall']:24.1f}   {results['dedup_mean_recall']:24.1f}")
    if "num_images" in results and "num_captions" in results:
        lines.append(f"{'chance, about':16}{_chance(results['num_images'], results['num_captions']):24.1f}")
    return "\n".join(lines)


def two_stage_table(judged):
    """Two-stage retrieval as text, under 80 columns.

    Recalls at k are strict; the mean recall is given strict and duplicate-aware.

    Args:
        judged: as `ieft.evaluation.two_stage.compare_stages` gives it, with `rerank_top_k`, the recalls of the
            `exhaustive` matrix, and `embedder`, the name of one of another library.
    """
    fused = f"fused, weight {judged['similarity_weight']:g}"
    rows = {"shortlist": "shortlist", "re-ranked": "re_ranked", fused: "fused", "exhaustive": "exhaustive"}
    lines = [
        f"two stages, {judged['rerank_top_k']} candidates by embedding, re-ranked by the network", "",
        f"{'':18}{'text to image':>20}{'image to text':>21}{'mean recall':>20}",
        f"{'':18}" + "    R@1   R@5  R@10" + "     R@1   R@5  R@10" + f"{'strict':>9}{'dup.-aware':>12}",
    ]  # fmt: skip
    for title, name in rows.items():
        recalls = judged[name]
        cells = ["".join(f"{recalls[f'{way}_r{k}']:6.1f}" for k in (1, 5, 10)) for way in ("ir", "tr")]
        means = f"{recalls['mean_recall']:9.1f}{recalls['dedup_mean_recall']:12.1f}"
        lines.append(f"{title:19}{cells[0]}  {cells[1]}{means}")
    fewer = judged["pairs_exhaustive"] / judged["pairs"]
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in judged["seconds"].items())
    lines += [
        f"{'shortlist ceiling':19}{judged['ceiling_ir']:18.1f}{judged['ceiling_tr']:20.1f}",
        f"{judged['pairs']:,} of {judged['pairs_exhaustive']:,} pairs scored, {fewer:.1f} times fewer; {seconds}",
    ]
    lines += [f"shortlist by {judged['embedder']}"] if "embedder" in judged else []
    return "\n".join(lines)


def _check_sheet(scores, images, captions, caption_image, text_id):
    num_images = scores.shape[0] if callable(images) or scores.ndim != 2 else len(images)
    expected = (num_images, len(captions))
    if scores.shape != expected or 0 in expected:
        raise ValueError(f"scores: expected {expected}, images by captions, at least one of each; got {scores.shape}.")
    for name, values in (("caption_image", caption_image), ("caption_text_id", text_id)):
        if values.shape != (len(captions),):
            raise ValueError(f"{name}: expected one for each of the {len(captions)} captions, got {values.shape}.")
    if caption_image.min() < 0 or caption_image.max() >= num_images:
        found = f"{caption_image.min()} to {caption_image.max()}"
        raise ValueError(f"caption_image: expected rows from 0 to {num_images - 1}; got {found}.")


def _best_first(scores):
    return np.argsort(-scores.astype(np.float64), kind="stable")


def _heading(title, note):
    strip, pen = _blank(66)
    pen.text((MARGIN, 48), title, INK, _font(26, bold=True), anchor="ls")
    left = MARGIN + _font(26, bold=True).getlength(title) + GAP
    pen.text((left, 48), f"{note}; right ones are green", FAINT, _font(16), anchor="ls")
    pen.line([(MARGIN, 64), (WIDTH - MARGIN, 64)], RULE)
    return strip


def _caption_strip(caption, picture, scores, order, right, top_k):
    """One caption at the left, its best images beside it, each with its score below."""
    strip, pen = _blank(THUMB + 52)
    _write_caption(pen, caption, _found(order, right))
    best = order[:top_k]
    room = WIDTH - MARGIN - RESULTS_LEFT
    side = min(THUMB, (room - GAP * (top_k - 1)) // top_k)
    for place, image in enumerate(best):
        left, is_right = RESULTS_LEFT + place * (side + GAP), image in right
        _paste_thumb(strip, picture(int(image)), (left, GAP), side, is_right=is_right)
        label = (left + side // 2, GAP + side + 18)
        pen.text(label, f"{scores[image]:.2f}", GREEN if is_right else FAINT, _font(14, bold=is_right), anchor="ms")
    return strip


def _write_caption(pen, caption, note):
    lines = _wrap(caption, _font(17), QUERY_WIDTH, THUMB // LINE)
    for number, line in enumerate(lines):
        pen.text((MARGIN, GAP + 16 + number * LINE), line, INK, _font(17), anchor="ls")
    pen.text((MARGIN, GAP + THUMB + 18), note, FAINT, _font(14), anchor="ls")


def _image_strip(image, captions, scores, order, right, top_k):
    """One image at the left, its best captions beside it, a line each, with their scores."""
    best = order[:top_k]
    step = max(LINE + 4, (THUMB + 4) // top_k)
    strip, pen = _blank(max(THUMB + 52, step * len(best) + 2 * GAP))
    _paste_thumb(strip, image, (MARGIN, GAP), THUMB)
    pen.text((MARGIN, GAP + THUMB + 18), _found(order, right), FAINT, _font(14), anchor="ls")
    for place, caption in enumerate(best):
        _write_found_caption(strip, pen, captions[caption], scores[caption], GAP + place * step, caption in right)
    return strip


def _write_found_caption(strip, pen, caption, score, top, is_right):
    left = MARGIN + THUMB + 2 * GAP
    colour, base = (GREEN if is_right else INK), top + 19
    if is_right:
        pen.rounded_rectangle([left - 6, top, WIDTH - MARGIN, top + LINE + 2], 5, PALE_GREEN)
        strip.paste(_check_mark(18), (left, top + 4), _check_mark(18))
    pen.text((left + 86, base), f"{score:.2f}", colour if is_right else FAINT, _font(14, bold=is_right), anchor="rs")
    text_left = left + 102
    text = _cut(" ".join(caption.split()) or "(empty caption)", _font(17), WIDTH - MARGIN - 8 - text_left)
    pen.text((text_left, base), text, colour, _font(17), anchor="ls")


def _found(order, right):
    """Where the first right result stands, in words."""
    return f"right one at rank {np.isin(order, right).argmax() + 1:,}"


def _paste_thumb(strip, image, corner, side, *, is_right=False):
    """The middle square of an image, `side` wide, in a thin frame; a right result's is green, with a check mark."""
    left, top = corner
    strip.paste(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS), corner)
    pen = ImageDraw.Draw(strip)
    box = [left, top, left + side - 1, top + side - 1]
    if not is_right:
        pen.rectangle(box, outline=RULE, width=1)
        return
    pen.rectangle(box, outline=GREEN, width=FRAME)
    mark = _check_mark(min(30, side // 2))
    strip.paste(mark, (left + side - mark.width - 2, top + 2), mark)


@lru_cache(maxsize=8)
def _check_mark(side):
    """A white check on a green disc, RGBA; drawn large and reduced, because PIL's lines have hard edges."""
    big = 8 * side
    mark = Image.new("RGBA", (big, big), (*GREEN, 0))
    pen = ImageDraw.Draw(mark)
    pen.ellipse([0, 0, big - 1, big - 1], fill=GREEN)
    stroke = [(0.27 * big, 0.53 * big), (0.43 * big, 0.69 * big), (0.74 * big, 0.34 * big)]
    pen.line(stroke, fill="white", width=big // 9, joint="curve")
    return mark.resize((side, side), Image.Resampling.LANCZOS)


def _blank(height):
    strip = Image.new("RGB", (WIDTH, height), "white")
    return strip, ImageDraw.Draw(strip)


def _stack(strips):
    sheet, _ = _blank(sum(strip.height for strip in strips) + GAP)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


@lru_cache(maxsize=16)
def _font(size, *, bold=False):
    """DejaVu Sans, which matplotlib brings along: Latin, Greek and Cyrillic letters on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _wrap(text, font, width, max_lines):
    """Lines no wider than `width`; what does not fit ends in an ellipsis."""
    lines, words = [], text.split() or ["(empty", "caption)"]
    while words and len(lines) < max_lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_cut(" ".join(words[:count]), font, width))
        words = words[count:]
    return lines + [_cut(" ".join(words), font, width)] if words else lines


def _cut(text, font, width):
    """The text, or as much of it as fits before an ellipsis."""
    if font.getlength(text) <= width:
        return text
    length = bisect_left(range(1, len(text)), True, key=lambda n: font.getlength(text[:n] + "…") > width)
    return text[:length].rstrip() + "…"


def _draw_curves(axes, log_history, names, title):
    for name in names:
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        label = name.removeprefix("eval_").replace("dedup", "duplicate-aware").replace("_", " ")
        steps, values = np.array(points).reshape(-1, 2).T
        style = "--" if "dedup" in name else "-"
        axes.plot(steps, values, style, label=label, marker="o" if len(points) < 30 else None, markersize=3)
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _chance(num_images, num_captions):
    """Strict mean recall of constant scores, in percent, where every image has as many captions as the next."""
    each = num_captions / num_images
    recalls = []
    for k in (1, 5, 10):
        drawn = np.arange(min(k, num_captions))
        miss = np.prod(np.maximum(num_captions - each - drawn, 0) / (num_captions - drawn))
        recalls += [min(1, k / num_images), 1 - miss]
    return 100 * float(np.mean(recalls))
