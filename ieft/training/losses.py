"""The losses of a batch, and the model calls that they need: one for the whole batch, or one for each micro-batch.

Ranking (Tang et al. 2023): cross-entropy over the matching scores of an image with its own caption and with others.
Contrastive (as CLIP): cross-entropy, in both directions, over the similarities of images and captions encoded
separately by the same network; with it, the ranking loss scores all pairs in groups of rows of the batch.
"""

import torch
from torch.nn.functional import cross_entropy

from ieft.training.distillation import group_divergence, listwise_divergence
from ieft.training.distributed import gather_rows, largest_over_processes, process_rank, sum_over_processes
from modeling_ieft import pair_groups

FEATURES = ("image_features", "text_features", "similarity_scale")  # outputs of the model for the contrastive loss


def matching_loss(scores, is_match):
    """Cross-entropy of the diagonal, by rows and by columns, ignoring other matching pairs.

    Args:
        scores: (K, N, N), row i and column i belong together.
        is_match: (K, N, N), True also where another row's caption matches because it is the same sentence.

    Returns:
        The mean over both directions.
    """
    targets = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    own = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    by_images = cross_entropy(scores.masked_fill(is_match & ~own, -torch.inf).transpose(1, 2), targets)
    return (by_images + cross_entropy(scores.masked_fill(is_match & ~own, -torch.inf), targets)) / 2


def candidate_calls(batch, micro_batch):
    """Model arguments for each micro-batch of the published loss: images with all of their candidates.

    Args:
        batch: as from `TrainingItems.collate`.
        micro_batch: largest number of images in a call.
    """
    for candidates, pixel_values in zip(
        batch["candidates"].split(micro_batch), batch["pixel_values"].split(micro_batch), strict=True
    ):
        captions = _select_captions(batch["input_ids"], batch["attention_mask"], candidates)
        yield {"pixel_values": pixel_values, **captions}


def candidate_loss(scores, teacher_scores=None, *, distillation_weight=0.0):
    """The published loss: each image's own caption, first of its candidates, against the others; (I, N) scores."""
    loss = cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))
    if teacher_scores is None:
        return loss
    return loss + distillation_weight * listwise_divergence(scores, teacher_scores)


def _select_captions(input_ids, attention_mask, rows):
    """The captions that occur in `rows` (G, M), each once, and where each of the rows is among them."""
    captions, places = torch.unique(rows, return_inverse=True)
    return {
        "input_ids": input_ids[captions], "attention_mask": attention_mask[captions], "pair_captions": places
    }  # fmt: skip


def call_model(model, call, names=("logits",), *, in_groups=True):
    """The named outputs of a model, each with at least one dimension.

    With `in_groups` False, pairs are given one by one: sharded weights are whole only within each block's `forward`,
    which scoring an image with a group of captions goes around.
    """
    if not in_groups and call["pair_captions"].dim() == 2:
        rows = pair_groups(call.get("pair_images"), call["pair_captions"], len(call["pixel_values"]))
        call = call | dict(zip(("pair_images", "pair_captions"), rows, strict=True))
    outputs = model(**call)
    return {name: torch.atleast_1d(outputs[name]) for name in names}


