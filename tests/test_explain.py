"""Tests of heat maps and word contributions, on a network whose weights are set by hand to detect squares."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from test_modeling import tiny_config
from transformers import BertTokenizer

from ieft.search.explain import draw_heat_map, explain_pair
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PATCH, GRID = 8, 4


def say(colour):
    return f"there is a {colour} square ."


def draw_squares(draw):
    """An image of two squares of one patch each on black: PIL image, colours, places in raster order."""
    pixels = np.zeros((GRID * PATCH, GRID * PATCH, 3), np.uint8)
    colours, places = draw.choice(list(COLOURS), 2, replace=False), draw.choice(GRID**2, 2, replace=False)
    for colour, (row, column) in zip(colours, np.stack(np.divmod(places, GRID), axis=1) * PATCH, strict=True):
        pixels[row : row + PATCH, column : column + PATCH] = COLOURS[colour]
    return Image.fromarray(pixels), colours, places


@pytest.fixture(scope="module")
def processor():
    tokenizer = BertTokenizer().train_new_from_iterator(map(say, COLOURS), vocab_size=80)
    return IeftProcessor(IeftImageProcessor(GRID * PATCH), tokenizer)


@pytest.fixture(scope="module")
def model(processor):
    """Set by hand: block 0 brings the colour that is asked for to text token 0, block 1 looks for patches of it there.

    Of the 24 numbers of a token, 0 to 2 are a patch's colour, 3 to 5 a word's, 6 to 8 the colour that is asked for, 9
    whether a patch was found: the score.
    """
    sizes = {"num_hidden_layers": 2, "enhancement_layers": [], "contrastive_dim": 0, "qkv_bias": False}
    model = IeftForImageTextRetrieval(tiny_config(vocab_size=len(processor.tokenizer), **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(float("norm" in name.lower() and name.endswith("weight")))
        embeddings, blocks = model.vilt.embeddings, model.vilt.encoder.layer
        embeddings.token_type_embeddings.weight[0, 10] = 1  # a measure for the others, since norms forget the scale
        embeddings.patch_embeddings.projection.bias[:3] = 0.5  # black is 0
        for colour, word in enumerate(COLOURS):
            embeddings.patch_embeddings.projection.weight[colour, colour] = 0.5 / PATCH**2
            token = processor.tokenizer.convert_tokens_to_ids(word)
            embeddings.text_embeddings.word_embeddings.weight[token, 3 + colour] = 1
            blocks[0].attention.attention.value.weight[colour, 3 + colour] = 1  # no query: all tokens count alike
            blocks[0].attention.output.dense.weight[6 + colour, colour] = 1
            blocks[1].attention.attention.query.weight[colour, 6 + colour] = 5
            blocks[1].attention.attention.key.weight[colour, colour] = 1
        blocks[1].attention.attention.value.weight[0, :3] = 1
        blocks[1].attention.output.dense.weight[9, 0] = 1
        model.vilt.pooler.dense.weight[0, 9] = 0.3
        model.rank_output.weight[0, 0] = 10
    return model


def pairs_of(count):
    """Images with a matching caption and the place that it describes."""
    draw = np.random.default_rng(1)
    for _ in range(count):
        image, colours, places = draw_squares(draw)
        yield image, str(colours[0]), int(places[0])


def hide(image, places):
    """The image with some patches painted black."""
    pixels = np.array(image)
    for row, column in np.stack(np.divmod(places, GRID), axis=1) * PATCH:
        pixels[row : row + PATCH, column : column + PATCH] = 0
    return Image.fromarray(pixels)


def score(model, processor, image, caption):
    return model.rank(caption, [image], processor=processor)[0]["score"]


@pytest.mark.parametrize("join", [0, 1])  # block 0 brings what is asked for to token 0 with the image and without it
def test_the_hottest_patch_is_the_one_that_the_caption_speaks_of(model, processor, join):
    model = copy.deepcopy(model)
    model.config.first_joint_layer = join
    hottest = [
        explain_pair(model, processor, image, say(colour)).heat.argmax() == place
        for image, colour, place in pairs_of(60)
    ]
    assert all(hottest)  # by chance one in 16


def test_hiding_what_is_hot_lowers_the_score_more_than_hiding_what_is_cold(model, processor):
    falls = []
    for image, colour, _ in pairs_of(40):
        found = explain_pair(model, processor, image, say(colour))
        order = found.heat.ravel().argsort()
        hidden = [score(model, processor, hide(image, places), say(colour)) for places in (order[-2:], order[:2])]
        falls.append(found.score - np.array(hidden))
    hot, cold = np.mean(falls, axis=0)
    assert hot > 2 and abs(cold) < hot / 4


def test_the_word_that_decides_contributes_most(model, processor):
    for image, colour, _ in pairs_of(20):
        words = explain_pair(model, processor, image, say(colour)).words
        assert [word for word, _ in words] == say(colour).split()
        assert max(words, key=lambda pair: pair[1])[0] == colour


def test_a_contribution_is_the_score_less_the_score_without_the_word(model, processor):
    """One word at a time, pieces and all, by the attention mask of a plain forward pass."""
    image, caption = next(pairs_of(1))[0], "there is a Reder square."
    found = explain_pair(model, processor, image, caption)
    assert [word for word, _ in found.words] == ["there", "is", "a", "Reder", "square", "."]
    inputs = processor(images=[image], text=[caption])
    with torch.no_grad():
        assert found.score == pytest.approx(model(**inputs).logits.item(), abs=1e-5)
        pieces = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        assert len(pieces) > 8  # "Reder" is more than one
        inputs["attention_mask"][0, 4 : len(pieces) - 3] = 0
        assert found.words[3][1] == pytest.approx(found.score - model(**inputs).logits.item(), abs=1e-5)


def test_explaining_is_repeatable_and_leaves_the_model_as_it_was(model, processor):
    model = copy.deepcopy(model).requires_grad_(False).train()
    model.vilt.pooler.eval()
    image, colour, _ = next(pairs_of(1))
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        first, second = (explain_pair(model, processor, image, say(colour)) for _ in range(2))
    assert np.array_equal(first.heat, second.heat) and first.score == second.score and first.words == second.words
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(not weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert model.config._attn_implementation == "sdpa" and not model.config.output_attentions


def test_where_nothing_speaks_for_the_caption_the_map_is_cold(model, processor):
    deaf = copy.deepcopy(model)
    torch.nn.init.zeros_(deaf.rank_output.weight)  # the same score for all
    assert not explain_pair(deaf, processor, next(pairs_of(1))[0], say("red")).heat.any()
    with pytest.raises(ValueError, match="empty"):
        explain_pair(model, processor, next(pairs_of(1))[0], " ")


def test_the_heat_is_drawn_where_it_is():
    heat = np.zeros((4, 4))
    heat[0, 3] = 1
    grey = Image.new("L", (120, 80), 100)
    drawn = np.asarray(draw_heat_map(grey, heat)).astype(int)
    assert drawn.shape == (80, 80, 3)  # the centre square
    changed = abs(drawn - 100).max(axis=2)
    assert changed[:20, 60:].min() > 20 and changed[40:].max() == changed[:, :30].max() == 0
    assert draw_heat_map(grey, heat, fit="squash").size == (120, 80)
