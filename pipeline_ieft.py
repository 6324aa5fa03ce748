"""The transformers pipeline "image-text-retrieval": ranks captions for an image, or images for a caption."""

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import Pipeline, ProcessorMixin

try:
    from .ranking_ieft import CANDIDATES_AT_ONCE, find_processor, rank_candidates
except ImportError:  # imported from the clone or the wheel, where these files are top-level modules
    from ranking_ieft import CANDIDATES_AT_ONCE, find_processor, rank_candidates


def _is_one_query(query):
    """Whether the query is one image or caption instead of several; an array of images has four dimensions."""
    if isinstance(query, str | os.PathLike | Image.Image):
        return True
    return getattr(query, "ndim", 4) < 4


class ImageTextRetrievalPipeline(Pipeline):
    """`rank_candidates` as `pipeline("image-text-retrieval", model=folder, trust_remote_code=True)`."""

    _load_processor = True  # type: ignore[assignment]  # transformers declares them None
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    processor: ProcessorMixin

    def __call__(  # type: ignore[override]  # of two arguments
        self, image_or_caption: Any, candidates: Sequence, *, top_k: int | None = None, batch_size: int | None = None
    ) -> list:
        """Rank candidates for one query, or for each of several.

        Args:
            image_or_caption: a query as in `rank_candidates`; for a list, dataset or generator of queries, each query
                is ranked against all candidates.
            candidates: captions for an image, images for a caption.
            top_k: number of candidates to return, best first; None for all.
            batch_size: number of candidates to encode at once.

        Returns:
            list: as `rank_candidates` returns it; for several queries, a list of such lists.

        Raises:
            ValueError: as `rank_candidates`.
        """
        at_once = self._batch_size or CANDIDATES_AT_ONCE if batch_size is None else batch_size
        if type(at_once) is not int or at_once < 1:
            raise ValueError(f"batch_size must be a whole number of candidates, 1 or more; got {at_once!r}.")
        options = {"top_k": top_k, "candidates_at_once": at_once}
        if _is_one_query(image_or_caption):
            return super().__call__({"query": image_or_caption, "candidates": candidates}, **options)
        candidates = list(candidates) if not isinstance(candidates, str) else candidates
        return [super(ImageTextRetrievalPipeline, self).__call__({"query": query, "candidates": candidates}, **options)
                for query in image_or_caption]  # fmt: skip

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the whole checkpoint: weights, code and processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, top_k=None, candidates_at_once=None):
        options = {"top_k": top_k, "candidates_at_once": candidates_at_once}
        return {}, {name: value for name, value in options.items() if value is not None}, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> Any:
        return input_  # images are opened when they are scored, so that not all are in memory at once

    def _forward(self, inputs, **options):
        return rank_candidates(self.model, self.processor, inputs["query"], inputs["candidates"], **options)

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Any:
        return model_outputs


__all__ = ["ImageTextRetrievalPipeline", "find_processor", "rank_candidates"]
