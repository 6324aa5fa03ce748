"""The common model tests of transformers on a tiny network; other tests of the network are in `test_modeling.py`."""

import pytest
import torch
from test_modeling import tiny_config, tiny_inputs

from modeling_ieft import IeftForImageTextRetrieval, IeftModel

BOTH = pytest.mark.parametrize("architecture", [IeftModel, IeftForImageTextRetrieval])


def make(architecture=IeftForImageTextRetrieval, **changes):
    torch.manual_seed(0)
    return architecture(tiny_config(**changes)).eval()


def tensors_of(output):
    """The tensors of a tuple or dict output, with nested tuples flattened and None omitted."""
    values = output if isinstance(output, tuple) else output.to_tuple()
    flat = []
    for value in values:
        flat += value if isinstance(value, tuple) else [value]
    return flat


# Outputs -----------------------------------------------------------------------------------------------------------


@BOTH
def test_tuple_and_dict_outputs_are_the_same(architecture):
    model = make(architecture)
    options = {"output_hidden_states": True, "output_attentions": True}
    as_dict = model(**tiny_inputs(), **options)
    as_tuple = model(**tiny_inputs(), **options, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict)
    assert len(tensors_of(as_tuple)) == len(tensors_of(as_dict)) > 7
    for ours, theirs in zip(tensors_of(as_tuple), tensors_of(as_dict), strict=True):
        assert torch.equal(ours, theirs)
    model.config.return_dict = False
    assert isinstance(model(**tiny_inputs()), tuple)


@BOTH
def test_hidden_states_and_attentions_by_argument_and_by_configuration(architecture):
    model = make(architecture)
    plain = model(**tiny_inputs())
    assert plain.hidden_states is None and plain.attentions is None
    asked = model(**tiny_inputs(), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in asked.hidden_states] == [(3, 24, 24)] * 4  # the embeddings and three blocks
    assert [attention.shape for attention in asked.attentions] == [(3, 2, 24, 24)] * 3
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    configured = model(**tiny_inputs())
    assert len(configured.hidden_states) == 4 and len(configured.attentions) == 3
    torch.testing.assert_close(configured.hidden_states[-1], asked.hidden_states[-1])


def test_gradients_reach_hidden_states_and_attentions():
    model = make()
    output = model(**tiny_inputs(), output_hidden_states=True, output_attentions=True)
    for tensor in (*output.hidden_states, *output.attentions):
        tensor.retain_grad()
    output.logits.sum().backward()
    for tensor in (*output.hidden_states, *output.attentions):
        assert tensor.grad.abs().max() > 0


