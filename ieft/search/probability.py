"""Probabilities of hits: which hits have one, and which are likely enough to be shown."""


def check_min_probability(index, min_probability, rerank_top_k, similarity_weight):
    """Refuse a `min_probability` that nothing could be compared with.

    Raises:
        ValueError: that says what to do.
    """
    if min_probability is None:
        return
    is_number = isinstance(min_probability, int | float) and not isinstance(min_probability, bool)
    if not is_number or not 0 <= min_probability <= 1:
        raise ValueError(f"min_probability must be a number from 0 to 1; got {min_probability!r}.")
    if index.embedder is not None:
        raise ValueError(
            "min_probability needs an index made by the checkpoint itself, whose shortlists probabilities were fitted "
            f"to; this one was made with the embedder {index.embedder.name}."
        )
    if index.model.config.calibration_scale is None:
        raise ValueError(
            "min_probability needs a calibrated checkpoint, and the scores of this one were never compared with "
            "validation data: run_retrieval.py --do_calibrate --model_name_or_path CHECKPOINT --dataset_name DATASET."
        )
    if not rerank_top_k or similarity_weight:
        raise ValueError(
            "min_probability needs the matching score alone, which probabilities were fitted to: leave out "
            + ("rerank_top_k=0." if not rerank_top_k else f"similarity_weight={similarity_weight:g}.")
        )


def is_likely(hit, min_probability):
    """Whether a hit has a probability, of at least that."""
    probability = hit.get("probability")
    return probability is not None and probability >= min_probability
