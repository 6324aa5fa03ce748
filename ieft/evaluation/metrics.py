"""Recall at k of image-text retrieval, strict and duplicate-aware, in percent, from a image-by-caption score matrix.

A query counts as a hit at k if any relevant item is among the k best. Ranks are counted, not sorted. Tied scores count
by the exact expectation over all orders of the tie, so that a model that scores everything alike gets chance level.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

RANKS = (1, 5, 10)


def retrieval_recalls(
    scores: ArrayLike, caption_image: ArrayLike, caption_text_id: ArrayLike | None = None
) -> dict[str, float]:
    """Recalls both ways (evaluation as in Tang et al., IEEE TGRS 2023).

    Args:
        scores: (I, C) finite numbers, higher is better.
        caption_image: (C,) integers in 0..I-1, the image each caption was written for.
        caption_text_id: (C,) equal for equal sentences; None where every sentence stands once.

    Returns:
        dict: percent in 0..100 under `ir_r1 ir_r5 ir_r10` (text to image), `tr_r1 tr_r5 tr_r10` (image to text) and
        `mean_recall` (of the six), where a caption is right for the image it was written for alone; and the same under
        `dedup_`, where a sentence is right for every image that carries the same sentence. Images without a caption
        are candidates, but not queries.

    Raises:
        ValueError: for shapes that do not fit, owners out of range, no caption at all, or scores that are not numbers.
    """
    matrix, owners, text_ids = _checked(scores, caption_image, caption_text_id)
    num_images, num_captions = matrix.shape
    own = np.zeros((num_images, num_captions), dtype=bool)
    own[owners, np.arange(num_captions)] = True
    carries = np.zeros((num_images, text_ids.max() + 1), dtype=bool)
    carries[owners, text_ids] = True
    strict = _recalls_both_ways(matrix, own)
    duplicate_aware = _recalls_both_ways(matrix, carries[:, text_ids])
    return strict | {f"dedup_{name}": value for name, value in duplicate_aware.items()}


def keep_unique_captions(captions_per_image: Iterable[Iterable[str]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Flatten a list of captions for each image; a sentence repeated on one image is kept once, where it came first.

    Sentences are equal if they are the same letters, blanks around them aside.

    Returns:
        captions (C sentences), caption_image (C,) the image of each, caption_text_id (C,) equal for equal sentences.

    Raises:
        ValueError: where the captions of an image are one string, which would be taken letter by letter.
    """
    captions: list[str] = []
    caption_image: list[int] = []
    ids: dict[str, int] = {}
    for image, sentences in enumerate(captions_per_image):
        if isinstance(sentences, str):
            raise ValueError(
                f"A list of sentences expected for each image; image {image} has a string: {sentences!r}."
            )
        unique = dict.fromkeys(sentence.strip() for sentence in sentences)
        captions += unique
        caption_image += [image] * len(unique)
    text_ids = [ids.setdefault(caption, len(ids)) for caption in captions]
    return captions, np.array(caption_image, dtype=np.int64), np.array(text_ids, dtype=np.int64)


def expected_hits(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each query the probability that a right item is among the k best, ties in random order.

    With b items above the best right one, and t items at its score of which r are right, the chance that none of the r
    falls on the k - b places left is C(t - r, k - b) / C(t, k - b).

    Args:
        scores: (Q, N).
        right: (Q, N) booleans; every query has at least one.

    Returns:
        (3, Q) in 0..1, for k = 1, 5, 10.
    """
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    above = (scores > best).sum(axis=1)
    tied = scores == best
    num_tied, num_right = tied.sum(axis=1), (tied & right).sum(axis=1)
    hits = np.empty((len(RANKS), len(scores)))
    for row, k in enumerate(RANKS):
        places = np.clip(k - above, 0, num_tied)
        miss = np.ones(len(scores))
        for place in range(int(places.max(initial=0))):  # at most 10: one place filled after another, by wrong items
            wrong_left = np.maximum(num_tied - num_right - place, 0)
            miss *= np.where(place < places, wrong_left / np.maximum(num_tied - place, 1), 1.0)
        hits[row] = 1.0 - miss
    return hits


def precision_at(k: int, scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The share of right items among the `k` best of each query, in 0..1; equal scores in the order of the items.

    Args:
        scores, right: (Q, N), right items as booleans.

    Returns:
        (Q,)
    """
    return _best_first(scores, right)[:, :k].mean(axis=1)


def average_precision(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The mean, over the right items of each query, of the precision down to that item, in 0..1: its mean over queries
    is the mean average precision (Manning et al., Introduction to Information Retrieval, 2008, 8.4).

    Args:
        scores, right: (Q, N), right items as booleans, at least one for each query; equal scores in the order of the
            items.

    Returns:
        (Q,)
    """
    ranked = _best_first(scores, right)
    precisions = ranked.cumsum(axis=1) / np.arange(1, ranked.shape[1] + 1)
    return (precisions * ranked).sum(axis=1) / ranked.sum(axis=1)


def _best_first(scores, right):
    return np.take_along_axis(right, np.argsort(-np.asarray(scores, np.float64), axis=1, kind="stable"), axis=1)


def _recalls_both_ways(scores, right):
    recalls = {}
    for name, way_scores, way_right in (("ir", scores.T, right.T), ("tr", scores, right)):
        queries = way_right.any(axis=1)
        means = expected_hits(way_scores[queries], way_right[queries]).mean(axis=1) * 100
        recalls |= {f"{name}_r{k}": float(mean) for k, mean in zip(RANKS, means, strict=True)}
    return recalls | {"mean_recall": float(np.mean(list(recalls.values())))}


def _checked(scores, caption_image, caption_text_id):
    scores, caption_image = np.asarray(scores), np.asarray(caption_image)
    caption_text_id = np.arange(len(caption_image)) if caption_text_id is None else np.asarray(caption_text_id)
    if scores.ndim != 2 or caption_image.shape != scores.shape[1:] or caption_text_id.shape != scores.shape[1:]:
        raise ValueError(
            "Scores (images, captions) and one owner and one text id for each caption expected; got scores "
            f"{scores.shape}, caption_image {caption_image.shape}, caption_text_id {caption_text_id.shape}."
        )
    if not len(caption_image):
        raise ValueError("At least one caption expected; got none, so there is nothing to rank.")
    if caption_image.min() < 0 or caption_image.max() >= len(scores):
        raise ValueError(
            f"caption_image must hold rows of the {len(scores)} images; got {caption_image.min()} to "
            f"{caption_image.max()}."
        )
    if np.isnan(scores).any():
        raise ValueError(f"Scores must be numbers; {np.isnan(scores).sum()} of {scores.size} are NaN.")
    return scores, caption_image, np.unique(caption_text_id, return_inverse=True)[1]
