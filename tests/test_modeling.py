"""Tests of the network: equal to the published one, deterministic, with clear errors for wrong input."""

import json
import math

import pytest
import torch
from golden_recipe import GOLDEN_FOLDER, is_unused, load_golden, make_inputs, make_published_state_dict

from configuration_ieft import IeftConfig
from convert_checkpoint import rename_published
from modeling_ieft import IeftForImageTextRetrieval, IeftModel


def tiny_config(**changes):
    sizes = {
        "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
        "image_size": 32, "patch_size": 8, "enhancement_layers": [0, 2], "contrastive_dim": 8,
        "initializer_range": 0.2, "hidden_dropout_prob": 0.1,
    }  # fmt: skip
    return IeftConfig(**(sizes | changes))


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return IeftForImageTextRetrieval(tiny_config()).eval()


def tiny_inputs(num_pairs=3, length=7):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 60, (num_pairs, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1:2, length - 2 :] = 0
    pixel_values = torch.rand(num_pairs, 3, 32, 32, generator=generator) * 2 - 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


# Parity with the published network ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_models():
    """Seed -> the full-size network on the golden weights, float32."""
    models = {}
    for seed in (0, 1):
        state_dict, left_over = rename_published(make_published_state_dict(seed))
        model = IeftForImageTextRetrieval(IeftConfig()).eval()
        model.load_state_dict(state_dict)  # strict: every parameter is set, none is left over
        assert [name for name in left_over if not name.startswith("itm_score.")] == ["text_embeddings.position_ids"]
        models[seed] = model
    return models


def score_all(model, dtype, num_captions=10):
    """(6, num_captions) golden scores; captions of one length at a time, trimmed."""
    images, input_ids, attention_mask = make_inputs()
    scores = torch.empty(len(images), num_captions, dtype=dtype)
    with torch.no_grad():
        image_embeds = model.vilt.embed_images(images.to(dtype))
        for column, length in enumerate(attention_mask.sum(1).tolist()[:num_captions]):
            ids = input_ids[column : column + 1, :length]
            pairs = {"pair_images": torch.arange(len(images)), "pair_captions": torch.zeros(len(images)).long()}
            scores[:, column] = model(ids, image_embeds=image_embeds, **pairs).logits[:, 0]
    return scores


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_match_the_published_network(published_models, seed):
    golden = torch.tensor(load_golden(seed)["scores"], dtype=torch.float64)
    model = published_models[seed]
    num_captions = 10 if seed == 0 else 3
    scores = score_all(model.float(), torch.float32, num_captions)
    assert (scores - golden[:, :num_captions]).abs().max() < 1e-4
    exact = score_all(model.double(), torch.float64, num_captions=3)  # which take as long as ten of float32
    assert (exact - golden[:, :3]).abs().max() < 1e-8
    model.float()


def record_stages(model):
    """Outputs of the channel attention and of each whole stage, filled in as the model runs: name -> (B, P, D)."""
    records = {}

    def keep(name, transpose):
        def hook(module, inputs, output):
            records[name] = output[0].transpose(1, 2) if transpose else output

        return hook

    for index, stage in enumerate(model.vilt.encoder.enhancement):
        stage.channel_attention.register_forward_hook(keep(f"vfe{index}_se", transpose=True))
        stage.register_forward_hook(keep(f"vfe{index}_out", transpose=False))
    return records


def close(actual, expected, tolerance=1e-8):
    return (actual - torch.tensor(expected, dtype=torch.float64)).abs().max().item() < tolerance


@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_states_match_the_published_network(published_models, seed):
    model = published_models[seed].double()
    images, input_ids, attention_mask = make_inputs()
    records = record_stages(model)
    for pair in load_golden(seed)["pairs"]:
        row, column = pair["image"], pair["text"]
        with torch.no_grad():
            output = model.vilt(
                input_ids[column : column + 1],
                attention_mask[column : column + 1],
                pixel_values=images[row : row + 1].double(),
                output_hidden_states=True,
            )
        names = ["embeddings"] + [f"block{block}" for block in range(6)]
        states = dict(zip(names, output.hidden_states, strict=True))
        valid = torch.cat([attention_mask[column].bool(), torch.ones(145).bool()])
        for name, golden in pair["hidden"].items():
            if name.startswith("vfe"):
                state = records[name][0]  # (P, D)
                assert close(state.mean(), golden["mean"])
                assert close(state.std(correction=0), golden["std"])
                assert close(state[6, :8], golden["patch6_first8"])
            else:
                state = states[name][0]  # (S, D)
                assert close(state[valid].mean(), golden["mean_valid"])
                assert close(state[valid].std(correction=0), golden["std_valid"])
                assert close(state[0, :8], golden["token0_first8"])
                assert close(state[47, :8], golden["image_token7_first8"])
        assert close(output.last_hidden_state[0, 0, :8], pair["final_norm_token0_first8"])
        assert close(output.pooler_output[0, :16], pair["pooled_first16"])
    model.float()


