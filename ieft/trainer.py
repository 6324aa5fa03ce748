"""Training IEFT, and judging it by ranking.

In: a model, training items and evaluation sets. Out: a trained model; the recalls of every evaluation in the log. It
knows nothing of datasets' names, folders or pictures.

Two losses. Ranking (Tang et al. 2023): cross-entropy over the matching scores of an image with its own caption and
with others. Contrastive (as CLIP; weight 0 in the published recipe): cross-entropy, both ways, over the similarities
of images and captions read alone by the same network. With the contrastive loss on, the ranking loss takes groups of
images in the batch, later groups that are hard by contrastive similarity, and scores all pairs of a group. With a
teacher, the ranking loss also draws the scores to those that the teacher gives the same pairs.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from ieft.distillation import group_divergence, listwise_divergence
from ieft.metrics import retrieval_recalls
from ieft.neighbours import NeighbourSampler
from ieft.ranking import score_matrix

BATCHES = ("shuffled", "neighbours")


@dataclass
class IeftTrainingArguments(TrainingArguments):
    """What `transformers.TrainingArguments` asks, and the choices that are IEFT's own."""

    num_negatives: int = field(
        default=15, metadata={"help": "Captions that each image's own caption is ranked against."}
    )
    negatives: str = field(
        default="distinct",
        metadata={"help": "distinct: never a sentence that the image carries itself; uniform: as published."},
    )
    augmentation: str = field(
        default="randaugment",
        metadata={
            "help": "randaugment, turns (the eight turns and mirrorings; for scenes without up or left) or none."
        },
    )
    contrastive_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the contrastive loss; above 0, negatives come from the batch itself."},
    )
    ranking_start: float = field(
        default=0.1, metadata={"help": "With the contrastive loss: share of the steps before the ranking loss joins."}
    )
    mining_start: float = field(
        default=0.5, metadata={"help": "With the contrastive loss: share of the steps before groups are mined."}
    )
    batches: str = field(
        default="shuffled",
        metadata={
            "help": "shuffled, as published; neighbours: captions that share most words come in one batch.",
            "choices": list(BATCHES),
        },
    )
    groups_per_step: int | None = field(
        default=None,
        metadata={"help": "With the contrastive loss: groups ranked in a step; None: as many as fill the batch."},
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "With a teacher: weight of the divergence from its scores in the ranking loss."}
    )


