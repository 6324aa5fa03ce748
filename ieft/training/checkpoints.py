"""Atomic checkpoints: a checkpoint is complete, or it does not exist.

A checkpoint is written under a temporary name, flushed to disk and renamed, since a process may be killed, a disk may
fill up and a machine may lose power at any moment. Checkpoints from elsewhere (an older version, an interrupted copy)
are read in full before they are used.
"""

import errno
import json
import os
import re
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

UNFINISHED = ".unfinished"  # in the output folder; found there after a kill, it is removed by the next save
PICKLES = (".pt", ".pth", ".bin")  # zip files inside, with a checksum of each tensor
STATE = "trainer_state.json"
TORCH_FULL_DISK = ("PytorchStreamWriter failed writing", "unexpected pos", "iostream error")
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def find_last_checkpoint(folder):
    """The newest complete checkpoint of a folder.

    Returns:
        (str | None, list[str]): its path, and "PATH: what is wrong" for each newer checkpoint that is corrupt.
    """
    numbered = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(folder).glob("*/")]
    damages = []
    for name in sorted(filter(None, numbered), key=lambda name: -int(name[1])):
        path = Path(folder) / name[0]
        damage = find_damage(path)
        if damage is None:
            return str(path), damages
        damages.append(f"{path}: {damage}")
    return None, damages


def find_damage(checkpoint):
    """Why a checkpoint cannot be resumed from, or None. All of its files are read."""
    checkpoint = Path(checkpoint)
    for path in sorted(checkpoint.rglob("*")):
        try:
            _read_through(path)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} is damaged ({str(error) or type(error).__name__})"
    names = [path.name for path in checkpoint.glob("*")]
    if STATE not in names:
        return f"{STATE}, which is written last, is missing"
    # Either a single file or sharded. DeepSpeed's global_step* folders hold both weights and optimizer state.
    if not any(name.startswith(("model.", "model-", "pytorch_model", "global_step")) for name in names):
        return "it holds no weights"
    if not any(name.startswith(("optimizer", "global_step")) for name in names):
        return "it holds no state of the optimizer (start another run from its weights: --model_name_or_path)"
    if not any(name.startswith("rng_state") for name in names):
        return "it holds no state of the random generators"
    return None


def _read_through(path):
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="np"):
            pass  # opening it compares the file size with the header
    elif path.suffix in PICKLES:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken:
            raise ValueError(f"the checksum of {broken} does not fit")


def publish(unfinished, checkpoint):
    """Rename a finished folder to its final name, atomically; an existing folder of that name is replaced."""
    unfinished, checkpoint = Path(unfinished), Path(checkpoint)
    for path in unfinished.rglob("*"):
        _flush(path)
    _flush(unfinished)
    replaced = unfinished.with_name("replaced")
    if checkpoint.exists():
        os.replace(checkpoint, replaced)
    os.replace(unfinished, checkpoint)
    _flush(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path):
    """Flush to disk: after a power cut, a rename may otherwise be on disk without the data of the renamed file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_if_not_written(what, folder):
    """Turn write errors into one OSError that names the checkpoint to resume from; other errors pass unchanged.

    Raises:
        OSError: instead of any OSError, and of what torch and safetensors raise when a disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_full = _is_full_disk(error)
        if not (is_full or isinstance(error, OSError)):
            raise
        last, _ = find_last_checkpoint(folder)
        left = f"--resume_from_checkpoint true resumes from {last}." if last else "There is no earlier checkpoint."
        megabytes = shutil.disk_usage(folder).free / 1e6
        remedy = f"{megabytes:,.1f} MB are free there: make room, then try again. " if is_full else ""
        raise OSError(f"{what} could not be written to {folder}: {error}. {remedy}{left}") from error


def _is_full_disk(error):
    """Whether a disk, quota or file size limit was exceeded. torch and safetensors say so only in their messages."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    message = str(error)
    numbers = {int(number) for number in re.findall(r"os error (\d+)", message)}
    return bool(numbers & FULL_DISK) or any(sign in message for sign in TORCH_FULL_DISK)


def write_json(path, content):
    """Write a JSON file atomically: after a kill, either the old or the new content is there."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
