"""The transformers pipeline "image-text-retrieval": ranking captions for an image, or images for a caption."""

from transformers import Pipeline

try:
    from .ranking_ieft import find_processor, rank_candidates
except ImportError:  # imported from the clone or the wheel, where these files are top-level modules
    from ranking_ieft import find_processor, rank_candidates


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