def test_no_parameter_beyond_the_published_ones_that_run():
    with torch.device("meta"):
        model = IeftForImageTextRetrieval(IeftConfig())
    shapes = json.loads((GOLDEN_FOLDER / "parameter_shapes.json").read_text())
    running = [
        math.prod(shape)
        for name, shape in shapes
        if not is_unused(name) and not name.startswith("itm_score.") and not name.endswith("position_ids")
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(running)


# Determinism -------------------------------------------------------------------------------------------------------


def test_same_input_gives_the_same_bits(tiny_model):
    inputs = tiny_inputs()
    state = torch.get_rng_state()
    first = tiny_model(**inputs, output_features=True)
    assert torch.equal(state, torch.get_rng_state())  # no random number is drawn
    torch.manual_seed(99)
    second = tiny_model(**inputs, output_features=True)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.image_features, second.image_features)


def test_patch_order_matters_and_is_raster(tiny_model):
    """Rolling the image by one patch changes the score; the patch embedding of a marked corner is token 1."""
    inputs = tiny_inputs()
    rolled = inputs | {"pixel_values": inputs["pixel_values"].roll(8, dims=3)}
    assert (tiny_model(**inputs).logits - tiny_model(**rolled).logits).abs().min() > 1e-6
    blank, marked = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    marked[:, :, 8:16, 16:24] = 1  # row 1, column 2 of a 4x4 grid: patch 6
    difference = (tiny_model.vilt.embed_images(marked) - tiny_model.vilt.embed_images(blank)).abs().sum(-1)[0]
    assert difference.nonzero().flatten().tolist() == [1 + 6]


def test_padding_changes_nothing(tiny_model):
    inputs = tiny_inputs(num_pairs=1, length=5)
    padded = inputs | {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 6)),
        "attention_mask": torch.nn.functional.pad(torch.ones(1, 5).long(), (0, 6)),
    }
    plain = inputs | {"attention_mask": None}
    torch.testing.assert_close(tiny_model(**padded).logits, tiny_model(**plain).logits, atol=1e-5, rtol=0)


# The parts of scoring, against the plain forward pass --------------------------------------------------------------


