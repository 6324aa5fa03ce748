"""Tests that runs killed by SIGKILL resume and end with the same weights, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_training
import torch
from small_training import CONTRASTIVE, assert_same_bits, finish, losses, run, start

from ieft.training.checkpoints import find_damage, find_last_checkpoint
from ieft.training.output_folder import OutputFolder

# 32 captions in batches of 4: 8 steps per epoch, 12 in total, a checkpoint and an evaluation every second step.
SETTINGS = {
    "contrastive": CONTRASTIVE,
    "published": {},
    "micro-batches": CONTRASTIVE | {"train_batch_size": 4, "per_device_train_batch_size": 3},
    "accumulating": {"gradient_accumulation_steps": 3, "num_train_epochs": 4, "max_steps": -1},
    "workers": CONTRASTIVE
    | {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "train_sampling_strategy": "sequential",
    },
}


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """Setting -> the folder of an uninterrupted run; all run in parallel."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SETTINGS}
    codes = finish(*(start(folders[name], **SETTINGS[name]) for name in SETTINGS))
    assert codes == [0] * len(SETTINGS), [(folder / "printed0.txt").read_text()[-2000:] for folder in folders.values()]
    return folders


def printed(folder):
    return (Path(folder) / "printed0.txt").read_text()


@pytest.mark.parametrize(
    "setting, kills",
    [
        # In the first epoch; in the second; while it ranks
        ("contrastive", [("step", 3), ("step", 9), ("evaluate", 1)]),
        # In the midst of files of a checkpoint: arguments, optimizer, scheduler, generators, weights
        ("published", [("write", 5), ("write", 6), ("write", 7)]),
        ("published", [("write", 3), ("publish", 1), ("publish", 1.5), ("rotate", 0)]),
        ("accumulating", [("step", 2), ("step", 3), ("step", 7), ("write", 1)]),
        ("micro-batches", [("step", 3), ("step", 9)]),
        ("workers", [("step", 5), ("step", 9)]),
    ],
)
def test_killed_and_gone_on_with_ends_in_the_same_bits(unharmed, tmp_path, setting, kills):
    for kill in kills:
        code = run(tmp_path, kill=kill, resume=True, **SETTINGS[setting])
        assert code == -9, f"not killed at {kill}: {printed(tmp_path)[-2000:]}"
    assert run(tmp_path, resume=True, **SETTINGS[setting]) == 0, printed(tmp_path)[-2000:]
    assert_same_bits(unharmed[setting], tmp_path)
    ways = [json.loads((folder / "log.json").read_text()) for folder in (unharmed[setting], tmp_path)]
    recalls = [
        {entry["step"]: entry["eval_mean_recall"] for entry in way if "eval_mean_recall" in entry} for way in ways
    ]
    assert recalls[0] == recalls[1] and len(recalls[0]) > 2
    assert losses(unharmed[setting]) == losses(tmp_path)
    names = [sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (unharmed[setting], tmp_path)]
    assert names[0] == names[1] and not list(tmp_path.glob(".unfinished/*"))


def test_a_finished_run_takes_no_further_step(unharmed, tmp_path):
    folder = shutil.copytree(unharmed["contrastive"], tmp_path / "moved")  # and remembers its best elsewhere
    shutil.rmtree(folder / "nothing", ignore_errors=True)
    (folder / "final.pt").unlink()
    assert run(folder, resume=True, **CONTRASTIVE) == 0
    assert_same_bits(unharmed["contrastive"], folder)
    assert not (folder / "checkpoint-13").exists()
    best = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["best_global_step"]
    assert (folder / f"checkpoint-{best}").is_dir()


def test_the_best_and_the_last_checkpoint_stay(unharmed):
    for name, folder in unharmed.items():
        kept = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        state = json.loads((folder / f"checkpoint-{kept[-1]}" / "trainer_state.json").read_text())
        assert len(kept) <= 2 and state["best_global_step"] in kept and kept[-1] == state["global_step"], name
        assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{state['best_global_step']}")


@pytest.mark.soak
def test_the_whole_command_killed_at_random_moments_ends_in_the_same_bits():
    """A short version of the soak test, which fails if bits differ."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "benchmarks/soak_resume.py", "--kills", "1", "--settings", "published"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["kills"] == 1 and result["ends"] >= 1


# Damaged checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(unharmed, tmp_path):
    """A copy of a finished run's folder with two checkpoints, which a test may damage, and the last of them."""
    folder = shutil.copytree(unharmed["published"], tmp_path / "copied")
    last, damages = find_last_checkpoint(folder)
    assert not damages and Path(last).name == "checkpoint-12"
    return folder, Path(last)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
)
def test_a_torn_file_rules_a_checkpoint_out(copied, name):
    folder, last = copied
    os.truncate(last / name, (last / name).stat().st_size * 2 // 3)
    assert f"{name} is damaged" in find_damage(last)
    earlier, damages = find_last_checkpoint(folder)
    assert Path(earlier).name != "checkpoint-12" and find_damage(earlier) is None and len(damages) == 1


MISSING = {
    "optimizer.pt": "optimizer",
    "model.safetensors": "weights",
    "trainer_state.json": "written last",
    "rng_state.pth": "generators",
}


@pytest.mark.parametrize("name, missing", MISSING.items())
def test_a_missing_file_rules_a_checkpoint_out(copied, name, missing):
    folder, last = copied
    (last / name).unlink()
    assert missing in find_damage(last)


def test_a_flipped_bit_rules_a_checkpoint_out(copied):
    _, last = copied
    content = bytearray((last / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (last / "optimizer.pt").write_bytes(content)
    assert "optimizer.pt is damaged" in find_damage(last)


def test_the_command_passes_over_a_damaged_checkpoint_and_says_so(copied):
    folder, last = copied
    own = OutputFolder(folder, training={}, evaluation={})
    os.truncate(last / "model.safetensors", 100)
    chosen, damages = own.find_checkpoint("true")
    assert chosen and chosen != str(last) and damages[0].startswith(f"{last}: model.safetensors is damaged")
    with pytest.raises(ValueError, match="model.safetensors is damaged.*Pass true"):
        own.find_checkpoint(str(last))
    assert own.find_checkpoint(chosen) == (chosen, [])
    os.truncate(Path(chosen) / "model.safetensors", 100)
    chosen, damages = own.find_checkpoint("true")
    assert chosen is None and len(damages) == 2
    with pytest.raises(ValueError, match="would write over"):
        own.find_checkpoint(None)


# Determinism ---------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_seed_are_the_same_bits_and_another_seed_is_not(unharmed, tmp_path):
    assert finish(start(tmp_path / "a", **CONTRASTIVE), start(tmp_path / "b", **CONTRASTIVE | {"seed": 4})) == [0, 0]
    assert_same_bits(unharmed["contrastive"], tmp_path / "a")
    one, other = (small_training.final_weights(folder) for folder in (unharmed["contrastive"], tmp_path / "b"))
    assert not all(torch.equal(one[name], other[name]) for name in one)
