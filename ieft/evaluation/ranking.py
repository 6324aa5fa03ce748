"""Scores of images and captions by the cross-encoder: the whole matrix, or chosen pairs.

Nothing is computed twice: equal captions are scored once, each image and caption is encoded and projected for the
fusion layer once, captions of one length are batched together without padding, and on a CPU the network runs with
oneDNN-prepacked weights, which are kept for the next query. The work is cut into tiles of whole images with their
captions. A tile's batches depend only on the images and captions that are ranked, so that any number of processes, and
a run that was killed and restarted, give the same scores bit for bit.

The model needs four methods: `prepare_images`, `prepare_captions`, `score_prepared` and, with fusion in the last block
only, `score_groups`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from ieft.cpu.prepacked import can_prepack, forget, memory_kept, multiplies_bfloat16, prepack_once
from ranking_ieft import check_finite, evaluation_mode

logger = logging.getLogger(__name__)

BATCH_TOKENS = 2048  # of pairs read at once, captions and images together: small enough for a CPU's cache
BATCH_TOKENS_ON_GPU = 65536
TILE_PAIRS = 4096  # minutes of a CPU's work
TILE_PAIRS_ON_GPU = 32768
TILE_IMAGES = 32  # bounds the memory that pixels take
FEWEST_TILES = 64  # where there are as many images, so that processes get equal shares
CAPTIONS_AT_ONCE = 64  # prepared together
KEPT_CAPTION_TOKENS = 65536  # prepared once and kept, about 0.8 GB; beyond, captions are prepared tile by tile
NOT_IN_FINGERPRINT = (
    "architectures", "auto_map", "custom_pipelines", "transformers_version", "calibration_scale", "calibration_offset",
)  # fmt: skip


def score_matrix(
    model: Any, images: Sequence, captions: Sequence[Sequence[int]], *, dtype: torch.dtype | None = None,
    batch_tokens: int | None = None, num_workers: int = 0, progress: bool = True,
    score_cache: str | os.PathLike | None = None,
) -> np.ndarray:  # fmt: skip
    """Score every image with every caption.

    Under `torch.distributed` the images are shared out over the processes, and each gets the whole matrix.

    Args:
        images: I tensors by row, (3, image_size, image_size), or (1+P, D) as the model's `read_images` gave them; read
            one tile at a time.
        captions: C lists of token ids, special tokens included, not padded.
        dtype: torch.bfloat16 or torch.float16 for the matrix products, sums and layer norms staying in float32; None
            computes in the model's own type, and so does bfloat16 on a CPU that has no instructions for it.
        batch_tokens: tokens read at once, captions and images together; None chooses by device.
        num_workers: processes that read images ahead.
        progress: show a bar in pairs, on the main process.
        score_cache: a folder that keeps the scores of each finished tile; a run that was interrupted goes on from
            there. Scores of other weights, images, captions or settings are never taken.

    Returns:
        ndarray: (I, C) float32.

    Raises:
        ValueError: for a caption without tokens, and for scores that are not finite.
    """
    distinct, column_of = _distinct(captions)
    width = len(distinct)
    starts = np.arange(len(images) + 1) * width
    options = {"dtype": dtype, "batch_tokens": batch_tokens, "num_workers": num_workers, "score_cache": score_cache}
    scores = _score(
        model, images, distinct, starts, partial(_pairs_of_matrix, width=width), progress and "Ranking", **options
    )
    return scores.reshape(len(images), width)[:, column_of]


def score_pairs(
    model: Any, images: Sequence, captions: Sequence[Sequence[int]], pairs: ArrayLike, *,
    dtype: torch.dtype | None = None, batch_tokens: int | None = None, num_workers: int = 0, progress: bool = True,
    score_cache: str | os.PathLike | None = None,
) -> np.ndarray:  # fmt: skip
    """Score chosen pairs, for re-ranking shortlists; options and sharing as `score_matrix`.

    Args:
        pairs: (N, 2) rows of images and of captions, in any order; a repeated pair is scored once.

    Returns:
        ndarray: (N,) float32, equal to those entries of `score_matrix` but for rounding.

    Raises:
        ValueError: for pairs of another shape or of rows that do not exist.
    """
    checked = _check_pairs(pairs, len(images), len(captions))
    used, columns = np.unique(checked[:, 1], return_inverse=True)
    distinct, column_of = _distinct([captions[column] for column in used])
    rows_and_columns = np.stack([checked[:, 0], column_of[columns]], axis=1)
    unique, place = np.unique(rows_and_columns, axis=0, return_inverse=True)  # sorted by image
    starts = np.append(np.flatnonzero(np.diff(unique[:, 0], prepend=-1)), len(unique))
    options = {"dtype": dtype, "batch_tokens": batch_tokens, "num_workers": num_workers, "score_cache": score_cache}
    scores = _score(
        model, images, distinct, starts, lambda start, stop: unique[start:stop].T, progress and "Re-ranking", **options
    )
    return scores[place.reshape(-1)]


def _distinct(captions):
    """Captions without repeats, and the place of each one among them."""
    places = {}
    column_of = [places.setdefault(tuple(int(token) for token in caption), len(places)) for caption in captions]
    if () in places:
        raise ValueError(
            f"Captions of at least one token expected; caption {column_of.index(places[()])} is empty. Tokenize with "
            "the processor, which adds special tokens."
        )
    return list(places), np.array(column_of, dtype=np.int64)


def _check_pairs(pairs, num_images, num_captions):
    pairs = np.asarray(pairs, dtype=np.int64)
    if pairs.size == 0:
        return pairs.reshape(0, 2)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs of shape (N, 2) expected, rows of images and captions; got {pairs.shape}.")
    if pairs.min() < 0 or (pairs.max(axis=0) >= (num_images, num_captions)).any():
        raise ValueError(
            f"pairs of rows below {num_images} (images) and {num_captions} (captions) expected; got rows from "
            f"{pairs.min(axis=0).tolist()} to {pairs.max(axis=0).tolist()}."
        )
    return pairs


def _pairs_of_matrix(start, stop, width):
    """Rows and columns of a stretch of the flattened matrix."""
    return np.divmod(np.arange(start, stop), width)


def _score(model, images, captions, starts, pairs_of, title, *, dtype, batch_tokens, num_workers, score_cache):
    """Scores of all pairs, in their order.

    Args:
        captions: distinct tuples of token ids.
        starts: where the pairs of each image begin among all pairs, and their number.
        pairs_of: start, stop -> rows of images (rising) and columns of captions, of those pairs.
        title: of the progress bar, or False.

    Returns:
        ndarray: (N,) float32.
    """
    dtype = supported_dtype(model, dtype)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scores = np.zeros(starts[-1], dtype=np.float32)
    on_gpu = model.device.type != "cpu"
    batch_tokens = batch_tokens or (BATCH_TOKENS_ON_GPU if on_gpu else BATCH_TOKENS)
    tiles = _cut_tiles(starts, TILE_PAIRS_ON_GPU if on_gpu else TILE_PAIRS)
    mine = tiles[rank::processes]
    bar = tqdm(total=len(scores), desc=title or None, unit=" pairs", disable=not title or rank > 0)
    with inference_network(model, dtype) as network, bar:
        cache = score_cache and _ScoreCache(score_cache, model, [str(dtype), batch_tokens, network is model])
        loader = _read_images(images, [np.unique(pairs_of(*tile)[0]) for tile in mine], num_workers)
        prepared_captions = _PreparedCaptions(network, captions)
        for number, ((start, stop), pixels) in enumerate(zip(mine, loader, strict=True)):
            rows, columns = pairs_of(start, stop)
            rows = np.unique(rows, return_inverse=True)[1].reshape(-1)  # within this tile
            compute = partial(_score_tile, network, pixels, prepared_captions, rows, columns, batch_tokens)
            key = cache and cache.key(pixels, rows, [captions[column] for column in columns])
            scores[start:stop] = cache.get_or_compute(key, stop - start, compute) if cache else compute()
            everyones = tiles[number * processes : (number + 1) * processes]
            bar.update(int(everyones[-1][1] - everyones[0][0]))
    return _sum_over_processes(scores, model.device) if processes > 1 else scores


def supported_dtype(model, dtype):
    """The type asked for, but float32 on a CPU that has no instructions for bfloat16."""
    if dtype == torch.bfloat16 and model.device.type == "cpu" and not multiplies_bfloat16():
        logger.warning("This CPU has no instructions for bfloat16, which would take longer: ranking in float32.")
        return None
    return dtype


def _cut_tiles(starts, tile_pairs):
    """Stretches of pairs, whole images each: [(start, stop)]; the same for any number of processes."""
    num_images = len(starts) - 1
    most_images = max(1, min(TILE_IMAGES, num_images // FEWEST_TILES))
    tiles, first = [], 0
    while first < num_images and starts[-1]:
        last = int(np.searchsorted(starts, starts[first] + tile_pairs, side="right")) - 1
        last = min(max(last, first + 1), first + most_images, num_images)
        tiles.append((int(starts[first]), int(starts[last])))
        first = last
    return tiles


def _read_images(images, rows_of_tiles, num_workers):
    """Pixels of each tile's images (I, 3, H, W), or their states (I, 1+P, D)."""
    batches = [rows.tolist() for rows in rows_of_tiles]
    return DataLoader(images, batch_sampler=batches, num_workers=num_workers) if batches else []


