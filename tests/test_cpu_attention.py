"""Tests of the compiled CPU attention against attention written out."""

import logging
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ranking import make_model, make_sides

from ieft.cpu import attention as compiled
from ieft.cpu.attention import compiled_for, cpu_attention
from ieft.cpu.prepacked import can_prepack
from ieft.evaluation.ranking import score_matrix

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = ["native", "-mno-avx512f", "-mno-avx"] if platform.machine() in ("x86_64", "AMD64") else ["native"]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")


@pytest.fixture(autouse=True)
def compile_anew():
    compiled_for.cache_clear()
    yield
    compiled_for.cache_clear()


def draw(*shape, dtype=torch.float32):
    """Query, key and value (B, H, S, E), as views of projections (B, S, H, E)."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3)]


def written_out(query, key, value):
    logits = query.double() @ key.double().transpose(2, 3) * query.shape[-1] ** -0.5
    return (logits.softmax(-1) @ value.double()).transpose(1, 2)  # (B, S, H, E)


def attend(query, key, value, mask=None):
    context, probabilities = cpu_attention(None, query, key, value, mask, query.shape[-1] ** -0.5)
    assert probabilities is None
    return context


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("batch, tokens, heads, width", [(1, 1, 1, 1), (2, 7, 3, 8), (1, 33, 2, 12), (3, 160, 2, 64)])
def test_it_is_attention(batch, tokens, heads, width, instructions, monkeypatch):
    """Of any size, with whatever registers there are: fewer tokens than a register holds, and one too many."""
    if instructions != "native":
        monkeypatch.setattr(compiled, "OPTIONS", (*compiled.OPTIONS, instructions))
    sides = draw(batch, tokens, heads, width)
    monkeypatch.setattr(compiled.F, "scaled_dot_product_attention", None)  # which is not called
    torch.testing.assert_close(attend(*sides).double(), written_out(*sides), atol=3e-6, rtol=0)


@needs_compiler
def test_channel_attention_in_bfloat16_computes_in_float32():
    sides = draw(2, 768, 3, 12, dtype=torch.bfloat16)
    context = attend(*sides)
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.double(), written_out(*sides), atol=1e-3, rtol=2**-8)  # as rounded at the end


@needs_compiler
def test_heads_may_lie_in_memory_in_any_order():
    sides = [x.contiguous() for x in draw(2, 20, 3, 12)]
    torch.testing.assert_close(attend(*sides).double(), written_out(*sides), atol=3e-6, rtol=0)


@needs_compiler
@pytest.mark.parametrize("scale", [6.0, 30.0, -200.0])  # exponentials of all sizes; some infinite; all of them 0
def test_logits_of_any_size(scale):
    query, key, value = draw(2, 40, 3, 8)
    sides = (query * scale, key, value) if scale > 0 else (query.abs() * scale, key.abs(), value)
    torch.testing.assert_close(attend(*sides).double(), written_out(*sides), atol=1e-4, rtol=0)


@needs_compiler
def test_one_query_of_large_logits_among_others():
    query, key, value = draw(1, 40, 2, 8)
    query[:, :, 0] *= 500
    torch.testing.assert_close(attend(query, key, value).double(), written_out(query, key, value), atol=1e-4, rtol=0)


def weigh_two(logits):
    """The weight (N,) of the first of two tokens whose logits are `logits` (N,) and 0."""
    ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
    query, key, value = (
        torch.stack(both, dim=1)[:, None, :, None]  # (N, 1, 2, 1)
        for both in ((logits, zeros), (ones, zeros), (ones, zeros))
    )
    return attend(query, key, value)[:, 0, 0, 0]


@needs_compiler
def test_exponentials_are_as_exact_as_float32(monkeypatch):
    monkeypatch.setattr(compiled.F, "scaled_dot_product_attention", None)
    logits = torch.linspace(-2, 2, 4001)
    torch.testing.assert_close(weigh_two(logits).double(), logits.double().sigmoid(), rtol=4e-7, atol=0)


@needs_compiler
@pytest.mark.parametrize("logit", [-355.0, -88.0, -30.0, 30.0, 41.0, 42.0, 88.0, 355.0])
def test_exponentials_beyond_float32(logit):
    logits = torch.tensor([logit])
    torch.testing.assert_close(weigh_two(logits), logits.sigmoid(), rtol=1e-5, atol=1e-30)


@needs_compiler
@pytest.mark.parametrize("side", [0, 1, 2])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(side, wrong):
    sides = draw(1, 20, 2, 8)
    sides[side][0, 1, 5, 3] = wrong
    expected = torch.nn.functional.scaled_dot_product_attention(*sides).transpose(1, 2)
    torch.testing.assert_close(attend(*sides), expected, equal_nan=True, atol=3e-6, rtol=0)


@pytest.mark.parametrize("masked, queries", [(True, 9), (False, 1)])
def test_masks_and_fewer_queries_are_left_to_pytorch(masked, queries):
    query, key, value = draw(2, 9, 3, 8)
    mask = torch.arange(9).expand(2, 1, queries, 9) < 6 if masked else None
    seen = 6 if masked else 9
    expected = written_out(query[:, :, :queries], key[:, :, :seen], value[:, :, :seen])
    torch.testing.assert_close(attend(query[:, :, :queries], key, value, mask).double(), expected, atol=3e-6, rtol=0)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    sides = draw(2, 50, 3, 12)
    threads = torch.get_num_threads()
    try:
        contexts = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            contexts.append(attend(*sides))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(context, contexts[0]) for context in contexts)


@pytest.mark.skipif(not can_prepack(make_model(), None), reason="this machine has no oneDNN")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true x"])  # absent, failing, giving nothing
def test_without_a_compiler_scores_are_the_same(compiler, monkeypatch, caplog):
    model, (images, captions) = make_model(), make_sides()
    expected = score_matrix(model, images, captions, progress=False)
    compiled_for.cache_clear()
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO, "ieft.cpu.attention"):
        scores = score_matrix(model, images, captions, progress=False)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert "PyTorch's attention" in caplog.text


@needs_compiler
def test_the_compiler_may_be_named_with_more_words(monkeypatch):
    monkeypatch.setenv("CXX", "env c++ -O2")
    assert compiled_for(4) is not None


def test_the_source_is_in_the_wheel(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*", "outputs", "*.egg-info", "build"))
    subprocess.run([*command, str(tmp_path), str(tmp_path / "clone")], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "ieft/cpu/attention.cpp" in zipfile.ZipFile(wheel).namelist()
