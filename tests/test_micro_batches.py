"""Tests that micro-batches, also those halved by a memory error, give the loss and gradients of the whole batch."""

import copy
import ctypes
import json
import re
import resource
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from small_training import CONTRASTIVE, final_weights, losses, make_trainer, run, run_ranks

from ieft.training.distributed import process_count, process_rank
from ieft.training.trainer import IeftTrainer

BATCH = 64
# Loss settings, and progress of training: before the ranking loss, with random groups, with mined groups.
CASES = {
    "published": ({}, 0.5),
    "contrastive alone": ({"contrastive_weight": 0.5}, 0.0),
    "random groups": ({"contrastive_weight": 0.5, "num_negatives": 6}, 0.2),  # of 7: they do not fill the batch
    "mined groups": ({"contrastive_weight": 0.5}, 0.8),
    "one group": ({"contrastive_weight": 0.5, "groups_per_step": 1, "num_negatives": 1}, 0.8),
    "late fusion": ({"contrastive_weight": 0.5, "first_joint_layer": 1}, 0.8),
    "late fusion, all pairs": (
        {"contrastive_weight": 0.5, "first_joint_layer": 1, "num_negatives": 63, "groups_per_step": 1}, 0.8
    ),
}  # fmt: skip


def gradients_of_one_batch(folder, micro_batches):
    """In a process: loss and gradients of its share of one batch, as a step of training leaves them."""
    found = {}
    for name, (options, progress) in CASES.items():
        trainer = make_trainer(
            folder, dropout=0.0, images=BATCH // 2, augmentation="none", train_batch_size=BATCH,
            per_device_train_batch_size=None, **options,
        )  # fmt: skip
        trainer.teacher = copy.deepcopy(trainer.model).eval().requires_grad_(False)
        for weight in trainer.teacher.parameters():
            weight *= 1.1
        trainer.state.max_steps, trainer.state.global_step = 10, int(10 * progress)
        model = trainer.model_wrapped
        if process_count() > 1:
            model = trainer.model_wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
        share = BATCH // process_count()
        rows = range(process_rank() * share, (process_rank() + 1) * share)
        batch = trainer.train_dataset.collate([trainer.train_dataset[row] for row in rows])
        for micro_batch in micro_batches:
            trainer.args.per_device_train_batch_size = micro_batch
            model.zero_grad()
            loss = trainer.training_step(model, dict(batch))
            gradients = {each: weight.grad.clone() for each, weight in trainer.model.named_parameters()}
            found[name, micro_batch] = gradients | {"loss": loss}
        if process_count() == 1:
            with patch.object(IeftTrainer, "_is_sharded", True):  # pairs one by one, put together token by token
                model.zero_grad()
                loss = trainer.training_step(model, dict(batch))
            gradients = {each: weight.grad.clone() for each, weight in trainer.model.named_parameters()}
            found[name, "pairs"] = gradients | {"loss": loss}
            # One big batch, one forward and one backward pass.
            model.zero_grad()
            loss = trainer.compute_loss(model, batch)
            loss.backward()
            gradients = {each: weight.grad for each, weight in trainer.model.named_parameters()}
            found[name, "at once"] = gradients | {"loss": loss.detach()}
    torch.save(found, Path(folder) / f"gradients{process_rank()}.pt")


@pytest.fixture(scope="module")
def of_worlds(tmp_path_factory):
    """Number of processes -> for each, case and micro-batch -> loss and gradients."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world}")
        micro_batches = [64, 32, 8, 5][world - 1 :]
        codes = run_ranks(folder, world, call=gradients_of_one_batch, micro_batches=micro_batches)
        assert codes == [0] * world, (folder / "printed0.txt").read_text()[-2000:]
        found[world] = [torch.load(folder / f"gradients{rank}.pt") for rank in range(world)]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "world, micro_batch", [(1, "pairs"), (1, 64), (1, 32), (1, 8), (1, 5), (2, 32), (2, 8), (2, 5)]
)
def test_loss_and_gradients_are_those_of_one_big_batch(of_worlds, world, micro_batch, case):
    expected = of_worlds[1][0][case, "at once"]
    found = [of_process[case, micro_batch] for of_process in of_worlds[world]]
    assert abs(sum(each["loss"] for each in found) / world - expected["loss"]) < 1e-5
    for name in expected.keys() - {"loss"}:
        largest = max(1, expected[name].abs().max())
        for rank, each in enumerate(found):
            assert (each[name] - expected[name]).abs().max() < 1e-5 * largest, f"{name} on rank {rank}"
    assert any(gradient.abs().max() > 1e-3 for name, gradient in expected.items() if name != "loss")


@pytest.mark.parametrize("options", [{}, CONTRASTIVE], ids=["published", "contrastive"])
def test_a_training_is_the_same_by_micro_batches_also_where_the_last_batch_is_smaller(tmp_path, options):
    """Two epochs of 32 captions in batches of 12, 12 and 8."""
    shared = options | {"train_batch_size": 12, "dropout": 0.0, "max_steps": 6, "eval_steps": 6, "save_steps": 6}
    for micro_batch in (12, 5):
        trainer = make_trainer(tmp_path / str(micro_batch), per_device_train_batch_size=micro_batch, **shared)
        trainer.train()
        (tmp_path / str(micro_batch) / "log.json").write_text(json.dumps(trainer.state.log_history))
    expected, found = losses(tmp_path / "12"), losses(tmp_path / "5")
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 6


# Memory --------------------------------------------------------------------------------------------------------------


def leave_memory(trainer, *, share, from_step=0, rank=0):
    """Limit the memory of one process, from a step on, to what it has and a share of what its batch needs."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # so that freed tensors are returned to the system
    compute, more = trainer._compute_gradients, int(share * trainer.image_bytes * trainer._train_batch_size)

    def compute_with_limit(model, inputs):
        if trainer.state.global_step >= from_step and process_rank() == rank:
            torch.ones(1, requires_grad=True).backward()  # this starts a thread, which needs memory
            pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data: what a thread reserves is none
            size = pages * resource.getpagesize() + more
            resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))
            trainer._compute_gradients = compute
        return compute(model, inputs)

    trainer._compute_gradients = compute_with_limit


