"""Tests of the ranking engine against a double loop of plain forward passes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from small_training import run_ranks

from configuration_ieft import IeftConfig
from ieft.evaluation import ranking
from ieft.evaluation.ranking import score_matrix, score_pairs
from modeling_ieft import IeftForImageTextRetrieval
from ranking_ieft import evaluation_mode

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: networks this small only get slower with more."""
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
    """Score one pair at a time by the plain forward pass."""
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


def test_nothing_is_computed_twice(monkeypatch):
    model, (images, captions) = make_model(), make_sides()
    counts = {"prepare_images": 0, "prepare_captions": 0, "score_prepared": 0}

    def count(name):
        original = getattr(IeftForImageTextRetrieval, name)

        def counted(self, first, *others):
            counts[name] += len(first.hidden if name == "score_prepared" else first)
            return original(self, first, *others)

        monkeypatch.setattr(IeftForImageTextRetrieval, name, counted)

    for name in counts:
        count(name)
    score_matrix(model, images, captions * 3, progress=False)
    assert counts == {"prepare_images": 5, "prepare_captions": 9, "score_prepared": 5 * 9}
    score_pairs(model, images, captions, [(0, 1), (2, 10), (2, 1), (0, 1)], progress=False)  # 1 and 10 are equal
    assert counts == {"prepare_images": 7, "prepare_captions": 10, "score_prepared": 5 * 9 + 2}


def test_pairs_are_entries_of_the_matrix():
    model, (images, captions) = make_model(), make_sides()
    matrix = score_matrix(model, images, captions, progress=False)
    pairs = [(4, 0), (0, 10), (4, 3), (2, 2), (0, 1)]
    scores = score_pairs(model, images, captions, pairs, progress=False)
    np.testing.assert_allclose(scores, [matrix[pair] for pair in pairs], atol=1e-5)
    assert score_pairs(model, images, captions, [], progress=False).shape == (0,)


@pytest.mark.parametrize("fails", [True, False])
def test_evaluation_mode_restores_each_module_also_after_an_error(fails):
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)))
    model[0].eval()  # frozen, in a model that is trained
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError) if fails else contextlib.nullcontext(), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        if fails:
            raise KeyError
    assert [module.training for module in model.modules()] == before == [True, False, False, False, True]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found(training):
    model, (images, captions) = make_model(), make_sides()
    model.train(training)
    score_matrix(model, images, captions, progress=False)
    assert model.training is training and torch.is_grad_enabled()


def test_half_precision_ranks_nearly_the_same(monkeypatch):
    monkeypatch.setattr(ranking, "multiplies_bfloat16", lambda: True)  # imitated, if need be
    model, (images, captions) = make_model(), make_sides()
    exact = score_matrix(model, images, captions, progress=False)
    half = score_matrix(model, images, captions, dtype=torch.bfloat16, progress=False)
    assert not np.array_equal(exact, half)
    assert np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.99


def test_a_cpu_without_bfloat16_ranks_in_float32_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(ranking, "multiplies_bfloat16", lambda: False)
    model, (images, captions) = make_model(), make_sides()
    half = score_matrix(model, images, captions, dtype=torch.bfloat16, progress=False)
    assert "ranking in float32" in caplog.text
    np.testing.assert_array_equal(half, score_matrix(model, images, captions, progress=False))


def test_captions_beyond_those_kept_and_several_images_to_a_tile(monkeypatch):
    model, (images, captions) = make_model(), make_sides()
    expected = slow_matrix(model, images, captions)
    monkeypatch.setattr(ranking, "KEPT_CAPTION_TOKENS", 3)
    monkeypatch.setattr(ranking, "FEWEST_TILES", 2)  # tiles of two images
    np.testing.assert_allclose(score_matrix(model, images, captions, progress=False), expected, atol=1e-5)