class GroupedBatch:
    """The batch of all processes (B rows), of which this process holds I images, and the groups of rows to rank.

    Every process computes the loss of the whole batch, from the features and scores of all.

    Args:
        pixel_values: (I, 3, H, W) of this process.
        input_ids, attention_mask: (B, L) of all processes, row i belongs to image i.
        is_match: (B, B), True where the image of a row carries the sentence of a column.
        groups: (K, N) rows, each group's images are scored with all of its captions.
    """

    def __init__(self, pixel_values, input_ids, attention_mask, is_match, groups):
        self.pixel_values, self.input_ids, self.attention_mask = pixel_values, input_ids, attention_mask
        self.is_match, self.groups = is_match, groups
        num_images = len(pixel_values)
        self.own = slice(process_rank() * num_images, (process_rank() + 1) * num_images)  # of the B rows
        self.images = groups.flatten() - self.own.start  # (K*N,) rows of this process, where in 0..I-1
        self.places = torch.nonzero((self.images >= 0) & (self.images < num_images))[:, 0]  # scored by this process

    def calls(self, micro_batch):
        """What the losses need of the model, in calls of up to `micro_batch` images.

        Returns:
            list of (arguments of the model, names of its outputs to keep): one call where all images fit into one;
            otherwise calls that give features, then calls that give scores.
        """
        if len(self.pixel_values) <= micro_batch:
            return [self._whole_call()]
        return [*self._feature_calls(micro_batch), *self._pair_calls(micro_batch)]

    def _whole_call(self):
        """All features and scores of this process at once, all B captions encoded."""
        images, captions = self._pairs(self.places)
        return {
            "pixel_values": self.pixel_values, "input_ids": self.input_ids, "attention_mask": self.attention_mask,
            "pair_images": images, "pair_captions": captions, "output_features": True,
        }, (*FEATURES, "logits")  # fmt: skip

    def _feature_calls(self, micro_batch):
        """The features of the own images and captions."""
        one = torch.zeros(1, dtype=torch.long, device=self.pixel_values.device)  # the model has to score some pair
        own = (self.pixel_values, self.input_ids[self.own], self.attention_mask[self.own])
        for pixel_values, input_ids, attention_mask in zip(*(rows.split(micro_batch) for rows in own), strict=True):
            yield {
                "pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask,
                "pair_images": one, "pair_captions": one, "output_features": True,
            }, FEATURES  # fmt: skip

    def _pair_calls(self, micro_batch):
        """The scores of the own places, images with the captions of their group.

        Every process gets equally many calls, since sharded weights are gathered in each: some score dummy pairs.
        """
        count = largest_over_processes(-(-len(self.places) // micro_batch), self.places.device)
        for number in range(count):
            images, captions = self._pairs(self.places[number * micro_batch :][:micro_batch])
            used, pair_images = torch.unique(images, return_inverse=True)
            yield {
                "pixel_values": self.pixel_values[used], "pair_images": pair_images,
                **_select_captions(self.input_ids, self.attention_mask, captions),
            }, ("logits",)  # fmt: skip

    def _pairs(self, places):
        """Rows of images of this process (M,) for M places, a dummy image's for none, and the captions to score with
        each: (M, N), or (1, N) if they are the same for all."""
        places = places if len(places) else places.new_zeros(1)
        images = self.images[places].clamp(0, len(self.pixel_values) - 1)
        return images, self.groups if len(self.groups) == 1 else self.groups[places // self.groups.shape[1]]

    def contrastive_loss(self, image_features, text_features, similarity_scale):
        """The contrastive loss of all B rows, from the features of the own images (I, E) and of the own captions or of
        all (B, E)."""
        if len(text_features) == len(image_features):
            text_features = gather_rows(text_features)
        similarity = similarity_scale * gather_rows(image_features) @ text_features.T  # (B, B)
        return matching_loss(similarity[None].float(), self.is_match[None])

    def group_scores(self, logits):
        """The scores of all groups (K, N, N) from the logits of the own `places`; those of dummy pairs are dropped."""
        size = self.groups.shape[1]
        scores = logits.flatten().float()[: len(self.places) * size].view(-1, size)
        scores = scores.new_zeros(self.groups.numel(), size).index_copy(0, self.places, scores)
        return sum_over_processes(scores).view(-1, size, size)

    def ranking_loss(self, scores, teacher_scores=None, *, distillation_weight=0.0):
        """The ranking loss of groups, from their scores (K, N, N)."""
        matches = self.is_match[self.groups[:, :, None], self.groups[:, None, :]]
        loss = matching_loss(scores, matches)
        if teacher_scores is None:
            return loss
        return loss + distillation_weight * group_divergence(scores, teacher_scores, matches)
