"""A Trainer for IEFT that evaluates by ranking.

There are two losses (`ieft.training.losses`): ranking, and contrastive (weight 0 in the published recipe). With the
contrastive loss, the ranking loss scores all pairs in groups of images of the batch: random groups first, later groups
of hard negatives mined by contrastive similarity. With a teacher, the ranking loss has a distillation term. The batch
is that of all processes together, and each process computes its share by micro-batches that fit into memory: groups,
loss and gradients depend on neither.

A loss, gradient or weight that is not finite stops the run with a report before it reaches a checkpoint. A killed run
resumes from its last checkpoint and reproduces the uninterrupted run bit for bit.
"""

import logging
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from accelerate.utils.memory import clear_device_cache
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ieft.evaluation.metrics import retrieval_recalls
from ieft.evaluation.ranking import score_matrix
from ieft.training.checkpoints import STATE, UNFINISHED, explained_if_not_written, publish, write_json
from ieft.training.cost import autocast_type, fit_micro_batch, fixed_memory, measure_batch
from ieft.training.distributed import average_gradients, gather_rows, largest_over_processes, process_count
from ieft.training.hard_negatives import EmbeddedSimilarity, HardNegativeSampler
from ieft.training.losses import FEATURES, GroupedBatch, call_model, candidate_calls, candidate_loss
from ieft.training.micro_batches import (
    OutOfMemory,
    describe_batch,
    get_random_state,
    is_out_of_memory,
    set_random_state,
)

logger = logging.getLogger(__name__)

# Options of transformers that ranking does not read, and the values that leave them out.
UNREAD: dict[str, Any] = {
    "label_smoothing_factor": 0.0, "prediction_loss_only": False, "batch_eval_metrics": False,
    "eval_accumulation_steps": None, "include_for_metrics": [], "label_names": None,
}  # fmt: skip
BATCHES = ("shuffled", "neighbours", "embedder")
DEFAULT_BATCH = 8  # images on a device, as in transformers
MAX_OVERFLOWS = 25  # in a row: the loss scale has then fallen from 65536 below 1, so float16 is not the cause