@given(sizes=st.lists(st.integers(1, 30), max_size=200), tile_pairs=st.integers(1, 100))
def test_tiles_are_whole_images_without_gap(sizes, tile_pairs):
    starts = np.cumsum([0, *sizes])
    tiles = ranking._cut_tiles(starts, tile_pairs)
    assert [stop for _, stop in tiles[:-1]] == [start for start, _ in tiles[1:]]
    assert not sizes or (tiles[0][0], tiles[-1][1]) == (0, starts[-1])
    for start, stop in tiles:
        assert start in starts and stop in starts and stop > start
        num_images = np.searchsorted(starts, stop) - np.searchsorted(starts, start)
        assert num_images == 1 or (stop - start <= tile_pairs and num_images <= len(sizes) // ranking.FEWEST_TILES)


def test_memory_is_flat_in_the_number_of_images():
    model, (_, captions) = make_model(), make_sides()

    class ManyImages:
        alive = most = 0

        def __len__(self):
            return 200

        def __getitem__(self, row):
            image = torch.full((3, 32, 32), row / 200)
            ManyImages.alive += 1
            ManyImages.most = max(ManyImages.most, ManyImages.alive)
            weakref.finalize(image, self.let_go)
            return image

        @staticmethod
        def let_go():
            ManyImages.alive -= 1

    assert score_matrix(model, ManyImages(), captions, progress=False).shape == (200, 11)
    assert ManyImages.most <= 2 * (200 // ranking.FEWEST_TILES)


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([(0, 1, 2)], r"\(N, 2\) expected"),
        ([(0, 0), (5, 0)], "rows below 5 .images. and 11"),
        ([(0, -1)], "rows below"),
    ],
)
def test_wrong_pairs_say_what_was_expected(pairs, message):
    model, (images, captions) = make_model(), make_sides()
    with pytest.raises(ValueError, match=message):
        score_pairs(model, images, captions, pairs, progress=False)


def test_a_caption_without_tokens_is_an_error():
    model, (images, captions) = make_model(), make_sides()
    with pytest.raises(ValueError, match="caption 2 is empty"):
        score_matrix(model, images, [*captions[:2], []], progress=False)


def test_the_bar_counts_pairs(capsys):
    model, (images, captions) = make_model(), make_sides()
    score_matrix(model, images, captions)
    assert "45/45" in capsys.readouterr().err  # distinct captions


# Kept scores -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """The number of pairs scored by each forward pass."""
    passes, original = [], IeftForImageTextRetrieval.score_prepared

    def counted(self, captions, images):
        passes.append(len(captions.hidden))
        return original(self, captions, images)

    monkeypatch.setattr(IeftForImageTextRetrieval, "score_prepared", counted)
    return passes


def test_finished_tiles_are_not_computed_again(scored, tmp_path):
    model, (images, captions) = make_model(), make_sides()
    plain = score_matrix(model, images, captions, progress=False)
    first = score_matrix(model, images, captions, progress=False, score_cache=tmp_path)
    assert np.array_equal(first, plain) and len(list(tmp_path.iterdir())) == 5
    scored.clear()
    again = score_matrix(model, images, captions, progress=False, score_cache=tmp_path)
    assert np.array_equal(again, plain) and not scored


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: content[:-1] + b"?", lambda _: b""])
def test_a_damaged_tile_is_computed_again(scored, tmp_path, damage):
    model, (images, captions) = make_model(), make_sides()
    first = score_matrix(model, images, captions, progress=False, score_cache=tmp_path)
    tile = sorted(tmp_path.iterdir())[2]
    tile.write_bytes(damage(tile.read_bytes()))
    scored.clear()
    again = score_matrix(model, images, captions, progress=False, score_cache=tmp_path)
    assert np.array_equal(again, first) and sum(scored) == 9
    scored.clear()
    assert np.array_equal(score_matrix(model, images, captions, progress=False, score_cache=tmp_path), first)
    assert not scored  # written whole again


def change_weights(model, images, captions, options):
    with torch.no_grad():
        model.rank_output.bias += 1


