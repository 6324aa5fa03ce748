"""Distillation from the scores of a teacher: the loss, and the check that teacher and student fit together.

A list is what the ranking loss takes a softmax over: the candidates of one image, or a row or column of a group. The
student's distribution over each list is trained towards the teacher's by their Kullback-Leibler divergence, the
listwise loss of Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007.
"""

import torch
from torch.nn.functional import kl_div, log_softmax


def listwise_divergence(scores, teacher_scores, left_out=None):
    """Kullback-Leibler divergence of the student's distribution from the teacher's, the mean over all lists.

    Args:
        scores, teacher_scores: (..., N), one list along the last dimension.
        left_out: (..., N), True for entries to ignore.

    Returns:
        A scalar of at least 0, in nats; 0 where scores differ by a constant in each list.
    """
    if left_out is not None:
        lowest = torch.finfo(scores.dtype).min  # finite: 0 times the logarithm of 0 has no gradient
        scores, teacher_scores = (x.masked_fill(left_out, lowest) for x in (scores, teacher_scores))
    student, teacher = (log_softmax(x, dim=-1).flatten(0, -2) for x in (scores, teacher_scores))
    return kl_div(student, teacher, reduction="batchmean", log_target=True)


def group_divergence(scores, teacher_scores, is_match):
    """`listwise_divergence` of groups, by rows and by columns, ignoring other matching pairs than a row's own.

    Args:
        scores, teacher_scores: (K, N, N), row i and column i belong together.
        is_match: (K, N, N), True where a column's caption matches a row's image.

    Returns:
        The mean over both directions.
    """
    left_out = is_match & ~torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    by_images = listwise_divergence(scores, teacher_scores, left_out)
    sides = (x.transpose(1, 2) for x in (scores, teacher_scores, left_out))
    return (by_images + listwise_divergence(*sides)) / 2


def check_teacher(teacher, teacher_processor, student, processor):
    """Check that a teacher can read the inputs of its student.

    Raises:
        ValueError: if vocabulary or image size differ, or the teacher allows fewer caption tokens.
    """
    vocabularies = [each.tokenizer.get_vocab() for each in (teacher_processor, processor)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"A teacher with the student's vocabulary expected; the teacher's has {len(vocabularies[0])} entries, the "
            f"student's {len(vocabularies[1])}, and they are not the same. Start the student from the teacher's "
            "checkpoint (--model_name_or_path), or train it on the data that the teacher was trained on."
        )
    for name in ("image_size", "max_position_embeddings"):
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs < ours or (name == "image_size" and theirs != ours):
            raise ValueError(f"A teacher with the student's {name} expected, {ours}; the teacher's is {theirs}.")
