"""Scores of images and captions by the cross-encoder: the whole matrix, or chosen pairs.

In: a model, images as tensors by row, captions as token ids; none of them is known here by more than its few methods.
Out: float32 scores, image first, higher is better.

What is exact and saves time: equal captions are scored once; each image and each caption is embedded and projected
for block 0 once; captions of one length are batched together, so that none is padded; the last block runs for the one
token that the score reads. Batches hang on the captions alone, so that any number of processes gives the same bits.
"""

from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

TOKENS_AT_ONCE = 2048  # of images and captions together; small enough to stay in a CPU's cache
TOKENS_AT_ONCE_ON_GPU = 65536


def score_matrix(model, images, captions, *, tokens_at_once=None, dtype=None, progress=True):
    """Score every image with every caption.

    Under `torch.distributed` the images are shared out over the processes, and each gets the whole matrix.

    Args:
        images: I tensors (3, image_size, image_size) by row, read one at a time.
        captions: C lists of token ids, not padded.
        tokens_at_once: tokens in one forward pass; None chooses by device.
        dtype: torch.bfloat16 or torch.float16 for autocast; None computes in the model's own type.
        progress: show a bar in pairs.

    Returns:
        ndarray: (I, C) float32.
    """
    distinct, column_of = _distinct(captions)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scores = np.zeros((len(images), len(distinct)), dtype=np.float32)
    bar = tqdm(total=scores.size, desc="Ranking", unit=" pairs", disable=not progress or rank > 0)
    with _inference(model, dtype), bar:
        batches = _caption_batches(model, distinct, tokens_at_once) if len(images) else []
        for row in range(rank, len(images), processes):
            image = model.prepare_images(images[row][None].to(model.device))
            for columns, prepared in batches:
                scores[row, columns] = model.score_prepared(prepared, image).float().cpu().numpy()
            bar.update(processes * len(distinct))
    if processes > 1:
        scores = _sum_over_processes(scores, model.device)
    return scores[:, column_of]


def score_pairs(model, images, captions, pairs, *, tokens_at_once=None, dtype=None, progress=True):
    """Score chosen pairs, for re-ranking a shortlist.

    Args:
        pairs: (N, 2) rows of images and captions.

    Returns:
        ndarray: (N,) float32, equal to the same entries of `score_matrix`.
    """
    pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    scores = np.empty(len(pairs), dtype=np.float32)
    with tqdm(total=len(pairs), desc="Re-ranking", unit=" pairs", disable=not progress) as bar:
        for row in np.unique(pairs[:, 0]):
            of_image = np.flatnonzero(pairs[:, 0] == row)
            wanted = [captions[column] for column in pairs[of_image, 1]]
            options = {"tokens_at_once": tokens_at_once, "dtype": dtype, "progress": False}
            scores[of_image] = score_matrix(model, [images[int(row)]], wanted, **options)[0]
            bar.update(len(of_image))
    return scores


def _distinct(captions):
    """Captions without repeats, and the place of each one among them."""
    places = {}
    column_of = [places.setdefault(tuple(caption), len(places)) for caption in captions]
    return list(places), np.array(column_of, dtype=np.int64)


def _caption_batches(model, captions, tokens_at_once):
    """Columns and prepared captions, of one length in each batch, the longest first: memory peaks at the start."""
    if tokens_at_once is None:
        tokens_at_once = TOKENS_AT_ONCE if model.device.type == "cpu" else TOKENS_AT_ONCE_ON_GPU
    by_length = {}
    for column, caption in enumerate(captions):
        by_length.setdefault(len(caption), []).append(column)
    batches = []
    for length, columns in sorted(by_length.items(), reverse=True):
        size = max(1, tokens_at_once // (length + model.config.num_patches + 1))
        for start in range(0, len(columns), size):
            chosen = columns[start : start + size]
            input_ids = torch.tensor([captions[column] for column in chosen], device=model.device)
            batches.append((chosen, model.prepare_captions(input_ids)))
    return batches


def _sum_over_processes(scores, device):
    """Rows that another process computed are 0 here: their sum is the matrix, without rounding."""
    total = torch.from_numpy(scores).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


@contextmanager
def _inference(model, dtype):
    """Evaluation mode without gradients, in a chosen type; the model is left as it was found."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        model.train(was_training)
