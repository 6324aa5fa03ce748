"""`evaluate` module with the recalls of `ieft.evaluation.metrics`, which is `recalls.py` beside it."""

import datasets
import evaluate

from .recalls import retrieval_recalls

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

    def _compute(self, predictions, *, caption_image, caption_text_id=None):
        widths = sorted({len(row) for row in predictions})
        if len(widths) > 1:
            raise ValueError(f"predictions: expected one score per caption in every row, got rows of {widths} scores.")
        return retrieval_recalls(predictions, caption_image, caption_text_id)
