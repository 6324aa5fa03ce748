"""A Trainer for IEFT that evaluates by ranking.

There are two losses. Ranking (Tang et al. 2023): cross-entropy over the matching scores of an image with its own
caption and with others. Contrastive (as CLIP; weight 0 in the published recipe): cross-entropy, in both directions,
over the similarities of images and captions encoded separately by the same network. With the contrastive loss, the
ranking loss scores all pairs in groups of images of the batch: random groups first, later groups of hard negatives
mined by contrastive similarity. The batch is that of all processes together, so that groups and loss do not depend on
the number of processes. With a teacher, the ranking loss has a distillation term.

A loss, gradient or weight that is not finite stops the run with a report before it reaches a checkpoint. A killed run
resumes from its last checkpoint and reproduces the uninterrupted run bit for bit.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from ieft.evaluation.metrics import retrieval_recalls
from ieft.evaluation.ranking import score_matrix
from ieft.training.checkpoints import STATE, UNFINISHED, explained_if_not_written, publish, write_json
from ieft.training.distillation import group_divergence, listwise_divergence
from ieft.training.distributed import gather_rows, process_count, process_rank, sum_over_processes
from ieft.training.hard_negatives import NeighbourSampler

# Options of transformers that ranking does not read, and the values that leave them out.
UNREAD = {
    "label_smoothing_factor": 0.0, "prediction_loss_only": False, "batch_eval_metrics": False,
    "eval_accumulation_steps": None, "include_for_metrics": [], "label_names": None,
}  # fmt: skip
BATCHES = ("shuffled", "neighbours")
MAX_OVERFLOWS = 25  # in a row: the loss scale has then fallen from 65536 below 1, so float16 is not the cause


@dataclass
class IeftTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus the options of IEFT."""

    num_negatives: int = field(
        default=15, metadata={"help": "Negative captions that each image's own caption is ranked against."}
    )
    contrastive_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the contrastive loss; above 0, negatives come from the batch itself."},
    )
    ranking_start: float = field(
        default=0.1, metadata={"help": "With the contrastive loss: share of the steps before the ranking loss starts."}
    )
    mining_start: float = field(
        default=0.5,
        metadata={"help": "With the contrastive loss: share of the steps before groups are mined."},
    )
    batches: str = field(
        default="shuffled",
        metadata={
            "help": "shuffled, as published; neighbours: hard-negative batches of lexically similar captions.",
            "choices": list(BATCHES),
        },
    )
    groups_per_step: int | None = field(
        default=None,
        metadata={"help": "With the contrastive loss: groups ranked in a step; None: as many as fill the batch."},
    )
    distillation_weight: float = field(
        default=1.0,
        metadata={"help": "With a teacher: weight of the distillation term (KL divergence) in the ranking loss."},
    )

    def __post_init__(self):
        super().__post_init__()
        _check_ranges(self)
        if self.save_total_limit == 1 and self.load_best_model_at_end:
            # The Trainer would delete the newest checkpoint at the end, and a resumed run would train again.
            self.save_total_limit = 2


