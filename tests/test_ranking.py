"""The ranking engine against a double loop of plain forward passes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configuration_ieft import IeftConfig
from ieft.ranking import score_matrix, score_pairs
from modeling_ieft import IeftForImageTextRetrieval

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only lose by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model():
    torch.manual_seed(0)
    config = IeftConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32,
        patch_size=8, enhancement_layers=[0, 1], initializer_range=0.2,
    )  # fmt: skip
    return IeftForImageTextRetrieval(config)


def make_sides(num_images=5, num_captions=9):
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(num_images, 3, 32, 32, generator=generator) * 2 - 1
    lengths = torch.randint(2, 8, (num_captions,), generator=generator).tolist()
    captions = [torch.randint(1, 50, (length,), generator=generator).tolist() for length in lengths]
    return images, captions + captions[:2]  # two stand twice


@torch.no_grad()
def slow_matrix(model, images, captions):
    """One pair at a time through the plain forward pass."""
    model.eval()
    rows = [
        [model(torch.tensor([caption]), pixel_values=image[None]).logits.item() for caption in captions]
        for image in images
    ]
    return np.array(rows, dtype=np.float32).reshape(len(images), len(captions))


@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
def test_equals_a_double_loop_whatever_the_batch(batch_tokens):
    model, (images, captions) = make_model(), make_sides()
    scores = score_matrix(model, images, captions, batch_tokens=batch_tokens, progress=False)
    assert scores.dtype == np.float32 and scores.shape == (5, 11)
    np.testing.assert_allclose(scores, slow_matrix(model, images, captions), atol=1e-5)
    assert np.array_equal(scores[:, :2], scores[:, -2:])  # equal captions, equal scores


def test_order_of_captions_and_images_does_not_matter():
    model, (images, captions) = make_model(), make_sides()
    scores = score_matrix(model, images, captions, progress=False)
    turned = score_matrix(model, images.flip(0), captions[::-1], progress=False)
    np.testing.assert_allclose(turned[::-1, ::-1], scores, atol=1e-5)


@pytest.mark.parametrize("num_images, num_captions", [(0, 4), (3, 0), (1, 1)])
def test_empty_and_single(num_images, num_captions):
    model, (images, captions) = make_model(), make_sides()
    images, captions = images[:num_images], captions[:num_captions]
    scores = score_matrix(model, images, captions, progress=False)
    np.testing.assert_allclose(scores, slow_matrix(model, images, captions), atol=1e-5)


def test_equal_captions_are_scored_once():
    model, (images, captions) = make_model(), make_sides()
    scored, score_prepared = [], model.score_prepared
    model.score_prepared = lambda captions, images: (
        scored.append(len(captions.hidden)) or score_prepared(captions, images)
    )
    score_matrix(model, images, captions * 3, progress=False)
    assert sum(scored) == 5 * 9


def test_pairs_are_entries_of_the_matrix():
    model, (images, captions) = make_model(), make_sides()
    matrix = score_matrix(model, images, captions, progress=False)
    pairs = [(4, 0), (0, 10), (4, 3), (2, 2), (0, 1)]
    scores = score_pairs(model, images, captions, pairs, progress=False)
    np.testing.assert_allclose(scores, [matrix[pair] for pair in pairs], atol=1e-5)
    assert score_pairs(model, images, captions, [], progress=False).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found(training):
    model, (images, captions) = make_model(), make_sides()
    model.train(training)
    score_matrix(model, images, captions, progress=False)
    assert model.training is training and torch.is_grad_enabled()


def test_half_precision_ranks_nearly_the_same():
    model, (images, captions) = make_model(), make_sides()
    exact = score_matrix(model, images, captions, progress=False)
    half = score_matrix(model, images, captions, dtype=torch.bfloat16, progress=False)
    assert not np.array_equal(exact, half)
    assert np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.99


SHARE = """
import sys, numpy as np, torch.distributed as dist
sys.path[:0] = ["tests"]
from test_ranking import make_model, make_sides
from ieft.ranking import score_matrix
dist.init_process_group("gloo")
images, captions = make_sides(num_images=int(sys.argv[1]))
scores = score_matrix(make_model(), images, captions, progress=False)
np.save(f"{sys.argv[2]}/{dist.get_rank()}.npy", scores)
"""


@pytest.mark.parametrize("num_images", [1, 5])
def test_two_processes_give_the_same_bits_as_one(num_images, tmp_path):
    script = tmp_path / "share.py"
    script.write_text(SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(num_images), str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=120)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, captions = make_sides(num_images=num_images)
    alone = score_matrix(make_model(), images, captions, progress=False)
    torch.set_num_threads(threads)
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"{rank}.npy"), alone)
