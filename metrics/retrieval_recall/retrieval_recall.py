"""`evaluate` module with the recalls of `ieft.evaluation.metrics.retrieval_recalls`, under the same names."""

import datasets
import evaluate

_DESCRIPTION = """
Recall at 1, 5 and 10 of image-text retrieval in both directions, in percent, strict and duplicate-aware. Ranks are
counted, and equal scores count by the expectation over random tie-breaking.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: scores (I, C), image first, higher is better; `add_batch(predictions=rows)` adds images as they come.
    caption_image: (C,) row of the image each caption was written for.
    caption_text_id: (C,) equal for equal sentences; leave out where all sentences are distinct.
Returns:
    ir_r1, ir_r5, ir_r10: text to image, a caption belonging to the image it was written for and no other.
    tr_r1, tr_r5, tr_r10: image to text.
    mean_recall: mean of the six.
    The same seven with `dedup_`: a sentence is right for every image that carries the same sentence.
Examples:
    >>> recall = evaluate.load("metrics/retrieval_recall")
    >>> recall.compute(predictions=[[0.9, 0.1], [0.2, 0.7]], caption_image=[0, 1])["mean_recall"]
    100.0
"""

_CITATION = """
@article{tang2023interacting,
  title = {Interacting-Enhancing Feature Transformer for Cross-Modal Remote-Sensing Image and Text Retrieval},
  author = {Tang and Wang and Ma and Zhang and Liu and Jiao},
  journal = {IEEE Transactions on Geoscience and Remote Sensing},
  year = {2023}
}
"""


class RetrievalRecall(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _download_and_prepare(self, dl_manager):
        # Imported here, not at the top: `evaluate` runs a copy of this file from its own cache, and answers a missing
        # top-level import by advising `pip install` of a name it has only read here.
        try:
            from ieft.evaluation.metrics import retrieval_recalls
        except ImportError as error:
            raise ImportError(
                "retrieval_recall needs the package `ieft` of the repository this folder came from, and cannot import "
                "it. Run `pip install .` in the clone, or start Python in the clone's root folder."
            ) from error
        self._retrieval_recalls = retrieval_recalls

    def _compute(self, predictions, *, caption_image, caption_text_id=None):
        widths = sorted({len(row) for row in predictions})
        if len(widths) > 1:
            raise ValueError(f"predictions: expected one score per caption in every row, got rows of {widths} scores.")
        return self._retrieval_recalls(predictions, caption_image, caption_text_id)
