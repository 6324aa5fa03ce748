"""Tests of the checkpoint that comes with the repository."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import pipeline

import ieft  # noqa: F401  registers the model with transformers

FOLDER = Path(__file__).parent.parent / "checkpoints" / "small"


@pytest.fixture(scope="module")
def retrieval():
    return pipeline("image-text-retrieval", model=str(FOLDER))


def test_it_is_small_and_holds_nothing_to_run():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 10_000_000
    assert not [name for name in files if name.endswith((".py", ".bin", ".pkl"))]


def test_it_tells_water_from_grass(retrieval):
    """Plain textures, since no photograph may come with the repository: dark blue water, and grass with its noise."""
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 1, (256, 256, 1))
    water = np.clip(np.array([20, 50, 90]) + 3 * noise, 0, 255).astype(np.uint8)
    grass = np.clip(np.array([70, 110, 50]) + 12 * noise, 0, 255).astype(np.uint8)
    for query, expected in (("this is a piece of blue sea .", water), ("this is a piece of green meadow .", grass)):
        (best,) = retrieval(query, [water, grass], top_k=1)
        assert 0 < best["probability"] < 1  # it is calibrated
        assert np.array_equal(np.asarray(best["image"]), expected), query


def test_its_card_has_the_results_in_its_folder():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("results_*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        for name in ("mean_recall", "dedup_mean_recall"):
            assert re.search(rf"\b{results[name]:.1f}\b", card), f"{path.name}: {name}"
    judged = json.loads((FOLDER / "probability.json").read_text(encoding="utf-8"))
    assert f"{judged['pairs']:,} pairs" in card and f"{judged['ece']:.3f}" in card and judged["ece"] < 0.05
