"""Tests of resources that must not grow during a run; the long version is `benchmarks/soak_long.py`."""

import json
from pathlib import Path

import pytest
from small_training import run

from benchmarks.soak_long import measure, summarise

STEPS, EVERY = 60, 5  # six epochs, with a ranking and a checkpoint every fifth step


def measured(folder):
    """Run in its own process, so that nothing else is measured."""
    (Path(folder) / "samples.json").write_text(json.dumps(measure(folder, STEPS, every=EVERY)))


@pytest.mark.soak
def test_memory_files_processes_and_checkpoints_stay_what_they_are(tmp_path):
    assert run(tmp_path, call=measured) == 0, (tmp_path / "printed0.txt").read_text()[-2000:]
    samples = json.loads((tmp_path / "samples.json").read_text())
    found = summarise(samples)
    assert [sample["step"] for sample in samples] == list(range(EVERY, STEPS + 1, EVERY))
    # A batch has eight tensors, each in a shared file, and one or two batches more are on their way from the worker at
    # one moment than at another; kept ones would be 360 by the end.
    assert found["most tensors"] - found["least tensors"] <= 24
    assert found["most files"] - found["least files"] <= 24
    assert found["most processes"] == found["least processes"] <= 3  # the run, its worker, multiprocessing's tracker
    assert found["most checkpoints"] == 2
    assert found["most megabytes"] - found["least megabytes"] < 40
