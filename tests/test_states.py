"""Tests of the feature cache: image features as bytes and back."""

import numpy as np
import pytest
import torch
from test_late_join import make_inputs, make_model

from ieft.evaluation import ranking
from ieft.evaluation.ranking import score_matrix
from ieft.search.feature_cache import decode_state, encode_state


def make_state(num_tokens=17, width=24):
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-3, 3, num_tokens)[:, None]  # tokens of very different magnitude
    state = torch.randn(num_tokens, width, generator=generator) * size
    state[3] = 0
    return state


@pytest.mark.parametrize("kind, size", [("bf16", 10 + 2 * 17 * 24), ("int8", 10 + 17 * (24 + 4))])
def test_a_state_comes_back_within_its_precision(kind, size):
    state = make_state()
    content = encode_state(state, kind)
    assert isinstance(content, bytes) and len(content) == size
    back = decode_state(content)
    assert back.dtype == torch.float32 and back.shape == state.shape
    largest = state.abs() if kind == "bf16" else state.abs().amax(dim=1, keepdim=True)
    assert ((back - state).abs() <= largest / 250).all()
    assert encode_state(back, kind) == content  # nothing more is lost


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_scores_from_bytes_are_nearly_those_from_pixels(kind):
    model, images = make_model(3), make_inputs()["pixel_values"]
    captions = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with torch.no_grad():
        states = [decode_state(encode_state(state, kind)) for state in model.read_images(images)]
    exact = score_matrix(model, images, captions, progress=False)
    stored = score_matrix(model, states, captions, progress=False)
    assert 0 < abs(stored - exact).max() < 0.05 * exact.std()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scores_from_keys_and_values_are_those_from_states(dtype, monkeypatch):
    monkeypatch.setattr(ranking, "supported_dtype", lambda model, dtype: dtype)  # also where it takes longer
    model, images = make_model(3), make_inputs()["pixel_values"]
    states = model.read_images(images)
    features = model.read_keys_and_values(states)
    assert features.shape == (*states.shape[:2], 2 * states.shape[2])
    captions = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    expected, scores = (
        score_matrix(model, list(some), captions, dtype=dtype, progress=False) for some in (states, features)
    )
    np.testing.assert_allclose(scores, expected, atol=1e-5 if dtype is None else 0.05 * expected.std())
    with pytest.raises(ValueError, match=r"\(first_joint_layer 3\); that of this one is 2"):
        make_model(2).read_keys_and_values(states)


@pytest.mark.parametrize(
    "content", [b"", b"int8", encode_state(make_state())[:-1], encode_state(make_state()) + b"?", b"x" * 700]
)
def test_other_bytes_are_refused(content):
    with pytest.raises(ValueError, match=f"got {len(content)} bytes"):
        decode_state(content)


@pytest.mark.parametrize(
    "state, kind, message",
    [
        (torch.zeros(2, 3, 4), "int8", r"\(T, D\) finite numbers; got \(2, 3, 4\)"),
        (torch.full((2, 3), torch.nan), "bf16", "not finite"),
        (torch.zeros(2, 3), "int4", "bf16, int8, or pq with the bytes of a token, such as pq96; got 'int4'"),
    ],
)
def test_what_cannot_be_stored_says_so(state, kind, message):
    with pytest.raises(ValueError, match=message):
        encode_state(state, kind)
