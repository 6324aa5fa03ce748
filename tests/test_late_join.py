"""Tests of late fusion: against one forward pass under an attention mask, and ways of scoring against each other."""

import numpy as np
import pytest
import torch
from test_ranking import make_sides, one_thread, slow_matrix  # noqa: F401

import modeling_ieft
from configuration_ieft import IeftConfig
from ieft.evaluation import ranking
from ieft.evaluation.ranking import score_matrix, score_pairs
from modeling_ieft import IeftForImageTextRetrieval

NUM_BLOCKS = 4
JOINS = range(NUM_BLOCKS)


def make_model(join, **changes):
    """Equal weights for every fusion layer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 2,
        "intermediate_size": 48, "image_size": 32, "patch_size": 8, "enhancement_layers": [0, 1, 3],
        "initializer_range": 0.2, "contrastive_dim": 8, "first_joint_layer": join,
    }  # fmt: skip
    return IeftForImageTextRetrieval(IeftConfig(**(sizes | changes))).eval()


def make_inputs(num_pairs=3, length=7):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 50, (num_pairs, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, length - 3 :] = 0
    pixel_values = torch.rand(num_pairs, 3, 32, 32, generator=generator) * 2 - 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


def block_by_block(model, join, input_ids, attention_mask, pixel_values):
    """The whole pair in every block, masked between caption and image below the fusion layer: scores (B,), states."""
    network = model.vilt
    text = network.embeddings.mark_captions(network.embed_captions(input_ids))
    image = network.embeddings.mark_images(network.embed_images(pixel_values))
    hidden, length = torch.cat([text, image], dim=1), text.shape[1]
    is_text = torch.arange(hidden.shape[1]) < length
    real = torch.cat([attention_mask.bool(), torch.ones(image.shape[:2], dtype=torch.bool)], dim=1)
    states = [hidden]
    for block, layer in enumerate(network.encoder.layer):
        together = torch.ones(len(is_text), len(is_text), dtype=torch.bool)
        seen = together if block >= join else is_text[:, None] == is_text
        hidden, _ = layer(network.encoder.enhance(block, hidden), (seen & real[:, None])[:, None])
        states.append(hidden)
    first = network.layernorm(hidden)
    return model.rank_output(network.pooler(first))[:, 0], states


# The plain forward pass ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("join", JOINS)
def test_the_forward_pass_is_one_under_a_mask(join):
    model, inputs = make_model(join), make_inputs()
    expected, states = block_by_block(model, join, **inputs)
    output = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(output.logits[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(**inputs).logits[:, 0], expected, atol=1e-5, rtol=0)
    real = torch.cat([inputs["attention_mask"].bool(), torch.ones(3, 17, dtype=torch.bool)], dim=1)
    for ours, theirs in zip(output.hidden_states[:-1], states[:-1], strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)


@torch.no_grad()
def test_joins_differ():
    scores = torch.stack([make_model(join)(**make_inputs()).logits[:, 0] for join in JOINS])
    assert torch.pdist(scores).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("join", JOINS)
def test_attentions_stay_within_each_side_below_the_join(join):
    attentions = make_model(join)(**make_inputs(), output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(3, 2, 24, 24)] * NUM_BLOCKS
    for block, attention in enumerate(attentions):
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 24))
        across = attention[..., :7, 7:].abs().max() + attention[..., 7:, :7].abs().max()
        assert (across > 0) == (block >= join)


@torch.no_grad()
@pytest.mark.parametrize("join", JOINS)
def test_any_pairing_equals_row_by_row(join):
    model, inputs = make_model(join), make_inputs()
    images, captions = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 1, 2, 0])
    options = {"output_hidden_states": True, "output_attentions": True}
    paired = model(**inputs, pair_images=images, pair_captions=captions, **options)
    rows = model(inputs["input_ids"][captions], inputs["attention_mask"][captions],
                 pixel_values=inputs["pixel_values"][images], **options)  # fmt: skip
    torch.testing.assert_close(paired.logits, rows.logits)
    torch.testing.assert_close(paired.hidden_states[1], rows.hidden_states[1])
    torch.testing.assert_close(paired.attentions[0], rows.attentions[0])


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("captions", [[[0, 2], [1, 1], [2, 0]], [[2, 0]]])
@pytest.mark.parametrize("images", [None, [2, 0, 0]])
def test_groups_of_captions_equal_their_pairs(join, captions, images):
    """Scores, features and gradients of images with groups of captions, against pairs given one by one."""
    model, inputs = make_model(join), make_inputs()
    captions = torch.tensor(captions)
    images = images if images is None else torch.tensor(images)
    pairs = (torch.arange(3) if images is None else images).repeat_interleave(2), captions.expand(3, 2).flatten()
    results = []
    for pair_images, pair_captions in ((images, captions), pairs):
        model.zero_grad()
        output = model(**inputs, pair_images=pair_images, pair_captions=pair_captions, output_features=True)
        similarity = output.image_features @ output.text_features.T
        (output.logits.flatten() @ torch.arange(6.0) + similarity.square().sum()).backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        results.append((output.logits, output.image_features, output.text_features, gradients))
    assert results[0][0].shape == (6, 1)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "checkpointed"])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
@pytest.mark.parametrize("join", JOINS)
def test_groups_of_one_draw_the_dropout_of_their_pairs(join, attention_dropout, checkpointing):
    model = make_model(join, hidden_dropout_prob=0.3, attention_probs_dropout_prob=attention_dropout).train()
    inputs = make_inputs() | {"attention_mask": None}
    results = []
    for captions in (torch.tensor([2, 0, 1]), torch.tensor([[2], [0], [1]])):
        torch.manual_seed(3)
        model.zero_grad()
        logits = model(**inputs, pair_captions=captions).logits
        (logits.flatten() @ torch.arange(1, 4.0)).backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        results.append((logits, gradients))
        if checkpointing is not None:
            model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def masks_of_all_kinds():
    """Captions of 7 tokens: whole, of each length, padded before, with a hole, and of nothing."""
    masks = [[1] * count + [0] * (7 - count) for count in (7, 3, 5, 1, 2, 7, 4, 6, 3)]
    return torch.tensor([*masks, [0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0], [0] * 7])


@pytest.mark.parametrize("join", JOINS[:-1])
def test_pairs_by_length_of_captions_equal_those_given_one_by_one(join, monkeypatch):
    monkeypatch.setattr(modeling_ieft, "NUMBERS_AT_LEAST", 1)
    model, mask = make_model(join), masks_of_all_kinds()
    inputs = make_inputs(len(mask)) | {"attention_mask": mask}
    captions = torch.randint(len(mask), (5, 6), generator=torch.Generator().manual_seed(2))
    images = torch.tensor([3, 3, 0, 1, 2])
    results = []
    for pairs in ((images, captions), (images.repeat_interleave(6), captions.flatten())):
        model.zero_grad()
        logits = model(**inputs, pair_images=pairs[0], pair_captions=pairs[1]).logits
        (logits.flatten() @ torch.arange(30.0)).backward()
        results.append((logits, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("join", JOINS)
def test_groups_compute_each_side_once_and_leave_padding_out(join, monkeypatch):
    """Rows of the fusion layer's keys: those of both sides; of the block after it: those of pairs without padding."""
    monkeypatch.setattr(modeling_ieft, "NUMBERS_AT_LEAST", 1)
    model, lengths = make_model(join), torch.tensor([7, 2, 3])
    inputs = make_inputs() | {"attention_mask": (torch.arange(7) < lengths[:, None]).long()}
    rows = [[] for _ in JOINS]
    for block, layer in enumerate(model.vilt.encoder.layer):
        layer.attention.attention.key.register_forward_hook(
            lambda _, given, __, block=block: rows[block].append(given[0].shape[:-1].numel())
        )
    model(**inputs, pair_captions=torch.arange(3)[None])
    assert sum(rows[join]) == 3 * 7 + 3 * 17
    for block in JOINS[join + 1 :]:
        assert sum(rows[block]) == 3 * int(lengths.sum()) + 9 * 17


