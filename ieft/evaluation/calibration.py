"""Probabilities from matching scores: fitted on validation data, and judged on other data.

The probability is that a sentence is an annotation of an image, for a pair that a search shows: a sentence, and one of
its ten best among the 32 images that are nearest by embedding and re-ranked. It is a logistic function of the score
whose two parameters maximise the likelihood (Platt, "Probabilistic Outputs for Support Vector Machines", 1999). It is
judged by the expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
"""

from dataclasses import dataclass

import numpy as np

from ieft.evaluation.ranking import score_pairs
from ieft.evaluation.two_stage import embed_and_compare

CANDIDATES, SHOWN = 32, 10  # re-ranked, and of these the best: defaults of `ieft.search.index.ImageIndex.search`
MOST_SENTENCES = 1000  # to fit on: two parameters need no more
BINS = 15
STEPS = 100


@dataclass
class ShownPairs:
    """The pairs that a search for each of S sentences shows, the best first.

    Attributes:
        scores: (S, K) by the network.
        belongs: (S, K) True where the sentence is an annotation of the image, also if it was written for another one.
    """

    scores: np.ndarray
    belongs: np.ndarray


def shown_pairs(model, evaluation_set, *, scores=None, most_sentences=None, seed=0, **options):
    """The pairs that a search for each sentence of a set shows. A sentence of several images is asked once.

    Args:
        scores: (I, C) of all pairs, where they are known; None scores those that are needed.
        most_sentences: a random part of the sentences, drawn by `seed`, where there are more.
        options: as `ieft.evaluation.ranking.score_pairs`.
    """
    text_ids, columns = np.unique(evaluation_set.caption_text_id, return_index=True)
    carries = np.zeros((len(evaluation_set.images), len(text_ids)), dtype=bool)
    carries[evaluation_set.caption_image, np.searchsorted(text_ids, evaluation_set.caption_text_id)] = True
    asked = np.arange(len(columns))
    if most_sentences is not None and len(columns) > most_sentences:
        asked = np.sort(np.random.default_rng(seed).choice(len(columns), most_sentences, replace=False))
    tokens = [evaluation_set.caption_tokens[column] for column in columns[asked]]
    similarity = embed_and_compare(model, evaluation_set.images, tokens)
    images = np.argsort(-similarity.T, axis=1, kind="stable")[:, :CANDIDATES]  # (S, 32)
    if scores is None:
        pairs = np.stack([images, np.broadcast_to(np.arange(len(asked))[:, None], images.shape)], axis=-1)
        of_pairs = score_pairs(model, evaluation_set.images, tokens, pairs.reshape(-1, 2), **options)
        of_pairs = of_pairs.reshape(images.shape)
    else:
        of_pairs = np.asarray(scores)[images, columns[asked, None]]
    best = np.argsort(-of_pairs, axis=1, kind="stable")[:, :SHOWN]  # (S, 10)
    images = np.take_along_axis(images, best, axis=1)
    return ShownPairs(np.take_along_axis(of_pairs, best, axis=1), carries[images, asked[:, None]])


def fit_probability(scores, belongs):
    """Scale and offset of the logistic function of the scores that makes the labels most likely, by Newton's method.

    The labels are moved from 0 and 1 as Platt proposes, so that scores which separate them have a solution too.

    Args:
        scores, belongs: arrays of one shape.

    Returns:
        (scale, offset) | None: None if a higher score does not make belonging more likely, or if all labels are equal.
    """
    scores, belongs = np.ravel(scores).astype(np.float64), np.ravel(belongs).astype(bool)
    right, wrong = int(belongs.sum()), int((~belongs).sum())
    spread = scores.std() if len(scores) else 0.0
    if not right or not wrong or not spread:
        return None
    centre = scores.mean()
    inputs = np.stack([(scores - centre) / spread, np.ones_like(scores)], axis=1)  # well-conditioned
    targets = np.where(belongs, (right + 1) / (right + 2), 1 / (wrong + 2))
    weights = np.array([0.0, np.log((right + 1) / (wrong + 1))])
    loss = _log_loss(inputs @ weights, targets)
    for _ in range(STEPS):
        probability = logistic(inputs @ weights)
        gradient = inputs.T @ (probability - targets)
        curvature = (inputs * (probability * (1 - probability))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while (new := _log_loss(inputs @ (weights - size * step), targets)) > loss and size > 1e-8:
            size /= 2
        if loss - new <= 1e-12 * abs(loss):
            break
        weights, loss = weights - size * step, new
    scale = float(weights[0] / spread)
    return (scale, float(weights[1] - scale * centre)) if scale > 0 else None


def logistic(values):
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(values, dtype=np.float64)))


def _log_loss(logits, targets):
    return float(np.sum(np.logaddexp(0.0, logits) - targets * logits))


def reliability_bins(probability, belongs, bins=BINS):
    """Pairs by equal steps of probability.

    Args:
        probability, belongs: arrays of one shape.

    Returns:
        list: for each bin that holds a pair `{"pairs": count, "probability": mean, "share": that belongs}`.
    """
    probability, belongs = np.ravel(probability).astype(np.float64), np.ravel(belongs).astype(bool)
    number = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        {
            "pairs": int(some.sum()),
            "probability": float(probability[some].mean()),
            "share": float(belongs[some].mean()),
        }
        for some in (number == each for each in np.unique(number))
    ]


def expected_calibration_error(bins):
    """The mean distance of probability and share, each bin weighted by its pairs; from 0 to 1."""
    pairs = sum(each["pairs"] for each in bins)
    return sum(each["pairs"] * abs(each["probability"] - each["share"]) for each in bins) / pairs


def judge_probability(pairs, scale, offset):
    """How true the probabilities of `ShownPairs` are.

    Returns:
        dict: numbers of `sentences` and `pairs`, the `share` of pairs that belong together, the expected calibration
        error `ece` of all pairs and `ece_of_best` of the best pair of each sentence; the mean squared error (Brier
        score) `brier`, and `brier_of_share` of the share as the probability of all; and the `bins` of all pairs.
    """
    probability = logistic(scale * pairs.scores.astype(np.float64) + offset)  # (S, K)
    bins = reliability_bins(probability, pairs.belongs)
    share = float(pairs.belongs.mean())
    return {
        "sentences": len(probability),
        "pairs": probability.size,
        "share": share,
        "ece": expected_calibration_error(bins),
        "ece_of_best": expected_calibration_error(reliability_bins(probability[:, 0], pairs.belongs[:, 0])),
        "brier": float(np.mean((probability - pairs.belongs) ** 2)),
        "brier_of_share": share * (1 - share),
        "bins": bins,
    }
