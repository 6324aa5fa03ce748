"""Tests of prepacked networks against the networks that they were made from."""

import copy
import ctypes
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_recipe import make_inputs, make_published_state_dict
from test_ranking import make_model, make_sides, slow_matrix
from torch import nn

from configuration_ieft import IeftConfig
from convert_checkpoint import rename_published
from ieft.cpu import prepacked
from ieft.cpu.attention import CPU_ATTENTION
from ieft.cpu.prepacked import PrepackedLinear, can_prepack, prepack
from ieft.evaluation.ranking import score_matrix, score_pairs
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


def score(model):
    images, captions = make_sides(2, 3)
    return score_pairs(model, images, captions, [(0, 0), (1, 2)], progress=False)


@pytest.fixture
def copies(monkeypatch):
    """Weak references to the copies that are made."""
    made = []
    make = prepacked.prepack

    def prepack_and_note(*args):
        copied = make(*args)
        made.append(weakref.ref(copied))
        return copied

    monkeypatch.setattr(prepacked, "prepack", prepack_and_note)
    return made


def a_linear(model):
    return model.vilt.encoder.layer[2].intermediate.dense


def change_in_place(model):
    with torch.no_grad():
        a_linear(model).weight.mul_(2)


def change_data(model):
    a_linear(model).weight.data.mul_(2)


def put_other_data(model):
    """Twice, so that the second may lie where the first was."""
    for _ in range(2):
        a_linear(model).bias.data = torch.randn(48)


def replace_module(model):
    layer = model.vilt.encoder.layer[2].intermediate
    layer.dense = nn.Linear(24, 48)


def replace_activation(model):
    model.vilt.encoder.layer[2].intermediate.activation = nn.ReLU()


def load(model):
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()}, assign=True)


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[3, 4]]), pixel_values=torch.rand(1, 3, 32, 32)).logits.sum().backward()
    optimizer.step()


def change_bias_alone(model):
    with torch.no_grad():
        model.rank_output.bias.add_(1)


def change_configuration(model):
    model.config.first_joint_layer = 1


CHANGES = [
    change_in_place, change_data, put_other_data, replace_module, replace_activation, load, train, change_bias_alone,
    change_configuration,
]  # fmt: skip


@needs_mkldnn
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_between_queries_scores_as_a_model_never_seen(change, copies):
    torch.set_num_threads(1)
    model = make_model().eval()
    before = score(model)
    assert np.array_equal(score(model), before) and len(copies) == 1
    change(model)
    after = score(model)
    assert np.array_equal(after, score(copy.deepcopy(model))) and len(copies) == 3
    assert not np.array_equal(after, before)
    gc.collect()
    assert copies[0]() is None


@needs_mkldnn
def test_what_is_kept_is_freed_with_the_model_in_training_and_in_other_types(copies):
    model = make_model().eval()
    before = score(model)
    model.double()
    np.testing.assert_allclose(score(model), before, atol=1e-5)
    gc.collect()
    assert copies[0]() is None
    model.float()
    assert np.array_equal(score(model), before) and len(copies) == 2
    model.train()
    assert np.array_equal(score(model), before) and len(copies) == 3
    gc.collect()
    assert copies[1]() is None and copies[2]() is None and model.training
    score(model.eval())
    del model
    gc.collect()
    assert copies[3]() is None


PAGES_TAKEN_ANEW = """
import contextlib, os, resource
from ieft.cpu.prepacked import memory_kept
import torch

def measure(way):
    with memory_kept() if way == "kept" else contextlib.nullcontext():
        for step in range(60):
            if step == 10:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(12_000_000) for _ in range(2)]  # 48 MB each
            del tensors
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults, int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6, flush=True)

for way in ("kept", "anew"):  # each in a process of its own, as it is after the imports
    child = os.fork()
    if not child:
        measure(way)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_memory_is_kept_meanwhile_and_given_back_afterwards():
    command = [sys.executable, "-c", PAGES_TAKEN_ANEW]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    kept, memory_after, anew, memory_else = map(float, done.stdout.split())
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