def printed(folder):
    return (Path(folder) / "printed0.txt").read_text()


M_MMAP_THRESHOLD = -3  # of mallopt, from malloc.h
LARGE = {"images": 32, "train_batch_size": 64, "num_negatives": 15, "max_steps": 3, "eval_strategy": "no",
         "save_strategy": "no", "load_best_model_at_end": False}  # fmt: skip
HALVED = (
    r"Out of memory in step (\d): the micro-batch is halved from (\d+) to (\d+) images and the step is computed again."
    r" 64 images a step = 1 device x (\d+) micro-batches x \3 images"
)


def set_micro_batches(trainer, *, of_steps):
    """Let steps, from 1, start with given micro-batches."""
    compute = trainer._compute_gradients

    def compute_with(model, inputs):
        trainer.args.per_device_train_batch_size = of_steps.get(
            trainer.state.global_step + 1, trainer.args.per_device_train_batch_size
        )
        return compute(model, inputs)

    trainer._compute_gradients = compute_with


@pytest.mark.parametrize("options", [{}, CONTRASTIVE | {"ranking_start": 0.0}], ids=["published", "contrastive"])
def test_a_memory_error_halves_the_micro_batch_and_the_step_is_computed_again(tmp_path, options):
    """With dropout, the weights are those of a run whose steps had the smaller micro-batch from their beginning."""
    options = LARGE | options | {"per_device_train_batch_size": 64}
    limit = partial(leave_memory, share=0.6)  # before its first step, the heap is small
    assert run(tmp_path / "limited", prepare=limit, **options) == 0, printed(tmp_path / "limited")[-2000:]
    halvings = [tuple(map(int, each)) for each in re.findall(HALVED, printed(tmp_path / "limited"))]
    assert halvings[0][:2] == (1, 64) and all(after == -(-before // 2) for _, before, after, _ in halvings)
    chosen = {step: after for step, _, after, _ in halvings}
    assert run(tmp_path / "free", prepare=partial(set_micro_batches, of_steps=chosen), **options) == 0
    weights, expected = final_weights(tmp_path / "limited"), final_weights(tmp_path / "free")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert losses(tmp_path / "limited") == losses(tmp_path / "free") and len(losses(tmp_path / "free")) == 3


def test_a_memory_error_of_one_process_halves_the_micro_batch_of_all(tmp_path):
    limit = partial(leave_memory, share=1.0, from_step=1, rank=1)
    options = LARGE | CONTRASTIVE | {"ranking_start": 0.0, "dropout": 0.0, "max_steps": 2}
    assert run_ranks(tmp_path / "limited", 2, prepare=limit, **options) == [0, 0], printed(tmp_path / "limited")
    assert "the micro-batch is halved from 32 to 16 images" in printed(tmp_path / "limited")
    assert run(tmp_path / "free", **options) == 0
    assert losses(tmp_path / "limited") == pytest.approx(losses(tmp_path / "free"), rel=1e-4)


def test_a_micro_batch_of_one_that_does_not_fit_is_an_error_that_says_so(tmp_path):
    limit = partial(leave_memory, share=0.01)
    assert run(tmp_path, prepare=limit, per_device_train_batch_size=2, **LARGE) == 1
    assert "MemoryError: A micro-batch of one image does not fit into the memory" in printed(tmp_path)
    assert "is halved from 2 to 1 images" in printed(tmp_path)