@pytest.mark.parametrize("enhancement_layers", [[], [0, 2], [1]])
def test_prepared_halves_score_as_the_plain_forward(enhancement_layers):
    torch.manual_seed(0)
    model = IeftForImageTextRetrieval(tiny_config(enhancement_layers=enhancement_layers)).eval()
    inputs = tiny_inputs()
    plain = model(**inputs).logits[:, 0]
    images = model.prepare_images(inputs["pixel_values"])
    captions = model.prepare_captions(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(model.score_prepared(captions, images), plain)
    one_caption = model.score_prepared(captions.take([0]), images)
    one_image = model.score_prepared(captions, images.take([0]))
    torch.testing.assert_close(one_caption[0], plain[0])
    torch.testing.assert_close(one_image[0], plain[0])


def test_any_pairing_equals_row_by_row(tiny_model):
    inputs = tiny_inputs()
    images, captions = torch.tensor([2, 0, 0]), torch.tensor([1, 1, 2])
    paired = tiny_model(**inputs, pair_images=images, pair_captions=captions).logits
    rows = tiny_model(inputs["input_ids"][captions], inputs["attention_mask"][captions],
                      pixel_values=inputs["pixel_values"][images]).logits  # fmt: skip
    torch.testing.assert_close(paired, rows)


def test_last_block_for_one_token_equals_the_whole(tiny_model):
    inputs = tiny_inputs()
    whole = tiny_model(**inputs, output_hidden_states=True)  # keeps every token of every block
    torch.testing.assert_close(tiny_model(**inputs).logits, whole.logits)
    assert whole.hidden_states[-1].shape == (3, 7 + 1 + 16, 24)


def test_every_parameter_is_used(tiny_model):
    tiny_model.train()
    output = tiny_model(**tiny_inputs(), output_features=True)
    similarity = tiny_model.similarity_scale() * output.image_features @ output.text_features.T
    (output.logits.sum() + similarity.square().sum()).backward()
    assert [name for name, parameter in tiny_model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "image_size, patch_size, hidden_size, heads", [(32, 32, 16, 2), (48, 16, 20, 5), (56, 8, 36, 3)]
)
def test_any_square_grid_and_width(image_size, patch_size, hidden_size, heads):
    config = tiny_config(
        image_size=image_size, patch_size=patch_size, hidden_size=hidden_size, num_attention_heads=heads
    )
    model = IeftForImageTextRetrieval(config).eval()
    pixel_values = torch.rand(2, 3, image_size, image_size)
    assert model(torch.ones(2, 4).long(), pixel_values=pixel_values).logits.shape == (2, 1)


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel_values": torch.zeros(3, 3, 40, 32)}, r"\(images, 3, 32, 32\) expected; got \(3, 3, 40, 32\)"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "3 captions and 2 images"),
        ({"input_ids": torch.ones(3, 41).long(), "attention_mask": None}, "up to 40 tokens expected.*got 41"),
        ({"attention_mask": torch.ones(3, 9)}, r"\(3, 7\) expected.*\(3, 9\)"),
        ({"pixel_values": None}, "exactly one of pixel_values and image_embeds"),
        ({"pixel_values": None, "pair_captions": torch.zeros(3, 2).long()}, "exactly one of pixel_values"),
        ({"pixel_mask": torch.zeros(3, 32, 32)}, "pixel_mask of ones"),
        ({"pixel_values": None, "image_embeds": torch.zeros(3, 16, 24)}, r"\(images, 17, 24\) expected"),
    ],
)
def test_wrong_input_says_what_was_expected(tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**(tiny_inputs() | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 33}, "multiple of patch_size"),
        ({"image_size": [32, 64]}, "one integer or two equal"),
        ({"enhancement_layers": [2, 1]}, "rising block indices"),
        ({"enhancement_layers": [3]}, "below num_hidden_layers=3"),
        ({"enhancement_num_heads": 5}, "must divide the 16 patches of a 4x4 grid"),
    ],
)
def test_wrong_configuration_says_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


def test_features_need_contrastive_heads():
    model = IeftForImageTextRetrieval(tiny_config(contrastive_dim=0))
    with pytest.raises(ValueError, match="--contrastive_weight"):
        model.get_image_features(torch.zeros(1, 3, 32, 32))


def test_features_are_unit_vectors_and_padding_changes_nothing(tiny_model):
    inputs = tiny_inputs()
    text = tiny_model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    image = tiny_model.get_image_features(inputs["pixel_values"])
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(tiny_model.get_text_features(inputs["input_ids"][1:2, :5])[0], text[1])


def test_saved_folder_loads_to_the_same_scores(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    inputs = tiny_inputs()
    loaded = IeftForImageTextRetrieval.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, tiny_model(**inputs).logits)
    network, info = IeftModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(network.eval()(**inputs).pooler_output, tiny_model.vilt(**inputs).pooler_output)


def test_attentions_and_eager_equal_sdpa(tiny_model):
    inputs = tiny_inputs()
    assert tiny_model.config._attn_implementation == "sdpa"
    fused = tiny_model(**inputs)
    written_out = tiny_model(**inputs, output_attentions=True)
    torch.testing.assert_close(fused.logits, written_out.logits)
    assert len(written_out.attentions) == 3 and written_out.attentions[0].shape == (3, 2, 24, 24)
    torch.testing.assert_close(written_out.attentions[0].sum(-1), torch.ones(3, 2, 24))
    assert written_out.attentions[0][1, :, :, 5:7].abs().max() == 0  # padding is never looked at
    tiny_model.set_attn_implementation("eager")
    torch.testing.assert_close(tiny_model(**inputs).logits, fused.logits)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model):
    tiny_model.train()
    inputs = tiny_inputs()

    def gradients():
        torch.manual_seed(3)
        tiny_model.zero_grad()
        tiny_model(**inputs).logits.sum().backward()
        return [parameter.grad.clone() for parameter in tiny_model.parameters() if parameter.grad is not None]

    plain = gradients()
    tiny_model.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in tiny_model.vilt.encoder.layer)
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