class IeftTrainer(Trainer):
    """A Trainer that ranks.

    Args:
        train_dataset: `TrainingItems`.
        eval_dataset: an `EvaluationSet`, or a dict of them by name.
        args: `IeftTrainingArguments` with `remove_unused_columns=False`.
        teacher: a network that reads the same tensors, whose scores the model learns too; None for none.
    """

    def __init__(self, model, args, train_dataset=None, eval_dataset=None, *, teacher=None, **options):
        if train_dataset is not None:
            options.setdefault("data_collator", train_dataset.collate)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        self.model_accepts_loss_kwargs = False  # the model's keyword arguments are about pairs, not about losses
        self.add_callback(_EpochOfItems(train_dataset))
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(args.device)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.batches == "neighbours":
            return NeighbourSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch from `TrainingItems.collate`, a scalar."""
        tensors = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        if self.args.contrastive_weight:
            own = inputs["candidates"][:, 0]  # row i of the captions becomes that of image i
            tensors |= {name: tensors[name][own] for name in ("input_ids", "attention_mask")}
            loss = self._contrastive_and_group_loss(model, tensors, inputs["is_match"][:, own])
        else:
            loss = self._candidate_loss(model, tensors, inputs["candidates"])
        return (loss, {}) if return_outputs else loss

    def _candidate_loss(self, model, tensors, candidates):
        """The published loss: each image's own caption, first of its candidates (I, N), against the others."""
        images = torch.arange(len(candidates), device=candidates.device)
        tensors |= {
            "pair_images": images.repeat_interleave(candidates.shape[1]),
            "pair_captions": candidates.flatten(),
        }
        scores = model(**tensors).logits.view(candidates.shape).float()  # (I, N)
        loss = cross_entropy(scores, torch.zeros_like(images))
        if self.teacher is None:
            return loss
        teacher_scores = self._teacher_logits(tensors).view(candidates.shape)
        return loss + self.args.distillation_weight * listwise_divergence(scores, teacher_scores)

    @torch.no_grad()
    def _teacher_logits(self, tensors):
        """The teacher's scores of the pairs that the model is given: (B, 1) float32."""
        return self.teacher(**tensors).logits.float()

    def _contrastive_and_group_loss(self, model, tensors, is_match):
        """Each image with the caption of its own row; `is_match` (I, I)."""
        progress = self.state.global_step / max(1, self.state.max_steps)
        ranks = progress >= self.args.ranking_start
        groups = self._choose_groups(tensors, is_match, mined=progress >= self.args.mining_start)  # (K, N)
        # Before it starts, the ranking head is read for one pair and multiplied by 0: every parameter has a gradient.
        groups = groups if ranks else groups[:1, :1]
        size = groups.shape[1]
        pairs = tensors | {
            "pair_images": groups[:, :, None].expand(-1, -1, size).flatten(),
            "pair_captions": groups[:, None, :].expand(-1, size, -1).flatten(),
        }
        outputs = model(**pairs, output_features=True)
        similarity = outputs.similarity_scale * outputs.image_features @ outputs.text_features.T  # (I, I)
        contrastive = matching_loss(similarity[None].float(), is_match[None])
        scores = outputs.logits.view(-1, size, size).float()  # (K, N, N)
        matches = is_match[groups[:, :, None], groups[:, None, :]]
        ranking = matching_loss(scores, matches)
        if self.teacher is not None and ranks:
            teacher_scores = self._teacher_logits(pairs).view_as(scores)
            ranking = ranking + self.args.distillation_weight * group_divergence(scores, teacher_scores, matches)
        return self.args.contrastive_weight * contrastive + (ranking if ranks else 0.0 * scores.sum())

    def _choose_groups(self, tensors, is_match, *, mined):
        """Rows of the batch to be ranked among each other: (K, N). N is at most `num_negatives` + 1."""
        num_items = len(is_match)
        size = min(self.args.num_negatives + 1, num_items)
        count = min(self.args.groups_per_step or max(1, num_items // size), num_items)
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        order = torch.randperm(num_items, generator=generator).to(is_match.device)
        if not mined:
            return order[torch.arange(count * size, device=order.device) % num_items].view(count, size)
        return self._mine_neighbours(tensors, is_match, anchors=order[:count], size=size)

    @torch.no_grad()
    def _mine_neighbours(self, tensors, is_match, *, anchors, size):
        """Each anchor row with the `size` - 1 rows that the contrastive heads confuse it with most."""
        model = self.accelerator.unwrap_model(self.model).eval()  # compared without dropout
        with self.compute_loss_context_manager():
            image_features = model.get_image_features(tensors["pixel_values"])
            text_features = model.get_text_features(tensors["input_ids"], tensors["attention_mask"])
        model.train()
        similarity = (image_features @ text_features.T).float()
        similarity = (similarity + similarity.T).masked_fill(is_match | is_match.T, -torch.inf)
        neighbours = similarity[anchors].topk(size - 1, dim=1).indices  # (K, N - 1)
        return torch.cat([anchors[:, None], neighbours], dim=1)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Rank the whole matrix of one evaluation set, or of each in a dict.

        Returns:
            dict: recalls in percent under `{metric_key_prefix}_`, as `ieft.metrics.retrieval_recalls` names them.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, one in eval_dataset.items():
                metrics |= self.evaluate(one, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        recalls = self.recalls(eval_dataset, self.score(eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in recalls.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, evaluation_set, **options):
        """Every image with every caption: float32 (I, C), the same on every process. Options as `score_matrix`."""
        model = self.accelerator.unwrap_model(self.model)
        options = self.ranking_options() | options
        return score_matrix(model, evaluation_set.images, evaluation_set.caption_tokens, **options)

    def ranking_options(self):
        """How the arguments want `ieft.ranking` to compute."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return {
            "dtype": dtype, "progress": not self.args.disable_tqdm, "num_workers": self.args.dataloader_num_workers
        }  # fmt: skip

    @staticmethod
    def recalls(evaluation_set, scores):
        """Recalls of a score matrix (I, C)."""
        return retrieval_recalls(scores, evaluation_set.caption_image, evaluation_set.caption_text_id)


class _EpochOfItems(TrainerCallback):
    """Tells the training items which epoch it is: their augmentations and negatives hang on it, also when resumed."""

    def __init__(self, items):
        self.items = items

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.items.set_epoch(int(np.floor((state.epoch or 0) + 1e-6)))


def matching_loss(scores, is_match):
    """Cross-entropy of the diagonal, by rows and by columns, other right pairs left out.

    Args:
        scores: (K, N, N), row i and column i belong together.
        is_match: (K, N, N), True also where another row's caption is right by being the same sentence.

    Returns:
        The mean over both ways.
    """
    targets = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    own = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    by_images = cross_entropy(scores.masked_fill(is_match & ~own, -torch.inf).transpose(1, 2), targets)
    return (by_images + cross_entropy(scores.masked_fill(is_match & ~own, -torch.inf), targets)) / 2
