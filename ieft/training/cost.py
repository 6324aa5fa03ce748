"""What training and evaluation will cost: operations, memory and time.

Networks are run on fake tensors, which have shapes but no numbers: nothing is computed, and the operations of matrix
products and the tensors kept for the backward pass are counted.
"""

import bisect
import contextlib
import itertools
import logging
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import TrainerCallback

from ieft.training.micro_batches import describe_batch

logger = logging.getLogger(__name__)
PASSES = 3  # operations of a step, in forward passes: a backward pass is two
STEPS_BEFORE_ESTIMATE = 20
WORKING_SHARE = 1.15  # what a backward pass needs in all, as a multiple of the tensors kept for it
USABLE = {"cpu": 0.7}  # of the free memory; other programs need some
USABLE_ON_ACCELERATOR = 0.92
FEWEST_IMAGES = 32  # to select a checkpoint on
CGROUP = Path("/sys/fs/cgroup")


def measure(model, function, *, dtype=None):
    """Run a function on fake tensors.

    Args:
        model: the network that the function calls.
        function: takes `empty(*shape, dtype=torch.float32)`, which gives tensors, and a function that gives the
            operations so far.
        dtype: that of autocast, or None.

    Returns:
        (int, int): operations (a multiply-add is two), and bytes of the tensors that a backward pass would need,
        without the weights.
    """
    device = next(model.parameters()).device
    attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch does not count
    counter = FlopCounterMode(
        display=False, custom_mapping={attention_on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    )
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, autocast, hooks, counter:
        weights = [mode.from_tensor(weight).untyped_storage()._cdata for weight in model.parameters()]
        function(
            lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device), counter.get_total_flops
        )
    return counter.get_total_flops(), sum(size for storage, size in kept.items() if storage not in weights)


