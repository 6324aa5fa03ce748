"""Tests of the `evaluate` module: offline, from its folder, with the same results as the plain function."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ieft.evaluation.metrics import retrieval_recalls

ROOT = Path(__file__).parent.parent
CASE = json.loads((ROOT / "tests" / "golden" / "golden_metrics.json").read_text())["cases"][1]
# Run in a process of its own: `evaluate` fixes its cache folders and its offline state when it is first imported.
SCRIPT = """
import json, socket, sys

def no_network(*args):
    raise AssertionError("the module asked for the network")

socket.socket.connect = no_network
import evaluate

folder, case = sys.argv[1], json.load(open(sys.argv[2]))
owners = {"caption_image": case["caption_image"], "caption_text_id": case["caption_text_id"]}
answer = {}
recall = evaluate.load(folder)
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
sys.modules["ieft.evaluation.metrics"] = None  # as where ieft is not installed
try:
    evaluate.load(folder)
except ImportError as error:
    answer["missing"] = str(error)
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "case.json").write_text(json.dumps(CASE))
    environment = os.environ | {
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "metrics" / "retrieval_recall"), "case.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["whole", "batches"])
def test_same_numbers_as_the_plain_function(answer, way):
    expected = retrieval_recalls(np.array(CASE["scores"]), CASE["caption_image"], CASE["caption_text_id"])
    assert answer[way] == expected
    assert answer[way]["ir_r5"] == pytest.approx(100 * CASE["expected"]["original"]["ir_r5"])


def test_bad_scores_are_errors(answer):
    assert "rows of [1, 2] scores" in answer["ragged"]
    assert "1 of 2 are NaN" in answer["nan"]


def test_without_the_package_the_error_says_what_to_do(answer):
    assert "pip install ." in answer["missing"]