@pytest.mark.parametrize("join", JOINS)
def test_a_mask_that_would_be_broadcast_is_refused(join):
    inputs = make_inputs() | {"attention_mask": torch.ones(1, 7, dtype=torch.long)}
    for captions in (None, torch.tensor([[0, 1]])):
        with pytest.raises(ValueError, match="attention_mask of shape"):
            make_model(join)(**inputs, pair_captions=captions)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        make_model(join).prepare_captions(inputs["input_ids"], inputs["attention_mask"])


def test_groups_that_do_not_fit_the_images_are_refused():
    with pytest.raises(ValueError, match="One row of captions for each image expected"):
        make_model(NUM_BLOCKS - 1)(**make_inputs(), pair_captions=torch.tensor([[0], [1]]))


@torch.no_grad()
def test_the_published_network_keeps_its_bits():
    """Fusion layer 0, as stored before there was a choice, and as computed block by block."""
    model, inputs = make_model(0), make_inputs()
    network = model.vilt
    text = network.embeddings.mark_captions(network.embed_captions(inputs["input_ids"]))
    image = network.embeddings.mark_images(network.embed_images(inputs["pixel_values"]))
    hidden = torch.cat([text, image], dim=1)
    for block, layer in enumerate(network.encoder.layer):
        hidden = network.encoder.enhance(block, hidden)
        hidden, _ = layer(hidden, num_queries=1 if block == NUM_BLOCKS - 1 else None)
    expected = model.rank_output(network.pooler(network.layernorm(hidden)))
    assert torch.equal(model(**inputs | {"attention_mask": None}).logits, expected)


