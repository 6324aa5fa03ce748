"""Tests of the `evaluate` module: from the Hub alone and from a folder, with the results of the plain function."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import running_hub

from ieft.evaluation.metrics import retrieval_recalls

ROOT = Path(__file__).parent.parent
CASE = json.loads((ROOT / "tests" / "golden" / "golden_metrics.json").read_text())["cases"][1]
# Run in a process of its own: `evaluate` fixes its cache folders and the Hub's address when it is first imported.
SCRIPT = """
import json, sys

class Hidden:  # this project, where it is installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ieft" or name.endswith("_ieft"):
            raise ModuleNotFoundError(f"hidden: {name}", name=name)

sys.meta_path.insert(0, Hidden())
import evaluate

name, case = sys.argv[1], json.load(open(sys.argv[2]))
owners = {"caption_image": case["caption_image"], "caption_text_id": case["caption_text_id"]}
answer = {}
recall = evaluate.load(name)
answer["whole"] = recall.compute(predictions=case["scores"], **owners)
for start in range(0, len(case["scores"]), 4):
    recall.add_batch(predictions=case["scores"][start : start + 4])
answer["batches"] = recall.compute(**owners)
try:
    recall.compute(predictions=[[1.0, 2.0], [1.0]], caption_image=[0, 1])
except ValueError as error:
    answer["ragged"] = str(error)
try:
    recall.compute(predictions=[[1.0, float("nan")]], caption_image=[0, 0])
except ValueError as error:
    answer["nan"] = str(error)
print(json.dumps(answer))
"""


def load_and_compute(name, folder, **environment):
    """What the script prints, run in an empty folder with an empty cache and without this project."""
    (folder / "case.json").write_text(json.dumps(CASE))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment = kept | {"HF_HOME": str(folder / "cache")} | environment
    command = [sys.executable, "-c", SCRIPT, name, "case.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["folder", "Hub"])
def answer(request, tmp_path_factory):
    """From the Hub alone, and offline from a copy of the folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    source = ROOT / "metrics" / "retrieval_recall"
    if request.param == "Hub":
        with running_hub() as (address, hub):
            hub.put("someone/retrieval_recall", {file.name: file.read_bytes() for file in source.iterdir()})
            return load_and_compute("someone/retrieval_recall", folder, HF_ENDPOINT=address)
    copy = shutil.copytree(source, folder / "copy" / "retrieval_recall")
    return load_and_compute(str(copy), folder, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("way", ["whole", "batches"])
def test_same_numbers_as_the_plain_function(answer, way):
    expected = retrieval_recalls(np.array(CASE["scores"]), CASE["caption_image"], CASE["caption_text_id"])
    assert answer[way] == expected
    assert answer[way]["ir_r5"] == pytest.approx(100 * CASE["expected"]["original"]["ir_r5"])


def test_bad_scores_are_errors(answer):
    assert "rows of [1, 2] scores" in answer["ragged"]
    assert "1 of 2 are NaN" in answer["nan"]
