"""Evaluation of two-stage retrieval in both directions: a shortlist by embedding, re-ranked by the cross-encoder.

Reported are the recall of the shortlist (upper bound), the recalls after re-ranking, the number of pairs scored and
the time. `ieft.search.index` does the same over an archive. Two-stage retrieval: Miech et al., "Thinking Fast and
Slow: Efficient Text-to-Visual Retrieval with Transformers", CVPR 2021. A candidate's score is the matching score plus
the similarity of the embeddings, as the contrastive loss scales it, times a weight chosen on validation data.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from ieft.evaluation.metrics import retrieval_recalls
from ieft.evaluation.ranking import score_pairs
from ranking_ieft import evaluation_mode

SIMILARITY_WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
IMAGES_AT_ONCE = 64
CAPTIONS_AT_ONCE = 256


@dataclass
class Shortlists:
    """The candidates of each query, and their scores by the network.

    Attributes:
        similarity: (I, C) of embeddings, as the contrastive loss scales it.
        of_captions: (I, C) True where the image is on the caption's shortlist; `of_images` where the caption is on the
            image's.
        scores: (I, C) by the network, 0 where it was not asked.
        pairs: how many it was asked for.
        seconds: of embedding and of re-ranking.
    """

    similarity: np.ndarray
    of_captions: np.ndarray
    of_images: np.ndarray
    scores: np.ndarray
    pairs: int
    seconds: dict


def make_shortlists(model, evaluation_set, top_k, *, embedder=None, **options):
    """Embed a set, keep the `top_k` nearest of each query both ways, and score those pairs once.

    Args:
        embedder: an `ieft.evaluation.embedders.Embedder` instead of the model's contrastive heads.
        options: as `ieft.evaluation.ranking.score_pairs`.
    """
    start = time.perf_counter()
    if embedder is None:
        similarity = embed_and_compare(model, evaluation_set.images, evaluation_set.caption_tokens)
    else:
        images = map(evaluation_set.images.image, range(len(evaluation_set.images)))
        similarity = embedder.compare(images, evaluation_set.captions)
    of_captions, of_images = nearest(similarity.T, top_k).T, nearest(similarity, top_k)
    embedded = time.perf_counter()
    pairs = np.argwhere(of_captions | of_images)
    scores = np.zeros_like(similarity)
    scores[tuple(pairs.T)] = score_pairs(model, evaluation_set.images, evaluation_set.caption_tokens, pairs, **options)
    seconds = {"embedding": embedded - start, "re-ranking": time.perf_counter() - embedded}
    return Shortlists(similarity, of_captions, of_images, scores, len(pairs), seconds)


@torch.no_grad()
def embed_and_compare(model, images, caption_tokens):
    """Scaled similarity of every image with every caption, each read once alone: (I, C) float32."""
    with evaluation_mode(model):
        image_features = _embed_images(model, images)
        text_features = _embed_captions(model, caption_tokens)
    similarity = model.similarity_scale() * image_features @ text_features.T  # (I, C)
    return similarity.cpu().numpy()


def _embed_images(model, images):
    """(I, E) float32."""
    features = []
    for first in range(0, len(images), IMAGES_AT_ONCE):
        rows = range(first, min(first + IMAGES_AT_ONCE, len(images)))
        features.append(model.get_image_features(torch.stack([images[row] for row in rows]).to(model.device)))
    return torch.cat(features).float()


def _embed_captions(model, tokens):
    """(C, E) float32."""
    features = torch.empty(len(tokens), model.config.contrastive_dim, device=model.device)
    lengths = np.array([len(caption) for caption in tokens])
    for length in np.unique(lengths):  # captions of one length together, so that none is padded
        alike = np.flatnonzero(lengths == length)
        for some in np.split(alike, range(CAPTIONS_AT_ONCE, len(alike), CAPTIONS_AT_ONCE)):
            ids = torch.tensor([tokens[row] for row in some], device=model.device)
            features[torch.from_numpy(some)] = model.get_text_features(ids).float()
    return features


def nearest(similarity, top_k):
    """True at the `top_k` largest of each row, the first of equal ones."""
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :top_k]
    chosen = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def two_stage_recalls(shortlists, evaluation_set, *, similarity_weight=0.0):
    """Recalls, named as `retrieval_recalls` names them, where every query ranks its shortlist first, by the network's
    score plus `similarity_weight` times the similarity, and all others behind it, by similarity."""
    similarity = shortlists.similarity
    fused = shortlists.scores + similarity_weight * similarity
    behind = similarity - (similarity.max() - fused.min() + 1)  # below every score of a shortlist
    owners = (evaluation_set.caption_image, evaluation_set.caption_text_id)
    by_captions = retrieval_recalls(np.where(shortlists.of_captions, fused, behind), *owners)
    by_images = retrieval_recalls(np.where(shortlists.of_images, fused, behind), *owners)
    return _both_ways(by_captions, by_images)


def _both_ways(by_captions, by_images):
    """Text to image of the one, image to text of the other, and their means."""
    recalls = {name: (by_images if "tr_" in name else by_captions)[name] for name in by_captions}
    for prefix in ("", "dedup_"):
        six = [recalls[f"{prefix}{way}_r{k}"] for way in ("ir", "tr") for k in (1, 5, 10)]
        recalls[f"{prefix}mean_recall"] = float(np.mean(six))
    return recalls


def shortlist_ceiling(shortlists, evaluation_set):
    """Percent of captions, and of images, with a right item on their shortlist: no re-ranking can find more."""
    own = np.zeros(shortlists.of_captions.shape, dtype=bool)
    own[evaluation_set.caption_image, np.arange(own.shape[1])] = True
    asking = own.any(axis=1)
    return {
        "ceiling_ir": 100 * float((own & shortlists.of_captions).any(axis=0).mean()),
        "ceiling_tr": 100 * float((own & shortlists.of_images).any(axis=1)[asking].mean()),
    }


def choose_similarity_weight(shortlists, evaluation_set):
    """Of `SIMILARITY_WEIGHTS` the one with the best duplicate-aware mean recall on validation data; the smallest of
    equal ones. Where sentences are repeated, strict recalls depend mostly on the order of equal sentences."""
    recalls = [
        two_stage_recalls(shortlists, evaluation_set, similarity_weight=weight)["dedup_mean_recall"]
        for weight in SIMILARITY_WEIGHTS
    ]
    return SIMILARITY_WEIGHTS[int(np.argmax(recalls))]


def compare_stages(shortlists, evaluation_set, *, similarity_weight):
    """The shortlist alone, re-ranked, and fused.

    Returns:
        dict: recalls under `shortlist`, `re_ranked` and `fused`; `similarity_weight`; the shortlist's ceilings in
        percent; `pairs` that the network scored, and `pairs_exhaustive`; `seconds` of each stage.
    """
    owners = (evaluation_set.caption_image, evaluation_set.caption_text_id)
    return {
        "shortlist": retrieval_recalls(shortlists.similarity, *owners),
        "re_ranked": two_stage_recalls(shortlists, evaluation_set),
        "fused": two_stage_recalls(shortlists, evaluation_set, similarity_weight=similarity_weight),
        "similarity_weight": similarity_weight,
        **shortlist_ceiling(shortlists, evaluation_set),
        "pairs": shortlists.pairs,
        "pairs_exhaustive": shortlists.similarity.size,
        "seconds": shortlists.seconds,
    }
