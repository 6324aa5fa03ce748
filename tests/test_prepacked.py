"""Networks laid out for a CPU against the networks that they were made from."""

import numpy as np
import pytest
import torch
from golden_recipe import make_inputs, make_published_state_dict
from test_ranking import make_model, make_sides, slow_matrix
from torch import nn

from configuration_ieft import IeftConfig
from convert_checkpoint import rename_published
from ieft.prepacked import BLOCKWISE, PrepackedLinear, blockwise_attention, can_prepack, prepack
from ieft.ranking import score_matrix
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
    assert model.config._attn_implementation != BLOCKWISE
    embeddings = model.vilt.embeddings.text_embeddings.word_embeddings.weight
    assert copy.vilt.embeddings.text_embeddings.word_embeddings.weight is embeddings  # shared, not stored twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # small logits, and some whose exponentials would be infinite
def test_attention_in_blocks_is_attention(dtype, scale, monkeypatch):
    monkeypatch.setattr("ieft.prepacked.LOGITS_AT_ONCE", 50)  # several blocks, the last one smaller
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 8).unbind()
    query = query * scale
    context, _ = blockwise_attention(None, *(x.to(dtype) for x in (query, key, value)), None, 8**-0.5)
    expected = (query @ key.transpose(2, 3) * 8**-0.5).softmax(-1) @ value  # (B, H, Q, E)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * scale**0.5
    torch.testing.assert_close(context.float(), expected.transpose(1, 2), atol=tolerance, rtol=0)


@needs_bf16
def test_bfloat16_ranks_as_float32_on_the_published_network():
    """Spearman's rank correlation over captions enough that neighbours changing places are no more than that."""
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