@dataclass
class IeftTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus the options of IEFT."""

    train_batch_size: int | None = field(  # type: ignore[assignment]  # never None in transformers
        default=None,
        metadata={
            "help": "Images of one step, over all devices. None: per_device_train_batch_size on each device, times "
            "gradient_accumulation_steps."
        },
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Micro-batch: images that a device computes at once, with their captions. It does not change what "
            "is learnt. None: as many as fit into memory."
        },
    )
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
            "help": "shuffled, as published; neighbours: hard-negative batches of lexically similar captions; "
            "embedder: of captions and images that --embedder confuses.",
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

    do_calibrate: bool = field(
        default=False,
        metadata={
            "help": "Fit the probability of a trained checkpoint's scores on the validation split, and write it into "
            "the checkpoint's config.json. Training does this at its end."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        _check_ranges(self)
        _compose_batch(self)
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
    above_zero = ("learning_rate", "gradient_accumulation_steps", "num_negatives")
    above_zero += tuple(
        name for name in ("train_batch_size", "per_device_train_batch_size") if getattr(args, name) is not None
    )
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


def _compose_batch(args):
    """Set `train_batch_size`, and check that it is the same on every device and what the other options say.

    The Trainer's own accumulation stays 1: `IeftTrainer.training_step` takes the whole share of a device.
    """
    devices, accumulation = args.world_size, args.gradient_accumulation_steps
    if args.auto_find_batch_size or args.accelerator_config.split_batches:
        raise ValueError(
            "train_batch_size is kept, and the micro-batch is chosen to fit: leave out auto_find_batch_size and "
            "split_batches."
        )
    if args.train_batch_size is None:
        args.train_batch_size = (args.per_device_train_batch_size or DEFAULT_BATCH) * devices * accumulation
    total, micro_batch = args.train_batch_size, args.per_device_train_batch_size
    if total % devices:
        raise ValueError(f"train_batch_size must be a multiple of the {devices} devices; got {total}.")
    if accumulation > 1 and accumulation != -(-total // (devices * (micro_batch or total))):
        raise ValueError(
            f"gradient_accumulation_steps follows from train_batch_size ({total} images a step over all devices) and "
            f"per_device_train_batch_size: leave it out, or pass --train_batch_size "
            f"{(micro_batch or DEFAULT_BATCH) * devices * accumulation} for that many images a step; got "
            f"{accumulation}."
        )
    if micro_batch is not None and micro_batch > total // devices:
        raise ValueError(
            f"per_device_train_batch_size is the part of a batch that a device computes at once, here at most "
            f"{total // devices} (train_batch_size {total}, {devices} devices); got {micro_batch}. For more images a "
            "step pass --train_batch_size."
        )
    args.gradient_accumulation_steps = 1
    if args.deepspeed_plugin is not None:  # its engine steps after each backward pass
        if micro_batch not in (None, total // devices):
            raise ValueError("DeepSpeed computes a device's share at once: leave per_device_train_batch_size out.")
        args.per_device_train_batch_size = total // devices


class IeftTrainer(Trainer):
    """A Trainer that evaluates by ranking.

    Args:
        train_dataset: `TrainingItems`.
        eval_dataset: an `EvaluationSet`, or a dict of them by name.
        args: `IeftTrainingArguments` with `remove_unused_columns=False`.
        teacher: a network that reads the same inputs, whose scores are distilled into the model; None for none.
        embedder: an `ieft.evaluation.embedders.Embedder` for `args.batches` "embedder".
    """

    def __init__(self, model, args, train_dataset=None, eval_dataset=None, *, teacher=None, embedder=None, **options):
        if train_dataset is not None:
            _check_items(train_dataset, args)
            options.setdefault("data_collator", train_dataset.collate)
        if args.n_gpu > 1:
            logger.warning("One of %d GPUs is used. To use all, start by accelerate launch or torchrun.", args.n_gpu)
            args._n_gpu = 1  # the Trainer would split each batch over them, pairs and all
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        self._train_batch_size = args.train_batch_size // args.world_size  # of the loader of each process
        self.add_callback(_EpochOfItems(train_dataset))
        self.add_callback(_GradientsChecked(self))
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(args.device)
        self.embedder = embedder
        if train_dataset is not None and args.batches == "embedder" and embedder is None:
            raise ValueError("An embedder expected to mine batches with, which args.batches asks for; got none.")
        self._batch = None  # of the current step
        self._overflows = 0  # consecutive steps with float16 overflow
        self._is_saving = False

    def train(self, resume_from_checkpoint=None, **options):
        """As `Trainer.train`.

        Raises:
            ValueError: if not a single step could be taken.
            MemoryError: if not even a micro-batch of one image fits into memory.
        """
        batch = self.args.train_batch_size
        if self.args.dataloader_drop_last and len(self.train_dataset) < batch:
            raise ValueError(
                f"No step can be taken: --dataloader_drop_last leaves out the only batch, of "
                f"{len(self.train_dataset)} captions where {batch} fill one. Omit it, or lower --train_batch_size."
            )
        if self.args.per_device_train_batch_size is None:
            self.args.per_device_train_batch_size = self._choose_micro_batch(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def _choose_micro_batch(self, checkpoint):
        """That of the checkpoint, for the same bits; otherwise as many images as fit into memory on every device."""
        share = self._train_batch_size
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint and (path := Path(checkpoint) / STATE).is_file():
            return min(share, TrainerState.load_from_json(str(path)).train_batch_size or share)
        fitting = fit_micro_batch(share, self.image_bytes, self.fixed_bytes, self.args.device)
        return share - largest_over_processes(share - fitting, self.args.device)

    @cached_property
    def batch_cost(self):
        """Operations and kept bytes of a forward pass over the batch of a step, `ieft.training.cost.measure_batch`."""
        model = self.accelerator.unwrap_model(self.model)
        return measure_batch(model, self.args, max(map(len, self.train_dataset.caption_tokens)))

    @property
    def image_bytes(self):
        """Bytes that one image of a micro-batch needs until its backward pass."""
        return self.batch_cost[1] / self.args.train_batch_size

    @property
    def fixed_bytes(self):
        """Bytes of gradients, optimizer and the pixels of a device's share."""
        pixels = 12 * self.train_dataset.images.image_processor.image_size**2
        return fixed_memory(self.model) + pixels * self._train_batch_size

    def get_train_dataloader(self):
        """As `Trainer.get_train_dataloader`, with its own random generator.

        A loader draws a seed when its workers start: persistent workers start once, but again in a resumed run. Drawn
        from the global generator, this would change all dropout masks after it.
        """
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch from `TrainingItems.collate`, computed at once: a scalar, equal on every process.

        Training computes the same loss by micro-batches (`training_step`).
        """
        if self.args.contrastive_weight:
            batch = self._group(inputs)
            calls = batch.calls(len(batch.pixel_values))
            outputs = call_model(model, *calls[0], in_groups=not self._is_sharded)
            loss = self._grouped_loss(batch, outputs, self._teacher_logits(calls))
        else:
            loss = sum(self._candidate_losses(model, inputs, len(inputs["candidates"])))
        return (loss, {}) if return_outputs else loss

    def _candidate_losses(self, model, inputs, micro_batch):
        """The published loss by micro-batches: parts that sum to the mean over all images of this process."""
        num_images, num_candidates = inputs["candidates"].shape
        for call in candidate_calls(inputs, micro_batch):
            scores = (
                call_model(model, call, in_groups=not self._is_sharded)["logits"].float().view(-1, num_candidates)
            )  # (micro-batch, N)
            teacher_logits = self._teacher_logits([(call, ("logits",))])
            teacher_scores = None if teacher_logits is None else teacher_logits.view(scores.shape)
            loss = candidate_loss(scores, teacher_scores, distillation_weight=self.args.distillation_weight)
            yield loss * (len(scores) / num_images)

    @torch.no_grad()
    def _teacher_logits(self, calls):
        """The teacher's scores of the pairs that the model is given: (B, 1) float32, or None without a teacher.

        Args:
            calls: (arguments of the model, names of its outputs), as `GroupedBatch.calls`.
        """
        if self.teacher is None:
            return None
        calls = [call | {"output_features": False} for call, names in calls if "logits" in names]
        return torch.cat([self.teacher(**call).logits.float() for call in calls])

    def _group(self, inputs):
        """`GroupedBatch` of the batch of all processes."""
        own = inputs["candidates"][:, 0]  # row i of the captions becomes that of image i
        tensors = {"pixel_values": inputs["pixel_values"]}
        tensors |= {name: inputs[name][own] for name in ("input_ids", "attention_mask")}
        is_match = self._matches_in_batch(inputs)
        groups = self._choose_groups(tensors, is_match, mined=self._progress >= self.args.mining_start)  # (K, N)
        # Before the ranking loss starts, one pair is scored and weighted 0, so that every parameter has a gradient.
        groups = groups if self._ranks else groups[:1, :1]
        captions = (gather_rows(tensors[name]) for name in ("input_ids", "attention_mask"))
        return GroupedBatch(tensors["pixel_values"], *captions, is_match, groups)

    @property
    def _progress(self):
        """The share of the steps that were taken."""
        return self.state.global_step / max(1, self.state.max_steps)

    @property
    def _ranks(self):
        """Whether the ranking loss has joined the contrastive loss."""
        return self._progress >= self.args.ranking_start

    def _matches_in_batch(self, inputs):
        """(B, B) for the B rows of all processes: True where the image of a row carries the sentence of a column."""
        if process_count() == 1:
            return inputs["is_match"][:, inputs["candidates"][:, 0]]
        carried = gather_rows(inputs["image_text_ids"], fill=-1)  # (B, T)
        return (carried[:, :, None] == gather_rows(inputs["text_ids"])).any(dim=1)

    def _grouped_loss(self, batch, outputs, teacher_logits):
        """The contrastive and the ranking loss of a `GroupedBatch`, from the outputs of this process by name."""
        features = (outputs[name] for name in ("image_features", "text_features"))
        contrastive = batch.contrastive_loss(*features, outputs["similarity_scale"][0])
        scores = batch.group_scores(outputs["logits"])
        if not self._ranks:
            return self.args.contrastive_weight * contrastive + 0.0 * scores.sum()
        teacher_scores = None if teacher_logits is None else batch.group_scores(teacher_logits)
        ranking = batch.ranking_loss(scores, teacher_scores, distillation_weight=self.args.distillation_weight)
        return self.args.contrastive_weight * contrastive + ranking

    def _choose_groups(self, tensors, is_match, *, mined):
        """Groups of rows of the batch whose pairs are all scored: (K, N). N is at most `num_negatives` + 1."""
        num_items = len(is_match)
        size = min(self.args.num_negatives + 1, num_items)
        count = min(self.args.groups_per_step or max(1, num_items // size), num_items)
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        order = torch.randperm(num_items, generator=generator).to(is_match.device)
        if not mined or size == num_items:
            return order[torch.arange(count * size, device=order.device) % num_items].view(count, size)
        return self._mine_neighbours(tensors, is_match, anchors=order[:count], size=size)

    @torch.no_grad()
    def _mine_neighbours(self, tensors, is_match, *, anchors, size):
        """Each anchor row with the `size` - 1 rows that are most similar to it by the contrastive heads."""
        model = self.model_wrapped.eval()  # no dropout; the wrapped model, since its weights may be sharded
        micro_batch = self.args.per_device_train_batch_size or len(tensors["pixel_values"])
        parts = zip(*(rows.split(micro_batch) for rows in tensors.values()), strict=True)
        one = torch.zeros_like(anchors[:1])
        with self._memory_errors_agreed():
            outputs = [
                model(
                    **dict(zip(tensors, part, strict=True)), pair_images=one, pair_captions=one, output_features=True
                )
                for part in parts
            ]
        model.train()
        images, captions = (
            gather_rows(torch.cat([each[name] for each in outputs])) for name in ("image_features", "text_features")
        )
        similarity = (images @ captions.T).float()
        similarity = (similarity + similarity.T).masked_fill(is_match | is_match.T, -torch.inf)
        neighbours = similarity[anchors].topk(size - 1, dim=1).indices  # (K, N - 1)
        groups = torch.cat([anchors[:, None], neighbours], dim=1)
        return broadcast(groups)  # rounding, and so the choice, may differ between different machines

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Loss and gradients of one batch, computed by micro-batches of `per_device_train_batch_size` images.

        They are those of the whole batch, but for rounding and for the masks of dropout. Where memory runs out, the
        micro-batch is halved on every process and the step is computed again from the same random states.

        Raises:
            FloatingPointError: if the loss is not finite, before any weight is updated.
            MemoryError: if not even a micro-batch of one image fits.
        """
        self._batch = inputs  # for the error report, until the optimizer step
        model.train()
        if hasattr(self.optimizer, "train"):  # of schedule-free optimizers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        random_state = get_random_state(self.args.device)
        while True:
            try:
                loss = self._compute_gradients(model, inputs)
                break
            except OutOfMemory as error:
                self._halve_micro_batch(error)  # the error, and with it what it keeps in memory, ends here
            model.zero_grad()
            clear_device_cache(garbage_collection=True)
            set_random_state(self.args.device, random_state)
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        if not torch.isfinite(loss) and self.accelerator.scaler is None:
            self._stop(f"The loss is {loss.item()}")
        return loss

    def _compute_gradients(self, model, inputs):
        """Loss of the whole batch, a scalar without gradient; the gradients are then the same on every process."""
        micro_batch = self.args.per_device_train_batch_size or len(inputs["pixel_values"])
        compute = self._grouped_gradients if self.args.contrastive_weight else self._candidate_gradients
        if process_count() == 1 or self._is_sharded:
            return compute(model, inputs, micro_batch)
        with self.accelerator.no_sync(model):  # a process that runs out of memory must not leave others in a sum
            loss = compute(model, inputs, micro_batch)
        average_gradients(model.parameters())
        return loss

    def _candidate_gradients(self, model, inputs, micro_batch):
        """The published loss: each image has candidates of its own, so that losses of micro-batches just add up."""
        total = torch.zeros((), device=self.args.device)
        with self._memory_errors_agreed():
            for loss in self._candidate_losses(model, inputs, micro_batch):
                self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def _grouped_gradients(self, model, inputs, micro_batch):
        """The contrastive and the ranking loss, which compare all rows of the batch, by cached gradients.

        Features and scores are computed without gradient, the loss of the whole batch gives the gradient of each of
        them, and a second pass, with the same random states, carries these on to the weights: Gao et al., "Scaling
        Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021. A batch that fits is computed
        in one pass.
        """
        batch = self._group(inputs)
        calls = batch.calls(micro_batch)
        whole = len(calls) == 1
        random_states, outputs = [], []
        with self._memory_errors_agreed():
            for call in calls:
                random_states.append(get_random_state(self.args.device))
                with torch.set_grad_enabled(whole):
                    outputs.append(call_model(model, *call, in_groups=not self._is_sharded))
            teacher_logits = self._teacher_logits(calls)
        parts = {
            name: [each[name].detach().float() for each in outputs if name in each] for name in (*FEATURES, "logits")
        }
        leaves = {name: torch.cat(each).requires_grad_() for name, each in parts.items()}
        loss = self._grouped_loss(batch, leaves, teacher_logits)
        loss.backward()
        gradients = {name: iter(leaf.grad.split([*map(len, parts[name])])) for name, leaf in leaves.items()}
        with self._memory_errors_agreed():
            for call, random_state, output in zip(calls, random_states, outputs, strict=True):
                if not whole:
                    set_random_state(self.args.device, random_state)
                    output = call_model(model, *call, in_groups=not self._is_sharded)
                carried = ((value.float() * next(gradients[name])).sum() for name, value in output.items())
                self.accelerator.backward(sum(carried))
        return loss.detach()

    @property
    def _is_sharded(self):
        """Whether processes exchange weights or gradients within each forward and backward pass."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @contextmanager
    def _memory_errors_agreed(self):
        """Turn memory errors within, which must hold no exchange between processes, into `OutOfMemory` on all."""
        problem = None
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error)
            if self._is_sharded:
                raise MemoryError(
                    f"{problem} With FSDP or DeepSpeed the micro-batch is not halved while training: start again with "
                    f"--per_device_train_batch_size below {self.args.per_device_train_batch_size}."
                ) from error
        if largest_over_processes(int(problem is not None), self.args.device):
            raise OutOfMemory(problem or "Another process ran out of memory.")

    def _halve_micro_batch(self, error):
        """Halve the micro-batch after a memory error, on every process."""
        before = self.args.per_device_train_batch_size
        if before == 1:
            raise MemoryError(
                "A micro-batch of one image does not fit into the memory beside the network, its gradients and the "
                f"state of the optimizer: {str(error).splitlines()[0]} Use a device with more memory, --bf16 true, "
                "--gradient_checkpointing true, a smaller network, or fewer --num_negatives (another experiment)."
            ) from None
        self.state.train_batch_size = self.args.per_device_train_batch_size = -(-before // 2)
        if self.is_world_process_zero():
            logger.warning(
                "Out of memory in step %d: the micro-batch is halved from %d to %d images and the step is computed "
                "again. %s", self.state.global_step + 1, before, self.args.per_device_train_batch_size,
                describe_batch(self.args),
            )  # fmt: skip

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
        self._batch = None

    def _stop(self, problem):
        """Stop with an error that names the batch, which is also saved as a file."""
        path = Path(self.args.output_dir) / f"bad_batch_{self.args.process_index}.json"
        entries = self._describe(self._batch)
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

    # Overridden private methods of transformers' Trainer follow (beside them, `_train_batch_size` is set above). They
    # are tested with transformers 5.24; the lowest declared version is tried by tests/lowest_versions.py.

    def _get_train_sampler(self, train_dataset=None):
        if self.args.batches == "neighbours":
            return HardNegativeSampler(self.train_dataset)
        if self.args.batches == "embedder":
            embedded = EmbeddedSimilarity(self.train_dataset, self.embedder.to(self.args.device))
            self.embedder.to("cpu")  # the memory of the device is the training's
            return HardNegativeSampler(self.train_dataset, similarity=embedded)
        return super()._get_train_sampler(train_dataset)

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
        in_eval = torch.bfloat16 if self.args.bf16_full_eval else torch.float16 if self.args.fp16_full_eval else None
        return {
            "dtype": in_eval or autocast_type(self.args),
            "progress": not self.args.disable_tqdm,
            "num_workers": self.args.dataloader_num_workers,
        }

    @staticmethod
    def recalls(evaluation_set, scores):
        """Recalls of a score matrix (I, C)."""
        return retrieval_recalls(scores, evaluation_set.caption_image, evaluation_set.caption_text_id)


class _EpochOfItems(TrainerCallback):
    """Sets the epoch of the training items, which determines augmentations and negatives, also when resuming."""

    def __init__(self, items):
        self.items = items

    def on_train_begin(self, args, state, control, **kwargs):
        """Fix the path of the best checkpoint in a moved folder, note the micro-batch, and give each process its own
        dropout seed."""
        state.train_batch_size = args.per_device_train_batch_size
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
    expected = 0 if args.contrastive_weight else args.num_negatives
    if items.num_negatives != expected:
        because = (
            "the contrastive loss takes them from the batch" if expected == 0 else "as the training arguments say"
        )
        raise ValueError(
            f"TrainingItems(num_negatives={expected}) expected, {because}; got num_negatives={items.num_negatives}."
        )
    if args.batches == "embedder" and not args.contrastive_weight:
        raise ValueError(
            "Hard-negative batches need the contrastive loss, with which negatives come from the batch: pass "
            "--contrastive_weight 1, or leave --batches embedder out."
        )
    if args.contrastive_weight and args.train_batch_size < 2:
        raise ValueError(
            "The contrastive loss compares the captions of a batch, and is 0 in batches of one. Raise "
            "--train_batch_size to 2 or more, or set --contrastive_weight 0."
        )
    if len(set(items.caption_text_id.tolist())) < 2:
        raise ValueError(
            f"At least two different captions expected to train on; the training split has {len(items)}, all equal."
            if len(items)
            else "The training split holds no caption."
        )
