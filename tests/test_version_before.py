"""Tests that what the version before wrote still loads: a checkpoint, an index and kept scores.

`golden/version_before.tar.gz` was written by the version with flat modules in `ieft/`: a random network of two blocks,
four photographs of noise that lay in /archive, their index, a folder of kept scores, and what the network gave.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_recipe import GOLDEN_FOLDER
from PIL import Image

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.evaluation.ranking import score_matrix


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(GOLDEN_FOLDER / "version_before.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(before):
    return json.loads((before / "expected.json").read_text())


@pytest.fixture(scope="module")
def loaded(before):
    model = IeftForImageTextRetrieval.from_pretrained(before / "checkpoint").eval()
    return model, IeftProcessor.from_pretrained(before / "checkpoint")


def rank(before, expected, loaded, **options):
    """(4 images, 4 captions) scores."""
    model, processor = loaded
    images = [Image.open(before / "archive" / f"{number}.png") for number in range(4)]
    pixels = processor(images=images)["pixel_values"]
    captions = processor.tokenizer(expected["captions"])["input_ids"]
    return score_matrix(model, list(pixels), captions, progress=False, **options)


def test_a_checkpoint_gives_the_same_scores(before, expected, loaded):
    np.testing.assert_allclose(rank(before, expected, loaded), expected["scores"], atol=1e-5)


def test_kept_scores_are_taken(before, expected, loaded, monkeypatch):
    monkeypatch.setattr(IeftForImageTextRetrieval, "score_prepared", None)  # nothing is left to compute
    threads = torch.get_num_threads()
    scores = rank(before, expected, loaded, score_cache=before / "scores")
    torch.set_num_threads(threads)
    assert scores.tolist() == expected["scores"]


def test_an_index_is_searched(before, expected, loaded):
    index_module = pytest.importorskip("ieft.search.index", reason="the vector store, extra `search`, is missing")
    index = index_module.ImageIndex(before / "index.lance", loaded[0], processor=loaded[1])
    index.relocate(before / "archive", former="/archive")
    hits = index.search(expected["captions"][0], top_k=4, rerank_top_k=4)
    found = [[Path(hit["file"]).name, hit["score"], hit["similarity"]] for hit in hits]
    assert [name for name, *_ in found] == [name for name, *_ in expected["hits"]]
    np.testing.assert_allclose([each[1:] for each in found], [each[1:] for each in expected["hits"]], atol=1e-5)
    assert len(index.search_captions(before / "archive" / "0.png")) == 2