@BOTH
def test_word_embeddings_instead_of_ids(architecture):
    model = make(architecture)
    inputs = tiny_inputs()
    embedded = inputs | {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    assert torch.equal(tensors_of(model(**embedded))[0], tensors_of(model(**inputs))[0])


# Embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50, 70])
def test_the_vocabulary_can_be_resized(size, tmp_path):
    model = make()
    inputs = tiny_inputs()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=49)
    before = model(**inputs).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size and model.get_input_embeddings().weight.shape == (size, 24)
    assert torch.equal(model(**inputs).logits, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(IeftForImageTextRetrieval.from_pretrained(tmp_path)(**inputs).logits, before)
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": torch.full_like(inputs["input_ids"], size)})


# Loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_saved_again_the_files_are_the_same(saved, tmp_path_factory):
    folder, _ = saved
    again = tmp_path_factory.mktemp("again")
    IeftForImageTextRetrieval.from_pretrained(folder).save_pretrained(again)
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_shards_load_to_the_same_scores(saved, tmp_path_factory):
    _, model = saved
    folder = tmp_path_factory.mktemp("shards")
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    loaded = IeftForImageTextRetrieval.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # Not to the last bit: a tensor may lie elsewhere in memory, and be multiplied in other steps.
    torch.testing.assert_close(loaded(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "auto"])
def test_loading_in_another_precision(saved, dtype):
    folder, model = saved
    loaded = IeftForImageTextRetrieval.from_pretrained(folder, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    logits = loaded(**tiny_inputs()).logits
    assert logits.dtype == expected
    tolerance = 1e-6 if dtype in (torch.float64, "auto") else 0.1
    torch.testing.assert_close(logits.float(), model(**tiny_inputs()).logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_loading_with_a_device_map(saved, device_map):
    folder, model = saved
    loaded = IeftForImageTextRetrieval.from_pretrained(folder, device_map=device_map)
    inputs = {name: tensor.to(loaded.device) for name, tensor in tiny_inputs().items()}
    torch.testing.assert_close(loaded(**inputs).logits.cpu(), model(**tiny_inputs()).logits, atol=1e-4, rtol=0)


def test_the_attention_can_be_chosen_when_loading(saved):
    folder, model = saved
    eager = IeftForImageTextRetrieval.from_pretrained(folder, attn_implementation="eager")
    assert eager.vilt.encoder.layer[0].attention.attention.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


def test_no_key_is_missing_or_left_over(saved, tmp_path_factory):
    folder, model = saved
    _, report = IeftForImageTextRetrieval.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    network_folder = tmp_path_factory.mktemp("network")
    model.vilt.save_pretrained(network_folder)
    torch.manual_seed(1)
    headed, report = IeftForImageTextRetrieval.from_pretrained(network_folder, output_loading_info=True)
    heads = {"rank_output.weight", "rank_output.bias", "image_projection.weight", "text_projection.weight"}
    assert report["missing_keys"] == heads | {"logit_scale"} and not report["unexpected_keys"]
    torch.testing.assert_close(headed.vilt(**tiny_inputs()).pooler_output, model.vilt(**tiny_inputs()).pooler_output)
    assert headed.rank_output.bias.item() == 0 and 0.05 < headed.rank_output.weight.std() < 0.5
    assert headed.logit_scale.item() == pytest.approx(2.6593, abs=1e-3)


# Beginnings --------------------------------------------------------------------------------------------------------


@BOTH
def test_every_parameter_starts_by_the_configuration(architecture):
    """With an initializer range of nearly 0, what is not 0 or 1 was never initialised, but for known exceptions."""
    model = make(architecture, initializer_range=1e-10)
    for name, parameter in model.named_parameters():
        mean = parameter.mean().item()
        if name == "logit_scale":
            assert mean == pytest.approx(2.6593, abs=1e-3)
        else:
            assert mean == pytest.approx(round(mean), abs=1e-8) and round(mean) in (0, 1), name


def test_initial_scores_do_not_vanish_or_explode():
    torch.manual_seed(0)
    scores = IeftForImageTextRetrieval(tiny_config(initializer_range=0.02)).eval()(**tiny_inputs()).logits
    assert scores.isfinite().all() and scores.abs().max() < 1


def test_built_on_meta_and_loaded_nothing_is_garbage(saved):
    folder, model = saved
    loaded = IeftForImageTextRetrieval.from_pretrained(folder)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [name for name, _ in loaded.named_buffers()] == [name for name, _ in model.named_buffers()]


# Graphs ------------------------------------------------------------------------------------------------------------


def test_compiled_scores_are_the_same():
    """The whole network is one graph. The C++ that Inductor makes of a graph, for a minute, is PyTorch's to test."""
    model = make()
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_exported_scores_are_the_same():
    model = make()
    inputs = tiny_inputs()
    with torch.no_grad():
        program = torch.export.export(model, args=(), kwargs=inputs)
        other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
        torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, atol=1e-5, rtol=0)


# Training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification", "regression"])
@pytest.mark.parametrize("labels", [torch.tensor([1, 0, 1]), torch.tensor([[0.3], [1.0], [0.0]])])
def test_labels_give_a_loss_and_leave_the_scores(problem_type, labels):
    model = make(problem_type=problem_type)
    plain, output = model(**tiny_inputs()), model(**tiny_inputs(), labels=labels)
    assert plain.loss is None and torch.equal(output.logits, plain.logits)
    pairs = zip(plain.logits.double().flatten(), labels.double().flatten(), strict=True)
    expected = [
        (score - label) ** 2
        if problem_type == "regression"
        else -(label * score.sigmoid().log() + (1 - label) * (-score).sigmoid().log())
        for score, label in pairs
    ]
    torch.testing.assert_close(output.loss.double(), sum(expected) / 3, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert model.rank_output.weight.grad.abs().sum() > 0
    assert torch.equal(model(**tiny_inputs(), labels=labels, return_dict=False)[0], output.loss)
    assert model.config.problem_type == problem_type


@pytest.mark.parametrize(
    "labels", [[1.0, 0.0], [[1.0, 0.0]] * 3, [1.0, 0.0, -100.0], [1.0, 0.0, torch.nan], [2, 0, 1]]
)
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="abel"):
        make()(**tiny_inputs(), labels=torch.tensor(labels))


def test_a_loss_over_classes_is_refused():
    with pytest.raises(ValueError, match="problem_type"):
        make(problem_type="single_label_classification")(**tiny_inputs(), labels=torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("autocast", [True, False])
def test_training_in_bfloat16_learns(autocast):
    model = make(hidden_dropout_prob=0.0).train()
    model = model if autocast else model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    inputs = tiny_inputs()
    pairing = {
        "pair_images": torch.arange(3).repeat_interleave(3),
        "pair_captions": torch.arange(3).repeat(3),
    }
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores = model(**inputs, **pairing).logits.view(3, 3)
        loss = torch.nn.functional.cross_entropy(scores.float(), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