def _check_ranges(args):
    """Raise a ValueError that names the option, its valid values and the given one, if one is out of range."""
    if args.batches not in BATCHES:
        raise ValueError(f"batches must be one of {', '.join(BATCHES)}; got {args.batches!r}.")
    for name, left_out in UNREAD.items():
        if getattr(args, name) not in (left_out, None):
            raise ValueError(f"{name} has no effect on IEFT's losses and evaluation; got {getattr(args, name)!r}.")
    if args.max_steps == 0:  # transformers would take the epochs instead
        raise ValueError("max_steps must be 1 or more, or -1 to train for num_train_epochs; got 0.")
    above_zero = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_negatives")
    above_zero += () if args.max_steps > 0 else ("num_train_epochs",)
    above_zero += () if args.groups_per_step is None else ("groups_per_step",)
    for name in above_zero:
        if not getattr(args, name) > 0:
            raise ValueError(f"{name} must be above 0; got {getattr(args, name)}.")
    for name in ("contrastive_weight", "distillation_weight"):
        if isinstance(getattr(args, name), str) or not 0 <= getattr(args, name) < float("inf"):
            raise ValueError(f"{name} must be 0 or more; got {getattr(args, name)}.")
    for name in ("ranking_start", "mining_start"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{name} is a share of the steps, from 0 to 1; got {getattr(args, name)}.")


class IeftTrainer(Trainer):
    """A Trainer that evaluates by ranking.

    Args:
        train_dataset: `TrainingItems`.
        eval_dataset: an `EvaluationSet`, or a dict of them by name.
        args: `IeftTrainingArguments` with `remove_unused_columns=False`.
        teacher: a network that reads the same inputs, whose scores are distilled into the model; None for none.
    """

    def __init__(self, model, args, train_dataset=None, eval_dataset=None, *, teacher=None, **options):
        if train_dataset is not None:
            _check_items(train_dataset, args)
            options.setdefault("data_collator", train_dataset.collate)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        self.model_accepts_loss_kwargs = False  # the model's keyword arguments select pairs, they are not loss options
        self.add_callback(_EpochOfItems(train_dataset))
        self.add_callback(_GradientsChecked(self))
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(args.device)
        self._recent_batches = []  # of the current step
        self._overflows = 0  # consecutive steps with float16 overflow
        self._is_saving = False

    def _get_train_sampler(self, train_dataset=None):
        if self.args.batches == "neighbours":
            return NeighbourSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def train(self, *arguments, **options):
        """As `Trainer.train`.

        Raises:
            ValueError: if not a single step could be taken.
        """
        batch = self.args.per_device_train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and len(self.train_dataset) < batch:
            raise ValueError(
                f"No step can be taken: --dataloader_drop_last leaves out the only batch, of "
                f"{len(self.train_dataset)} captions where {batch} fill one. Omit it, or lower "
                "--per_device_train_batch_size."
            )
        return super().train(*arguments, **options)

    def get_train_dataloader(self):
        """As `Trainer.get_train_dataloader`, with its own random generator.

        A loader draws a seed when its workers start: persistent workers start once, but again in a resumed run. Drawn
        from the global generator, this would change all dropout masks after it.
        """
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch from `TrainingItems.collate`, a scalar."""
        tensors = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        if self.args.contrastive_weight:
            own = inputs["candidates"][:, 0]  # row i of the captions becomes that of image i
            tensors |= {name: tensors[name][own] for name in ("input_ids", "attention_mask")}
            loss = self._contrastive_and_group_loss(model, tensors, self._matches_in_batch(inputs))
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

    def _matches_in_batch(self, inputs):
        """(B, B) for the B rows of all processes: True where the image of a row carries the sentence of a column."""
        if process_count() == 1:
            return inputs["is_match"][:, inputs["candidates"][:, 0]]
        carried = gather_rows(inputs["image_text_ids"], fill=-1)  # (B, T)
        return (carried[:, :, None] == gather_rows(inputs["text_ids"])).any(dim=1)

    def _contrastive_and_group_loss(self, model, tensors, is_match):
        """The loss of the batch of all processes (B rows), of which this process holds I; `is_match` is (B, B).

        Each process encodes all captions, which is cheap, and scores only its own images.
        """
        progress = self.state.global_step / max(1, self.state.max_steps)
        ranks = progress >= self.args.ranking_start
        groups = self._choose_groups(tensors, is_match, mined=progress >= self.args.mining_start)  # (K, N)
        # Before the ranking loss starts, one pair is scored and weighted 0, so that every parameter has a gradient.
        groups = groups if ranks else groups[:1, :1]
        size, num_images = groups.shape[1], len(tensors["pixel_values"])
        images = groups.flatten() - process_rank() * num_images  # (K*N,) rows of this process, where in 0..I-1
        own = torch.nonzero((images >= 0) & (images < num_images))[:, 0]
        places = own if len(own) else own.new_zeros(1)  # else score a dummy pair to keep ranks in sync
        pairs = {
            "pixel_values": tensors["pixel_values"],
            "input_ids": gather_rows(tensors["input_ids"]),
            "attention_mask": gather_rows(tensors["attention_mask"]),
            "pair_images": images[places].clamp(0, num_images - 1).repeat_interleave(size),
            "pair_captions": groups[places // size].flatten(),
        }
        outputs = model(**pairs, output_features=True)
        image_features = gather_rows(outputs.image_features)
        similarity = outputs.similarity_scale * image_features @ outputs.text_features.T  # (B, B)
        contrastive = matching_loss(similarity[None].float(), is_match[None])
        scores = _put_together(outputs.logits, places, len(images), size, counts=len(own) > 0)  # (K, N, N)
        matches = is_match[groups[:, :, None], groups[:, None, :]]
        ranking = matching_loss(scores, matches)
        if self.teacher is not None and ranks:
            teacher_scores = _put_together(self._teacher_logits(pairs), places, len(images), size, counts=len(own) > 0)
            ranking = ranking + self.args.distillation_weight * group_divergence(scores, teacher_scores, matches)
        return self.args.contrastive_weight * contrastive + (ranking if ranks else 0.0 * scores.sum())

    def _choose_groups(self, tensors, is_match, *, mined):
        """Groups of rows of the batch whose pairs are all scored: (K, N). N is at most `num_negatives` + 1."""
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
        """Each anchor row with the `size` - 1 rows that are most similar to it by the contrastive heads."""
        model = self.model_wrapped.eval()  # no dropout; the wrapped model, since its weights may be sharded
        with self.compute_loss_context_manager():
            one = torch.zeros_like(anchors[:1])
            outputs = model(**tensors, pair_images=one, pair_captions=one, output_features=True)
        model.train()
        similarity = (gather_rows(outputs.image_features) @ gather_rows(outputs.text_features).T).float()
        similarity = (similarity + similarity.T).masked_fill(is_match | is_match.T, -torch.inf)
        neighbours = similarity[anchors].topk(size - 1, dim=1).indices  # (K, N - 1)
        groups = torch.cat([anchors[:, None], neighbours], dim=1)
        return broadcast(groups)  # rounding, and so the choice, may differ between different machines

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As `Trainer.training_step`; batches are kept for the error report until the optimizer step.

        Raises:
            FloatingPointError: if the loss is not finite, before any weight is updated.
        """
        self._recent_batches.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss) and self.accelerator.scaler is None:
            self._stop(f"The loss is {loss.item()}")
        return loss

    def check_gradients(self):
        """Check the gradients before the optimizer step.

        With float16, the loss scaler skips a step whose gradients overflow and lowers its scale; such steps are only
        counted.

        Raises:
            FloatingPointError: if gradients are not finite; with float16, only from the 26th time in a row.
        """
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._overflows = 0 if torch.isfinite(norm) else self._overflows + 1
        if self._overflows > (0 if self.accelerator.scaler is None else MAX_OVERFLOWS):
            self._stop(f"The gradient's norm is {norm.item()}, for {self._overflows} steps in a row")
        self._recent_batches.clear()

    def _stop(self, problem):
        """Stop with an error that names the batch, which is also saved as a file."""
        path = Path(self.args.output_dir) / f"bad_batch_{self.args.process_index}.json"
        entries = [entry for batch in self._recent_batches for entry in self._describe(batch)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": self.state.global_step + 1, "problem": problem, "batch": entries})
        unreadable = [entry["filename"] for entry in entries if not entry["pixels_are_finite"]]
        shown = "; ".join(f"{entry['filename']}: {entry['caption']}" for entry in entries[:3])
        raise FloatingPointError(
            f"{problem} in step {self.state.global_step + 1}. The step was not applied. Its batch of "
            f"{len(entries)} ({shown}...) is listed in {path}. "
            + (f"These images have pixels that are not finite: {', '.join(unreadable)}. " if unreadable else "")
            + "If its images and captions are valid, lower --learning_rate; --resume_from_checkpoint true "
            "resumes from the last checkpoint."
        )

    def _describe(self, batch):
        """Filename, caption, and whether the pixels are finite, for each row of a batch."""
        finite = torch.isfinite(batch["pixel_values"]).flatten(1).all(dim=1).tolist()
        rows = self.train_dataset.describe(batch["items"].tolist())
        return [row | {"pixels_are_finite": each} for row, each in zip(rows, finite, strict=True)]

    def _run_epoch(self, **options):
        """Take no step in a run that is resumed after its last step: the Trainer alone would take one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**options)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model, trial):
        """As the Trainer's, but written under a temporary name and renamed when every process has written its part.

        Raises:
            FloatingPointError: if weights are not finite; they are not saved.
            OSError: if the disk is full; earlier checkpoints are kept.
        """
        self._check_weights()
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        unfinished = folder / UNFINISHED / checkpoint.name
        if self.is_local_process_zero():
            shutil.rmtree(unfinished.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            with explained_if_not_written(f"The checkpoint of step {self.state.global_step}", folder):
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / STATE))
        except OSError:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            raise
        finally:
            self._is_saving = False
        self._publish(unfinished, checkpoint)

    def _publish(self, unfinished, checkpoint):
        for is_its_turn in (self.is_world_process_zero(), self.is_local_process_zero()):
            self.accelerator.wait_for_everyone()
            if is_its_turn and unfinished.exists():  # the second turn: on machines without a shared disk
                publish(unfinished, checkpoint)
                unfinished.parent.rmdir()
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(checkpoint.parent), self.args.save_total_limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _check_weights(self):
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise FloatingPointError(
                    f"After step {self.state.global_step} the weights {name} are not finite. The checkpoint of this "
                    "step is not written. Lower --learning_rate; --resume_from_checkpoint true resumes from the last "
                    "checkpoint."
                )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Rank the whole matrix of one evaluation set, or of each in a dict.

        Returns:
            dict: recalls in percent under `{metric_key_prefix}_`, as `ieft.evaluation.metrics.retrieval_recalls`
            names them.
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
        """Options of `ieft.evaluation.ranking` that follow from the training arguments."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return {
            "dtype": dtype, "progress": not self.args.disable_tqdm, "num_workers": self.args.dataloader_num_workers
        }  # fmt: skip

    @staticmethod
    def recalls(evaluation_set, scores):
        """Recalls of a score matrix (I, C)."""
        return retrieval_recalls(scores, evaluation_set.caption_image, evaluation_set.caption_text_id)