def measure_batch(model, args, caption_length):
    """Operations and kept bytes of one forward pass over the whole batch of a step, by all devices together.

    Args:
        args: `IeftTrainingArguments`.
        caption_length: tokens of the longest caption.
    """
    num_images, config = args.train_batch_size, model.config
    size = args.num_negatives + 1
    num_captions, num_rows, num_groups = num_images * size, num_images, num_images
    if args.contrastive_weight:  # groups of rows of the batch, as `ieft.training.losses.GroupedBatch` scores them
        size = min(size, num_images)
        num_groups = min(args.groups_per_step or max(1, num_images // size), num_images)
        num_captions, num_rows = num_images, num_groups * size

    def forward(empty, _):
        ids = empty(num_captions, caption_length, dtype=torch.long)
        model(
            pixel_values=empty(num_images, config.num_channels, config.image_size, config.image_size),
            input_ids=ids, pair_images=empty(num_rows, dtype=torch.long),
            pair_captions=empty(1 if num_groups == 1 else num_rows, size, dtype=torch.long),
            output_features=args.contrastive_weight > 0,
        )  # fmt: skip

    return measure(model, forward, dtype=autocast_type(args))


def autocast_type(args):
    """The type of matrix products that training arguments ask for, or None for that of the weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


class RankingCost(NamedTuple):
    """Operations of encoding an image, of encoding a caption, and of scoring a pair."""

    image: int
    caption: int
    pair: int

    def of(self, num_images, num_captions):
        """Operations of ranking every image with every caption."""
        return num_images * self.image + num_captions * self.caption + num_images * num_captions * self.pair


def measure_ranking(model, caption_length):
    """`RankingCost` of a network, for captions of one length."""
    config, counts = model.config, [0]

    def rank(empty, count):
        with torch.no_grad():
            images = model.prepare_images(empty(1, config.num_channels, config.image_size, config.image_size))
            counts.append(count())
            captions = model.prepare_captions(empty(1, caption_length, dtype=torch.long))
            counts.append(count())
            model.score_prepared(captions, images)
            counts.append(count())

    measure(model, rank)
    return RankingCost(*(after - before for before, after in itertools.pairwise(counts)))


# Memory --------------------------------------------------------------------------------------------------------------


def free_memory(device):
    """Bytes that a process may still take on its device, where other processes of the run take as much."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" is no limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fixed_memory(model):
    """Bytes of the gradients and of the two states that Adam keeps of each weight."""
    return 3 * sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)


def fit_micro_batch(share, image_bytes, fixed, device):
    """The largest micro-batch that is expected to fit: a device's share of the batch, halved until it does.

    Args:
        share: images of a device in one step.
        image_bytes: bytes kept for the backward pass of one image with its captions.
        fixed: bytes that every micro-batch needs, as `fixed_memory` gives them.
    """
    usable = USABLE.get(device.type, USABLE_ON_ACCELERATOR) * free_memory(device)
    micro_batch = share
    while micro_batch > 1 and WORKING_SHARE * image_bytes * micro_batch + fixed > usable:
        micro_batch = -(-micro_batch // 2)
    return micro_batch


# Evaluation in proportion --------------------------------------------------------------------------------------------


def count_steps(args, num_items):
    """Steps of a training, and evaluations during it."""
    in_epoch = (
        num_items // args.train_batch_size if args.dataloader_drop_last else -(-num_items // args.train_batch_size)
    )
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * max(1, in_epoch))
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "no":
        return steps, 0
    if strategy == "epoch":
        return steps, -(-steps // max(1, in_epoch))
    every = args.eval_steps or args.logging_steps
    every = every if every >= 1 else math.ceil(every * steps)
    return steps, math.ceil(steps / every)  # the last step is one of them


def choose_selection(num_images, cost_of, budget, seed):
    """Rows of the images on which checkpoints are selected: all of them, or a random part that the budget allows.

    Args:
        cost_of: number of images -> operations of one evaluation of them.
        budget: operations that one evaluation may take.
        seed: of the choice.

    Returns:
        ndarray: rising rows; at least `FEWEST_IMAGES` where there are as many.
    """
    fitting = bisect.bisect_right(range(1, num_images + 1), budget, key=cost_of)
    count = min(num_images, max(FEWEST_IMAGES, fitting))
    return np.sort(np.random.default_rng([seed, 2]).permutation(num_images)[:count])


class TrainingCost(TrainerCallback):
    """Logs a table of the cost before training, and the time left after `STEPS_BEFORE_ESTIMATE` steps.

    Args:
        trainer: `IeftTrainer` with its training items.
        final_sets: `EvaluationSet`s that are ranked after training.
    """

    def __init__(self, trainer, final_sets=()):
        self.trainer = trainer
        args, tokens = trainer.args, trainer.train_dataset.caption_tokens
        self.steps, self.evaluations = count_steps(args, len(tokens))
        self.ranking = measure_ranking(trainer.model, round(sum(map(len, tokens)) / len(tokens)))
        self.step = PASSES * trainer.batch_cost[0]
        self.final = sum(self.of_evaluating(each) for each in final_sets)
        self.seconds, self.last = [], None

    def of_evaluating(self, evaluation_set):
        """Operations of ranking an `EvaluationSet`."""
        distinct = len(np.unique(evaluation_set.caption_text_id))
        return self.ranking.of(len(evaluation_set.images), distinct)

    def choose_selection(self, evaluation_set, share):
        """Rows of the images of an `EvaluationSet` whose evaluations take up to this share of the training."""
        num_images = len(evaluation_set.images)
        captions_of_image = len(evaluation_set.captions) / num_images
        return choose_selection(
            num_images,
            lambda count: self.ranking.of(count, count * captions_of_image),
            share * self.steps * self.step / max(1, self.evaluations) if self.evaluations else math.inf,
            self.trainer.args.seed,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        """Log the table."""
        logger.info("%s", self.table(state))

    def table(self, state):
        """Parameters, steps, batch, memory and operations, one a line."""
        trainer, args = self.trainer, self.trainer.args
        weights = trainer.accelerator.unwrap_model(trainer.model).num_parameters()
        needed = WORKING_SHARE * trainer.image_bytes * args.per_device_train_batch_size + trainer.fixed_bytes
        selection = trainer.eval_dataset
        evaluation = self.of_evaluating(selection) if self.evaluations else 0
        share = self.evaluations * evaluation / (self.steps * self.step)
        rows = {
            "Parameters": f"{weights / 1e6:,.2f} million",
            "Steps": f"{self.steps:,}" + (f", from {state.global_step:,}" if state.global_step else ""),
            "Batch": describe_batch(args),
            "Memory": f"about {needed / 1e9:,.1f} GB on each device for the micro-batch, gradients and optimizer; "
            f"{free_memory(args.device) / 1e9:,.1f} GB free ({args.device.type})",
            "Operations": f"{_flop(self.step)} a step, {_flop(self.steps * self.step)} in all",
            "Selection": f"{self.evaluations} evaluations of {len(selection.images):,} images x "
            f"{len(selection.captions):,} captions, {_flop(self.evaluations * evaluation)} ({share:.0%} of training)"
            if self.evaluations
            else "none: no evaluation while training",
            "Evaluation": f"{_flop(self.final)} after training",
        }
        return "\n".join(f"{name:12}{value}" for name, value in rows.items())

    def on_step_end(self, args, state, control, **kwargs):
        """Log the time left, once, from the time between steps without evaluations and checkpoints."""
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = None if control.should_evaluate or control.should_save else now
        if len(self.seconds) == STEPS_BEFORE_ESTIMATE:
            logger.info("%s", self.time_left(state, sum(self.seconds) / len(self.seconds)))

    def time_left(self, state, seconds):
        """The time that training and evaluation still take, at this many seconds a step."""
        done = self.evaluations * state.global_step // self.steps
        evaluation = self.of_evaluating(self.trainer.eval_dataset) if self.evaluations else 0
        rate = self.step / seconds  # operations a second
        training = _time((self.steps - state.global_step) * seconds)
        return (
            f"Step {state.global_step}, {seconds:.2g} s a step: about {training} of training left, "
            f"{_time((self.evaluations - done) * evaluation / rate)} of evaluation during it and "
            f"{_time(self.final / rate)} after it."
        )


def _flop(operations):
    """Operations with a unit."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if operations < 1000 or unit == "E":
            return f"{operations:,.3g} {unit}FLOP"
        operations /= 1000


def _time(seconds):
    """Seconds as text of two digits or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
