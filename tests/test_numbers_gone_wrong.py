"""Tests of losses, gradients and weights that are not finite, and of full disks."""

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from small_training import CONTRASTIVE, assert_same_bits, make_trainer, run
from transformers import TrainerCallback

from ieft.training.checkpoints import explained_if_not_written, find_last_checkpoint


def at(trainer, event, step, call):
    """Call a function at one moment of one step."""

    def act(self, args, state, control, **kwargs):
        if state.global_step == step:
            call()

    trainer.add_callback(type(f"At{event}{step}", (TrainerCallback,), {event: act})())


def poisoned(trainer, item):
    """Training items in which one image has a pixel that is not finite."""
    get = trainer.train_dataset.__getitem__

    class Poisoned(type(trainer.train_dataset)):
        def __getitem__(self, row):
            entry = get(row)
            if row == item:
                entry["pixel_values"] = entry["pixel_values"].clone()
                entry["pixel_values"][0, 3, 4] = torch.nan
            return entry

    trainer.train_dataset.__class__ = Poisoned


def report(folder):
    return json.loads((Path(folder) / "bad_batch_0.json").read_text())


def assert_checkpoints_are_numbers(folder, last):
    from safetensors.torch import load_file

    found, damages = find_last_checkpoint(folder)
    assert Path(found).name == last and not damages
    assert all(torch.isfinite(weight).all() for weight in load_file(Path(found) / "model.safetensors").values())


@pytest.mark.parametrize("options", [CONTRASTIVE, {"gradient_accumulation_steps": 2}])
def test_a_loss_that_is_no_number_stops_the_run_and_names_batch_and_file(tmp_path, options):
    trainer = make_trainer(tmp_path, train_sampling_strategy="sequential", max_steps=8, **options)
    poisoned(trainer, 21)  # of 32, in batches of 4: the sixth batch, and the eleventh image
    step = 6 // options.get("gradient_accumulation_steps", 1)
    with pytest.raises(
        FloatingPointError, match=f"loss is nan in step {step}.*are not finite: scene10.png.*learning_rate"
    ):
        trainer.train()
    found = report(tmp_path)
    assert found["step"] == step and [row["filename"] for row in found["batch"] if not row["pixels_are_finite"]] == [
        "scene10.png"
    ]
    assert {
        "filename": "scene10.png",
        "caption": trainer.train_dataset.captions[21],
        "pixels_are_finite": False,
    } in found["batch"]
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
    assert_checkpoints_are_numbers(tmp_path, "checkpoint-2" if step == 3 else "checkpoint-4")


def test_a_gradient_that_is_no_number_stops_the_run_before_the_optimizer(tmp_path):
    trainer = make_trainer(tmp_path)
    spoil = lambda: trainer.model.rank_output.weight.register_hook(lambda gradient: gradient * torch.inf)  # noqa: E731
    at(trainer, "on_step_begin", 4, spoil)
    with pytest.raises(FloatingPointError, match="gradient's norm is (inf|nan).* in step 5"):
        trainer.train()
    assert len(report(tmp_path)["batch"]) == 4
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
    assert_checkpoints_are_numbers(tmp_path, "checkpoint-4")


def test_weights_that_overflow_are_never_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.eval_strategy = "no"  # ranking would notice too

    def overflow():
        with torch.no_grad():
            trainer.model.rank_output.weight[0, 0] = torch.inf

    at(trainer, "on_optimizer_step", 5, overflow)
    with pytest.raises(FloatingPointError, match="After step 6 the weights rank_output.weight are not finite"):
        trainer.train()
    assert_checkpoints_are_numbers(tmp_path, "checkpoint-4")


# Float16: Accelerate does not support it on CPUs, so only its loss scaler is used, with gradients in float32.


def test_gradients_that_overflow_are_left_out_and_the_scale_falls(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12, learning_rate=1e-3, max_grad_norm=0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**66)  # the norm is too large to be squared
    weights, scales = [], []
    at(trainer, "on_step_end", 1, lambda: weights.append(trainer.model.rank_output.weight.clone()))
    at(trainer, "on_step_end", 3, lambda: scales.append(trainer.accelerator.scaler.get_scale()))
    before = trainer.model.rank_output.weight.clone()
    trainer.train()
    assert torch.equal(before, weights[0]) and scales[0] < 2.0**66
    assert not torch.equal(before, trainer.model.rank_output.weight)
    assert trainer.state.global_step == 12
    assert_checkpoints_are_numbers(tmp_path, "checkpoint-12")
    assert "scaler.pt" in os.listdir(tmp_path / "checkpoint-12")


def test_gradients_that_no_scale_helps_stop_the_run(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=100, eval_strategy="no", save_strategy="no", load_best_model_at_end=False
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.model.rank_output.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError, match="26 steps in a row in step 26"):
        trainer.train()


# Disks that fill up --------------------------------------------------------------------------------------------------


def limit_file_sizes(trainer):
    """From the fourth step on, no file may exceed 60 kB: writing fails as on a full disk."""
    size = 60_000
    at(trainer, "on_step_begin", 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_the_run_goes_on_from_it(tmp_path):
    assert run(tmp_path / "unharmed", max_steps=8) == 0
    assert run(tmp_path / "full", max_steps=8, prepare=limit_file_sizes) == 1
    printed = (tmp_path / "full" / "printed0.txt").read_text()
    assert "The checkpoint of step 6 could not be written" in printed and "are free there" in printed
    assert f"make room, then try again. --resume_from_checkpoint true resumes from {tmp_path / 'full'}" in printed
    assert not (tmp_path / "full" / ".unfinished").exists()
    assert run(tmp_path / "full", max_steps=8, resume=True) == 0
    assert_same_bits(tmp_path / "unharmed", tmp_path / "full")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system may not be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoints_that_are_on_it(small_disk):
    trainer = make_trainer(small_disk / "run", save_total_limit=None, max_steps=40)
    with pytest.raises(OSError, match="could not be written.*make room.*resumes from"):
        trainer.train()
    last, damages = find_last_checkpoint(small_disk / "run")
    assert not damages and Path(last).name == f"checkpoint-{trainer.state.global_step - 2}"


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), KeyError("weight")])
def test_an_error_that_is_none_of_the_disks_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error), match=str(error.args[0])), explained_if_not_written("The model", tmp_path):
        raise error


def test_a_folder_that_cannot_be_written_is_no_full_disk(tmp_path):
    with pytest.raises(OSError, match="could not be written") as raised, explained_if_not_written("It", tmp_path):
        raise PermissionError(13, "Permission denied")
    assert "make room" not in str(raised.value)
