"""Tests that micro-batches, also those halved by a memory error, give the loss and gradients of the whole batch."""

import copy
import json
from pathlib import Path

import pytest
import torch
from small_training import (
    CONTRASTIVE,
    losses,
    make_trainer,
    run_ranks,
)

from ieft.training.distributed import process_count, process_rank

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
        if process_count() == 1:  # one big batch, one forward and one backward pass
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
@pytest.mark.parametrize("world, micro_batch", [(1, 64), (1, 32), (1, 8), (1, 5), (2, 32), (2, 8), (2, 5)])
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