def _score_tile(model, pixels, captions, rows, columns, batch_tokens):
    """Scores of a tile's pairs; `rows` are those of `pixels`, which may be states."""
    pixels = pixels.to(model.device)
    images = model.prepare_images(pixels) if pixels.dim() == 4 else model.prepare_images(image_states=pixels)
    scores = torch.full((len(rows),), torch.nan, device=model.device)  # a pair left out would show
    score_batches = _score_groups if model.config.joins_last else _score_alike
    for places, of_places in score_batches(model, images, captions, rows, columns, batch_tokens):
        scores[torch.from_numpy(places).to(model.device)] = of_places.float()
    check_finite(scores, "matching scores")
    return scores.cpu().numpy()


def _score_alike(model, images, captions, rows, columns, batch_tokens):
    """Batches of pairs whose captions have one length: their places and scores, each (B,)."""
    lengths = captions.lengths[columns]
    for length in np.unique(lengths)[::-1]:  # the longest first: memory peaks at the start
        alike = np.flatnonzero(lengths == length)
        size = max(1, batch_tokens // (int(length) + images.hidden.shape[1]))
        for batch in np.array_split(alike, -(-len(alike) // size)):
            of_images = rows[batch]
            same_image = of_images[0] == of_images[-1]  # they rise
            chosen = images.take(torch.from_numpy(of_images[:1] if same_image else of_images))
            yield batch, model.score_prepared(captions.take(columns[batch]), chosen)


def _score_groups(model, images, captions, rows, columns, batch_tokens):
    """Images with as many pairs each, where one token of a pair is computed: places and scores, each (I, M)."""
    for batch in _cut_groups(rows, batch_tokens):
        chosen = images.take(torch.from_numpy(rows[batch[:, 0]]))
        yield batch, model.score_groups(captions.take_any(columns[batch]), chosen)


def _cut_groups(rows, batch_pairs):
    """Pairs with rising `rows` of images, as grids (I, M) of their places: I images with M pairs each."""
    _, starts, counts = np.unique(rows, return_index=True, return_counts=True)
    for count in np.unique(counts):
        grid = starts[counts == count, None] + np.arange(count)  # (I, M)
        for some in np.array_split(grid, -(-len(grid) // max(1, batch_pairs // int(count)))):
            yield from np.array_split(some, -(-int(count) // batch_pairs), axis=1)


class _PreparedCaptions:
    """Captions by column, prepared for the first joint block at first use and, where they are not too many, kept."""

    def __init__(self, model, captions):
        self.model = model
        self.captions = captions
        self.lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
        self.are_kept = self.lengths.sum() <= KEPT_CAPTION_TOKENS
        self._of_length = {}
        self._of_all = None

    def take(self, columns):
        """Captions of one length, prepared."""
        if not self.are_kept:
            return self._prepare(columns)
        length = self.lengths[columns[0]]
        alike = np.flatnonzero(self.lengths == length)
        if length not in self._of_length:
            self._of_length[length] = self._prepare(alike)
        return self._of_length[length].take(torch.from_numpy(np.searchsorted(alike, columns)))

    def take_any(self, columns):
        """Captions of any lengths, of which one token's state is all that is prepared: (I, M) columns."""
        if self._of_all is None:
            alike = [np.flatnonzero(self.lengths == length) for length in np.unique(self.lengths)]
            batches = [part for each in alike for part in np.array_split(each, -(-len(each) // CAPTIONS_AT_ONCE))]
            order = torch.from_numpy(np.argsort(np.concatenate(batches)))
            parts = [self._prepare(batch) for batch in batches]
            fields = (None if field[0] is None else torch.cat(field)[order] for field in zip(*parts, strict=True))
            self._of_all = parts[0]._make(fields)
        return self._of_all.take(torch.from_numpy(columns))

    def _prepare(self, columns):
        input_ids = torch.tensor([self.captions[column] for column in columns], device=self.model.device)
        return self.model.prepare_captions(input_ids)


class _ScoreCache:
    """Scores of finished tiles in a folder, one file each, named by all that the scores depend on."""

    def __init__(self, folder, model, settings):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint(model, [*settings, model.device.type, model.config._attn_implementation])

    def key(self, pixels, rows, captions):
        """A tile's name, from its images (I, 3, H, W) and the row among them and token ids of each pair."""
        digest = self.fingerprint.copy()
        digest.update(pixels.contiguous().numpy())
        digest.update(np.ascontiguousarray(rows))
        digest.update(json.dumps(captions).encode())
        return digest.hexdigest()

    def get_or_compute(self, key, num_pairs, compute):
        """The scores of a tile: those kept, or else what `compute` gives, which is kept then."""
        path = self.folder / f"{key[:32]}.safetensors"
        if path.exists():
            try:
                return _read_tile(path, key, num_pairs)
            except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                logger.warning("%s is damaged (%s) and is computed again.", path, error)
        scores = np.ascontiguousarray(compute(), dtype=np.float32)
        beside = path.with_suffix(f".{os.getpid()}.tmp")  # a killed process never leaves half a tile under its name
        metadata = {"key": key, "sha256": hashlib.sha256(scores).hexdigest()}
        save_file({"scores": torch.from_numpy(scores)}, beside, metadata)
        os.replace(beside, path)
        return scores


def _read_tile(path, key, num_pairs):
    """Scores as written.

    Raises:
        SafetensorError: for a truncated file.
        ValueError: where the content is not what was written.
    """
    with safe_open(path, framework="np") as file:
        scores, metadata = file.get_tensor("scores"), file.metadata()
    if scores.dtype != np.float32 or scores.shape != (num_pairs,):
        raise ValueError(f"it holds {scores.dtype} scores of shape {scores.shape}")
    if metadata != {"key": key, "sha256": hashlib.sha256(scores).hexdigest()}:
        raise ValueError("its checksum does not fit")
    return scores


def fingerprint(model, settings):
    """A digest of the weights, the configuration and settings."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_IN_FINGERPRINT}
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps([settings, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest


def _sum_over_processes(scores, device):
    """Scores that another process computed are 0 here: the sum is all of them, without rounding."""
    total = torch.from_numpy(scores).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


@contextmanager
def inference_network(model, dtype):
    """The network to compute with, in evaluation mode and without gradients; the model is restored afterwards."""
    with torch.no_grad():
        if can_prepack(model, dtype):
            network = prepack_once(model, dtype)
            with evaluation_mode(model), memory_kept():
                yield network
        else:
            forget(model)
            enabled = dtype not in (None, model.dtype)
            with evaluation_mode(model), torch.autocast(model.device.type, dtype=dtype, enabled=enabled):
                yield model