class _EpochOfItems(TrainerCallback):
    """Sets the epoch of the training items, which determines augmentations and negatives, also when resuming."""

    def __init__(self, items):
        self.items = items

    def on_train_begin(self, args, state, control, **kwargs):
        """Fix the path of the best checkpoint in a moved folder, and give each process its own dropout seed."""
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)
        if args.world_size > 1:  # with equal seeds, every process would drop the same units
            torch.manual_seed(args.seed + args.process_index)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.items.set_epoch(int(np.floor((state.epoch or 0) + 1e-6)))


class _GradientsChecked(TrainerCallback):
    """Checks the gradients before each optimizer step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_gradients()


def _check_items(items, args):
    """Raise a ValueError if items and arguments do not fit together, or if nothing can be learnt from the items."""
    batch = args.per_device_train_batch_size * args.world_size
    expected = 0 if args.contrastive_weight else args.num_negatives
    if items.num_negatives != expected:
        because = (
            "the contrastive loss takes them from the batch" if expected == 0 else "as the training arguments say"
        )
        raise ValueError(
            f"TrainingItems(num_negatives={expected}) expected, {because}; got num_negatives={items.num_negatives}."
        )
    if args.contrastive_weight and batch < 2:
        raise ValueError(
            "The contrastive loss compares the captions of a batch, and is 0 in batches of one. Raise "
            "--per_device_train_batch_size to 2 or more, or set --contrastive_weight 0."
        )
    if len(set(items.caption_text_id.tolist())) < 2:
        raise ValueError(
            f"At least two different captions expected to train on; the training split has {len(items)}, all equal."
            if len(items)
            else "The training split holds no caption."
        )


def _put_together(logits, places, num_rows, size, *, counts):
    """Combine the rows, at `places`, that each process has scored into the scores of all groups: (K, N, N).

    With `counts` False, the row of this process is a dummy and is ignored.
    """
    scores = logits.view(-1, size).float() * counts
    scores = scores.new_zeros(num_rows, size).index_copy(0, places, scores)
    return sum_over_processes(scores).view(-1, size, size)


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