# Embeddings ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("join", JOINS)
def test_embeddings_are_those_of_each_side_alone(join):
    model, inputs = make_model(join), make_inputs()
    together = model(**inputs, output_features=True)
    image = model.get_image_features(inputs["pixel_values"])
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(together.image_features, image)
    torch.testing.assert_close(together.text_features, text)
    torch.testing.assert_close(model.get_text_features(inputs["input_ids"][1:2, :4])[0], text[1])  # without padding
    if join:
        states = model.read_images(inputs["pixel_values"])
        torch.testing.assert_close(model.get_image_features(image_states=states), image)
    else:
        with pytest.raises(ValueError, match="first_joint_layer above 0"):
            model.get_image_features(image_states=model.read_images(inputs["pixel_values"]))


@pytest.mark.parametrize("join", JOINS)
def test_every_parameter_is_used(join):
    model = make_model(join).train()
    output = model(**make_inputs(), output_features=True)
    similarity = output.similarity_scale * output.image_features @ output.text_features.T
    (output.logits.sum() + similarity.square().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# Ranking -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("join", JOINS)
def test_prepared_halves_score_as_the_plain_forward(join):
    model, inputs = make_model(join), make_inputs()
    plain = model(**inputs).logits[:, 0]
    captions = model.prepare_captions(inputs["input_ids"], inputs["attention_mask"])
    for images in (
        model.prepare_images(inputs["pixel_values"]),
        model.prepare_images(image_states=model.read_images(inputs["pixel_values"])),
    ):
        torch.testing.assert_close(model.score_prepared(captions, images), plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.score_prepared(captions.take([1]), images)[1], plain[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.score_prepared(captions, images.take([1]))[1], plain[1], atol=1e-5, rtol=0)
        assert model.score_prepared(captions.take([1]), images.take([1])).shape == (1,)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
def test_matrix_equals_a_double_loop(join, batch_tokens):
    model, (images, captions) = make_model(join), make_sides()
    scores = score_matrix(model, images, captions, batch_tokens=batch_tokens, progress=False)
    np.testing.assert_allclose(scores, slow_matrix(model, images, captions), atol=1e-5)


@pytest.mark.parametrize("join", JOINS)
def test_pairs_and_states_are_entries_of_the_matrix(join, monkeypatch):
    monkeypatch.setattr(ranking, "FEWEST_TILES", 2)  # several images to a tile, with one to three pairs each
    model, (images, captions) = make_model(join), make_sides()
    matrix = slow_matrix(model, images, captions)
    pairs = [(4, 0), (0, 10), (4, 3), (2, 2), (0, 2), (1, 5), (4, 7), (3, 3)]
    expected = [matrix[pair] for pair in pairs]
    with torch.no_grad():
        states = model.read_images(images)
    for given in (images, states):
        np.testing.assert_allclose(score_pairs(model, given, captions, pairs, progress=False), expected, atol=1e-5)
    assert score_pairs(model, states, captions, [], progress=False).shape == (0,)


@pytest.mark.parametrize("join", JOINS)
def test_bfloat16_scores_nearly_the_same(join, monkeypatch):
    monkeypatch.setattr(ranking, "multiplies_bfloat16", lambda: True)  # imitated, if need be
    model, (images, captions) = make_model(join), make_sides()
    exact = score_matrix(model, images, captions, progress=False)
    half = score_matrix(model, images, captions, dtype=torch.bfloat16, progress=False)
    assert not np.array_equal(exact, half) and np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.99


def test_images_are_never_copied_for_their_pairs(monkeypatch):
    """One pass for an image and all its captions of any length: as many groups as images."""
    model, (images, captions) = make_model(NUM_BLOCKS - 1), make_sides()
    seen, original = [], IeftForImageTextRetrieval.score_groups

    def counted(self, captions, images):
        seen.append((tuple(captions.query.shape[:2]), len(images.key)))
        return original(self, captions, images)

    monkeypatch.setattr(IeftForImageTextRetrieval, "score_groups", counted)
    score_matrix(model, images, captions, progress=False)
    assert seen == [((1, 9), 1)] * 5
    seen.clear()
    monkeypatch.setattr(ranking, "FEWEST_TILES", 1)
    score_pairs(model, images, captions, [(row, 3) for row in range(5)], progress=False)
    assert seen == [((5, 1), 5)]


def test_kept_scores_of_one_join_are_not_those_of_another(tmp_path):
    images, captions = make_sides()
    for join in JOINS:
        kept = score_matrix(make_model(join), images, captions, progress=False, score_cache=tmp_path)
        assert np.array_equal(kept, score_matrix(make_model(join), images, captions, progress=False))
    assert len(list(tmp_path.iterdir())) == NUM_BLOCKS * len(images)


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", [-1, NUM_BLOCKS])
def test_a_join_outside_the_network_says_what_was_expected(join):
    with pytest.raises(ValueError, match=f"from 0 .the published network. to {NUM_BLOCKS - 1} .*got {join}"):
        make_model(join)


@pytest.mark.parametrize("join", [True, "1", 1.5, [1]])
def test_a_join_that_is_no_whole_number_says_what_was_expected(join):
    with pytest.raises(ValueError, match="first_joint_layer must be a block index"):
        IeftConfig(first_joint_layer=join)


def test_one_checkpoint_starts_every_join(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    loaded = IeftForImageTextRetrieval.from_pretrained(tmp_path, first_joint_layer=3)
    torch.testing.assert_close(loaded(**make_inputs()).logits, make_model(3)(**make_inputs()).logits)
    with pytest.raises(ValueError, match=f"got {NUM_BLOCKS}"):
        IeftForImageTextRetrieval.from_pretrained(tmp_path, first_joint_layer=NUM_BLOCKS)
    loaded.save_pretrained(tmp_path / "late")
    again = IeftForImageTextRetrieval.from_pretrained(tmp_path / "late")
    assert again.config.first_joint_layer == 3 and torch.equal(
        again(**make_inputs()).logits, loaded(**make_inputs()).logits
    )
    assert "first_joint_layer" in (tmp_path / "late" / "config.json").read_text()