def change_configuration(model, images, captions, options):
    model.vilt.config.layer_norm_eps = model.config.layer_norm_eps = 1e-2


def change_images(model, images, captions, options):
    images[:, 0, 0, 0] += 0.5


def change_captions(model, images, captions, options):
    captions[0][0] += 1


def change_type(model, images, captions, options):
    options["dtype"] = torch.float16


@pytest.mark.parametrize("change", [change_weights, change_configuration, change_images, change_captions, change_type])
def test_whatever_changes_starts_afresh(scored, tmp_path, change):
    model, (images, captions) = make_model(), make_sides()
    score_matrix(model, images, captions, progress=False, score_cache=tmp_path)
    options = {}
    change(model, images, captions, options)
    scored.clear()
    again = score_matrix(model, images, captions, progress=False, score_cache=tmp_path, **options)
    assert sum(scored) >= 45
    assert np.array_equal(again, score_matrix(model, images, captions, progress=False, **options))


SLOWLY = """
import sys, time, torch
sys.path[:0] = ["tests"]
from test_ranking import make_model, make_sides
from ieft.evaluation.ranking import score_matrix

class SlowImages:
    def __init__(self, images):
        self.images = images
    def __len__(self):
        return len(self.images)
    def __getitem__(self, row):
        time.sleep(0.5 if row < 2 else 100)  # killed while it waits for the third
        return self.images[row]

torch.set_num_threads(1)
images, captions = make_sides()
score_matrix(make_model(), SlowImages(images), captions, score_cache=sys.argv[1])
"""


def test_a_killed_run_goes_on_where_it_stopped(scored, tmp_path):
    script = tmp_path / "slowly.py"
    script.write_text(SLOWLY)
    cache = tmp_path / "scores"
    process = subprocess.Popen([sys.executable, str(script), str(cache)], cwd=ROOT, env=run_environment())
    deadline = time.monotonic() + 120
    while len(list(cache.glob("*.safetensors"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    model, (images, captions) = make_model(), make_sides()
    scores = score_matrix(model, images, captions, progress=False, score_cache=cache)
    assert sum(scored) == 3 * 9  # two of five images were done
    assert np.array_equal(scores, score_matrix(model, images, captions, progress=False))


# Several processes -------------------------------------------------------------------------------------------------

PAIRS = [(4, 0), (0, 10), (4, 3), (2, 2), (0, 1), (4, 0)]


def test_weights_that_are_no_numbers_give_no_order():
    model, (images, captions) = make_model(), make_sides()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="matching scores of the network are not all finite"):
        score_matrix(model, images, captions, progress=False)
    with pytest.raises(ValueError, match="matching scores of the network are not all finite"):
        score_pairs(model, images, captions, PAIRS, progress=False)


def run_environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def score_together(folder):
    dist.init_process_group("gloo")
    for num_images in (0, 1, 5):
        images, captions = make_sides(num_images=num_images)
        scores = score_matrix(make_model(), images, captions, progress=False, score_cache=f"{folder}/kept")
        np.save(f"{folder}/{num_images}_{dist.get_rank()}.npy", scores)
    np.save(f"{folder}/pairs_{dist.get_rank()}.npy", score_pairs(make_model(), images, captions, PAIRS))
    dist.barrier()


def test_two_processes_give_the_same_bits_as_one(tmp_path):
    assert run_ranks(tmp_path, 2, call=score_together) == [0, 0], (tmp_path / "printed1.txt").read_text()
    for num_images in (0, 1, 5):  # fewer than processes; a number that they do not divide
        images, captions = make_sides(num_images=num_images)
        alone = score_matrix(make_model(), images, captions, progress=False)
        for rank in (0, 1):
            assert np.array_equal(np.load(tmp_path / f"{num_images}_{rank}.npy"), alone)
    assert len(list((tmp_path / "kept").iterdir())) == 1 + 5  # each tile once
    pairs = score_pairs(make_model(), images, captions, PAIRS, progress=False)
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"pairs_{rank}.npy"), pairs)
