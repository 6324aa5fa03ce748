"""Ranking what the user has in hand: one image against captions, or one caption against images.

In: a network, a processor, a query and its candidates, as sentences, PIL images, arrays, paths or URLs. Out: the
candidates as dicts, best first. It knows nothing of datasets, indexes or files of results.
"""

import os
from pathlib import Path

import torch
from transformers import Pipeline
from transformers.utils import cached_file

try:
    from .processing_ieft import IeftProcessor
except ImportError:  # imported from the clone or the wheel, where these files are top-level modules
    from processing_ieft import IeftProcessor

CANDIDATES_AT_ONCE = 32
# Read as Hub code, this file is a module inside a package; the user has then agreed to run the checkpoint's own code.
IS_HUB_CODE = "." in __name__


def find_processor(model):
    """The processor saved beside a model's weights, read from the folder or Hub repository the model came from.

    Raises:
        ValueError: for a model that was made in memory.
    """
    origin = model.config._name_or_path
    if not origin:
        raise ValueError(
            "The processor of a model that was not loaded from a checkpoint is not known: pass processor=."
        )
    return IeftProcessor.from_pretrained(origin, trust_remote_code=IS_HUB_CODE)


def find_model_card(model):
    """The text of the page saved beside a model's weights.

    Raises:
        ValueError: for a model without one.
    """
    origin = model.config._name_or_path
    page = origin and cached_file(origin, "README.md", _raise_exceptions_for_missing_entries=False)
    if not page:
        raise ValueError(
            "This model has no README.md beside it to be its page: pass model_card=, such as the text that "
            "ieft.hub.render_model_card gives."
        )
    return Path(page).read_text(encoding="utf-8")


def rank_candidates(model, processor, query, candidates, *, top_k=None):
    """Candidates by their matching score with the query, best first; equal scores keep their order.

    Args:
        query: an image (PIL, array, tensor, path or URL) or a caption.
        candidates: captions for an image, images for a caption. A string counts as an image where it is a URL or
            names a file.
        top_k: how many to return; None returns all.

    Returns:
        list: `{"image" or "caption": as given, "score": any real number, "rank": from 1}`.

    Raises:
        ValueError: without candidates, for `top_k` below 1, or where captions meet captions or images meet images.
    """
    if isinstance(candidates, str | os.PathLike) or not len(candidates):
        raise ValueError(f"A list of at least one candidate expected; got {candidates!r}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, or None for all candidates; got {top_k}.")
    kind = _kind_of(query, candidates)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        score = _score_captions if kind == "caption" else _score_images
        scores = score(model, processor, query, list(candidates)).float()
    model.train(was_training)
    best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    return [{kind: candidates[row], "score": scores[row].item(), "rank": rank} for rank, row in enumerate(best, 1)]


def _kind_of(query, candidates):
    """What the candidates are, "image" or "caption"."""
    are_images = [_is_image(candidate) for candidate in candidates]
    if all(are_images) and isinstance(query, str):
        return "image"
    if not any(are_images) and _is_image(query):
        return "caption"
    shown = [repr(candidate) for candidate, is_image in zip(candidates, are_images, strict=True) if not is_image][:3]
    raise ValueError(
        f"Captions expected for an image, or images for a caption; got {_name_kind(query)} {query!r} with "
        f"{sum(are_images)} images and {len(are_images) - sum(are_images)} captions ({', '.join(shown)}). A string is "
        "an image where it is a URL or names an existing file: is each path right?"
    )


def _is_image(value):
    return not isinstance(value, str) or value.startswith(("http://", "https://")) or os.path.isfile(value)


def _name_kind(query):
    return "the image" if _is_image(query) else "the caption"


def _score_captions(model, processor, image, captions):
    """One image with each caption, the image read once: (C,) scores."""
    prepared = model.prepare_images(_pixels(model, processor, [image]))
    scores = []
    for first in range(0, len(captions), CANDIDATES_AT_ONCE):
        tokens = processor(text=captions[first : first + CANDIDATES_AT_ONCE]).to(model.device)
        prepared_captions = model.prepare_captions(tokens["input_ids"], tokens["attention_mask"])
        scores.append(model.score_prepared(prepared_captions, prepared))
    return torch.cat(scores)


def _score_images(model, processor, caption, images):
    """One caption with each image, the caption read once: (I,) scores."""
    prepared = model.prepare_captions(processor(text=[caption])["input_ids"].to(model.device))
    scores = []
    for first in range(0, len(images), CANDIDATES_AT_ONCE):
        pixels = _pixels(model, processor, images[first : first + CANDIDATES_AT_ONCE])
        scores.append(model.score_prepared(prepared, model.prepare_images(pixels)))
    return torch.cat(scores)


def _pixels(model, processor, images):
    images = [str(image) if isinstance(image, os.PathLike) else image for image in images]
    return processor(images=images)["pixel_values"].to(model.device)  # (I, 3, image_size, image_size)


class ImageTextRetrievalPipeline(Pipeline):
    """`pipeline("image-text-retrieval", model=folder, trust_remote_code=True)`: `rank_candidates` as a pipeline."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, image_or_caption, candidates, top_k=None):
        """Arguments, errors and what comes back as `rank_candidates`."""
        return super().__call__({"query": image_or_caption, "candidates": candidates}, top_k=top_k)

    def save_pretrained(self, save_directory, **kwargs):
        """The whole checkpoint: weights, code and processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, top_k=None):
        return {}, {} if top_k is None else {"top_k": top_k}, {}

    def preprocess(self, inputs):
        return inputs  # images are opened as they are scored, so that many never lie in memory at once

    def _forward(self, inputs, top_k=None):
        return rank_candidates(self.model, self.processor, inputs["query"], inputs["candidates"], top_k=top_k)

    def postprocess(self, ranked):
        return ranked


__all__ = ["ImageTextRetrievalPipeline", "find_processor", "rank_candidates"]
