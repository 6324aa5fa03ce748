"""Tests of prepacked networks against the networks that they were made from."""

import ctypes
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_recipe import make_inputs, make_published_state_dict
from test_ranking import make_model, make_sides, slow_matrix
from torch import nn

from configuration_ieft import IeftConfig
from convert_checkpoint import rename_published
from ieft.cpu.attention import CPU_ATTENTION
from ieft.cpu.prepacked import PrepackedLinear, can_prepack, prepack
from ieft.evaluation.ranking import score_matrix
from modeling_ieft import IeftForImageTextRetrieval

needs_mkldnn = pytest.mark.skipif(not can_prepack(make_model(), None), reason="this machine has no oneDNN")
needs_bf16 = pytest.mark.skipif(
    not can_prepack(make_model(), torch.bfloat16), reason="this machine has no bfloat16 products in oneDNN"
)


@needs_mkldnn
@pytest.mark.parametrize("num_tokens", [1, 7, 3000])
@pytest.mark.parametrize("bias, gelu", [(True, True), (True, False), (False, True)])
def test_a_laid_out_matrix_multiplies_as_before(num_tokens, bias, gelu):
    torch.manual_seed(0)
    linear = nn.Linear(48, 20, bias=bias)
    inputs = torch.randn(2, num_tokens, 48)
    expected = nn.functional.gelu(linear(inputs)) if gelu else linear(inputs)
    given = PrepackedLinear(linear, torch.float32, fuse_gelu=gelu)(inputs)
    torch.testing.assert_close(given, expected.detach(), atol=1e-5, rtol=1e-5)


@needs_mkldnn
def test_the_copy_scores_as_the_model_and_leaves_it_alone():
    model, (images, captions) = make_model().eval(), make_sides()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = slow_matrix(model, images, captions)
    copy = prepack(model)
    assert any(isinstance(module, PrepackedLinear) for module in copy.modules())
    np.testing.assert_allclose(score_matrix(model, images, captions, progress=False), expected, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation != CPU_ATTENTION
    embeddings = model.vilt.embeddings.text_embeddings.word_embeddings.weight
    assert copy.vilt.embeddings.text_embeddings.word_embeddings.weight is embeddings  # shared, not stored twice


PAGES_TAKEN_ANEW = """
import contextlib, resource, sys
from ieft.cpu.prepacked import memory_kept
import torch
with memory_kept() if sys.argv[1] == "kept" else contextlib.nullcontext():
    for step in range(60):
        if step == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(12_000_000) for _ in range(2)]  # 48 MB each
        del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_memory_is_kept_meanwhile_and_given_back_afterwards():
    run = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    (kept, memory_after), (anew, memory_else) = (
        map(float, run([sys.executable, "-c", PAGES_TAKEN_ANEW, way]).stdout.split()) for way in ("kept", "anew")
    )
    assert kept < 1000 < 50 * 2 * 48e6 / 4096 / 2 < anew
    assert memory_after < memory_else + 30


@needs_bf16
def test_bfloat16_ranks_as_float32_on_the_published_network():
    """Spearman's rank correlation, over so many captions that swaps of neighbours hardly change it."""
    model = IeftForImageTextRetrieval(IeftConfig()).eval()
    model.load_state_dict(rename_published(make_published_state_dict(0))[0])
    draw = np.random.default_rng(0)
    captions = [draw.integers(1000, 30000, length).tolist() for length in draw.choice([11, 14, 20], 60)]
    images = make_inputs()[0][:1]
    exact = score_matrix(model, images, captions, progress=False)
    half = score_matrix(model, images, captions, dtype=torch.bfloat16, progress=False)
    assert not np.array_equal(exact, half)
    ranks = [scores[0].argsort().argsort() for scores in (exact, half)]
    assert np.corrcoef(*ranks)[0, 1] > 0.995
