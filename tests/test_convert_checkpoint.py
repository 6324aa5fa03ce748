"""Tests of checkpoint conversion: every format gives the original network, or an error listing what does not fit."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from file_server import running_files
from golden_recipe import GOLDEN_FOLDER, is_unused, load_golden, make_inputs, make_published_state_dict, make_tensor
from huggingface_hub import constants
from safetensors.torch import save_file
from test_modeling import tiny_config, tiny_inputs
from transformers import BertTokenizer, ViltConfig, ViltForImageAndTextRetrieval, ViltForMaskedLM, ViltModel

import convert_checkpoint
from configuration_ieft import IeftConfig
from convert_checkpoint import (
    VILT_RELEASE,
    interpolate_positions,
    load_any_checkpoint,
    load_processor,
    main,
    read_tensors,
    save_whole,
)
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftProcessor

# Published sizes -> those of a network that converts in milliseconds: width 24, a 4x4 grid of 8-pixel patches.
TINY_SIZES = {
    30522: 60, 768: 24, 2304: 72, 3072: 48, 145: 17, 144: 16, 432: 48, 576: 64, 4084: 126, 2042: 63, 32: 8,
}  # fmt: skip
PUBLISHED_SHAPES = json.loads((GOLDEN_FOLDER / "parameter_shapes.json").read_text())


def write_vocabulary(folder, size):
    """A folder with a BERT tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "river", "house"]
    words += [f"word{number}" for number in range(size - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return str(write_vocabulary(tmp_path / "tokenizer", 60))


def tiny_published(with_stages=True, **more):
    """A state dict in the published layout, with all 12 blocks and all unused tensors, at tiny sizes."""
    state_dict = {}
    for name, shape in PUBLISHED_SHAPES:
        own_to_ieft = name.startswith(("local_net.", "transformer.SE_blocks.", "rank_output."))
        if with_stages or not own_to_ieft:
            state_dict[name] = make_tensor(name, [TINY_SIZES.get(size, size) for size in shape], seed=0)
    return state_dict | more


def save_lightning(state_dict, path):
    """A file as PyTorch Lightning 1 writes it: the states of callbacks are kept under their classes."""
    place = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": place})
    content = {"epoch": 3, "global_step": 70, "state_dict": state_dict, "hyper_parameters": {"lr": np.float64(1e-4)},
               "callbacks": {callback: {"best_model_score": torch.tensor(1.0)}}}  # fmt: skip
    modules = {place.rsplit(".", end)[0]: types.ModuleType("") for end in (2, 1)}
    with patch.dict(sys.modules, modules | {place: types.SimpleNamespace(ModelCheckpoint=callback)}):
        torch.save(content, path)
    return path


# Published IEFT ----------------------------------------------------------------------------------------------------


def test_a_published_ieft_checkpoint_gives_the_golden_scores(tmp_path):
    """All 142.7 M stored parameters, through the file, the converter and a saved folder."""
    source = save_lightning(make_published_state_dict(0, include_unused=True), tmp_path / "ieft.ckpt")
    vocabulary = write_vocabulary(tmp_path / "tokenizer", 30522)
    main([str(source), str(tmp_path / "converted"), "--tokenizer", str(vocabulary)])
    model = IeftForImageTextRetrieval.from_pretrained(tmp_path / "converted")
    golden = torch.tensor(load_golden(0)["scores"])
    images, input_ids, attention_mask = make_inputs()
    for image, caption in [(0, 0), (3, 4), (5, 9)]:
        with torch.no_grad():
            score = model(
                input_ids[caption : caption + 1],
                attention_mask[caption : caption + 1],
                pixel_values=images[image : image + 1],
            ).logits.item()
        assert score == pytest.approx(golden[image, caption].item(), abs=1e-4)
    assert len(IeftProcessor.from_pretrained(tmp_path / "converted").tokenizer) == 30522


def test_every_tensor_of_a_published_checkpoint_lands_where_it_belongs(tmp_path, tokenizer):
    state_dict = tiny_published()
    source = save_lightning(state_dict, tmp_path / "ieft.ckpt")
    model, processor = load_any_checkpoint(source, tokenizer=tokenizer, num_attention_heads=2)
    own = model.state_dict()
    assert model.config.num_hidden_layers == 6 and model.config.enhancement_layers == [1, 2, 3]
    assert (model.config.image_size, model.config.patch_size, model.config.vocab_size) == (32, 8, 60)
    assert torch.equal(own["rank_output.weight"], state_dict["rank_output.weight"])
    key = own["vilt.encoder.layer.5.attention.attention.key.weight"]
    assert torch.equal(key, state_dict["transformer.blocks.5.attn.qkv.weight"][24:48])
    kernel = own["vilt.encoder.enhancement.2.gated_convolution.project_in.weight"]
    assert torch.equal(kernel, state_dict["local_net.2.ffn.project_in.weight"][:, :, 0, 0])
    running = [tensor for name, tensor in state_dict.items() if not is_unused(name) and "itm_score" not in name]
    assert sum(map(torch.Tensor.numel, own.values())) == sum(map(torch.Tensor.numel, running)) - 40  # position_ids
    assert (processor.image_processor.image_size, processor.max_caption_tokens) == (32, 40)


# Original ViLT -----------------------------------------------------------------------------------------------------


def test_an_original_vilt_checkpoint_starts_the_ranking_head_as_its_match_row(tmp_path, tokenizer, caplog):
    state_dict = tiny_published(with_stages=False, **{"mlm_score.bias": torch.zeros(60)})
    source = save_lightning(state_dict, tmp_path / "vilt.ckpt")
    with caplog.at_level("INFO", logger="convert_checkpoint"):
        model, _ = load_any_checkpoint(source, tokenizer=tokenizer, num_attention_heads=2)
    assert torch.equal(model.rank_output.weight[0], state_dict["itm_score.fc.weight"][1])
    assert model.rank_output.bias.item() == state_dict["itm_score.fc.bias"][1].item()
    assert len(model.vilt.encoder.enhancement) == 3
    assert "Newly initialized, to be trained: vilt.encoder.enhancement.0, vilt.encoder.enhancement.1" in caplog.text
    assert "96 tensors left out: blocks beyond those that are used" in caplog.text  # 6 blocks of 16 tensors


def test_a_checkpoint_without_a_head_that_matches_says_what_the_published_one_starts_from(tmp_path, caplog):
    """As the Hub's dandelin/vilt-b32-mlm."""
    make_vilt(tmp_path / "mlm", ViltForMaskedLM)
    load_any_checkpoint(tmp_path / "mlm")
    assert "ranking head starts from random weights" in caplog.text and VILT_RELEASE in caplog.text
    caplog.clear()
    make_vilt(tmp_path / "irtr", ViltForImageAndTextRetrieval)
    load_any_checkpoint(tmp_path / "irtr")
    assert "random weights" not in caplog.text


def test_a_file_is_converted_from_its_url(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    content = save_lightning(tiny_published(), tmp_path / "ieft.ckpt").read_bytes()
    with running_files({"/ieft.ckpt": content, "/half.ckpt": content[: len(content) // 2]}) as server:
        main([f"{server.address}/ieft.ckpt", str(tmp_path / "out"), "--tokenizer", tokenizer])
        assert (tmp_path / "out" / "model.safetensors").is_file()
        with pytest.raises(SystemExit):
            main([f"{server.address}/half.ckpt", str(tmp_path / "half"), "--tokenizer", tokenizer])
    printed = capsys.readouterr().err
    assert "was not read" in printed and f"downloaded from {server.address}/half.ckpt. Delete it" in printed
    assert str(tmp_path / "assets") in printed


def test_a_bare_state_dict_and_a_tokenizer_beside_the_file_will_do(tmp_path):
    write_vocabulary(tmp_path, 60)
    torch.save(tiny_published(), tmp_path / "weights.pt")
    _, processor = load_any_checkpoint(tmp_path / "weights.pt", num_attention_heads=2)
    assert processor.tokenizer.tokenize("a river") == ["a", "river"]


# transformers' ViLT ------------------------------------------------------------------------------------------------


def vilt_config(**changes):
    sizes = {
        "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 48,
        "image_size": 32, "patch_size": 8, "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip
    return ViltConfig(**(sizes | changes))


def make_vilt(folder, architecture=ViltModel, **changes):
    torch.manual_seed(0)
    model = architecture(vilt_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # positions and biases start as zeros, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_vocabulary(folder, 60)
    return getattr(model, "vilt", model)


@pytest.fixture
def raster_order(monkeypatch):
    """Patches of transformers' ViLT in raster order: it draws them without replacement, all of them, from this."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, count, **_: torch.arange(count))


@pytest.mark.parametrize("architecture", [ViltModel, ViltForMaskedLM, ViltForImageAndTextRetrieval])
def test_a_transformers_vilt_gives_the_same_hidden_states(tmp_path, raster_order, architecture):
    vilt = make_vilt(tmp_path, architecture)
    model, _ = load_any_checkpoint(tmp_path, enhancement_layers=[])
    inputs = tiny_inputs()
    theirs = vilt(**inputs, output_hidden_states=True).hidden_states
    ours = model.vilt(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == 7
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, 17), value=1).bool()
    for block, (our, their) in enumerate(zip(ours, theirs[:7], strict=True)):
        torch.testing.assert_close(our[real], their[real], msg=lambda text, block=block: f"block {block}: {text}")


def test_positions_are_interpolated_as_transformers_does_it(tmp_path, raster_order):
    vilt = make_vilt(tmp_path, num_hidden_layers=2)
    model, processor = load_any_checkpoint(tmp_path, enhancement_layers=[], image_size=48)
    inputs = tiny_inputs() | {"pixel_values": torch.rand(3, 3, 48, 48) * 2 - 1}
    ours, theirs = model.vilt(**inputs), vilt(**inputs)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output)
    assert processor.image_processor.image_size == 48
    positions = torch.randn(1, 17, 24)
    assert interpolate_positions(positions, 4) is positions
    corners = interpolate_positions(positions, 7)[0, 1:].view(7, 7, 24)[::6, ::6]
    torch.testing.assert_close(corners, positions[0, 1:].view(4, 4, 24)[::3, ::3])


def test_a_retrieval_head_of_transformers_is_taken_over(tmp_path, raster_order):
    make_vilt(tmp_path, ViltForImageAndTextRetrieval, num_hidden_layers=3)
    vilt = ViltForImageAndTextRetrieval.from_pretrained(tmp_path)
    model, _ = load_any_checkpoint(tmp_path, enhancement_layers=[])
    inputs = tiny_inputs()
    torch.testing.assert_close(model(**inputs).logits, vilt(**inputs).logits)


# Our own -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = IeftForImageTextRetrieval(tiny_config()).eval()
    processor = IeftProcessor(
        convert_checkpoint.IeftImageProcessor(32, "squash"), BertTokenizer.from_pretrained(tokenizer), 20
    )
    save_whole(model, processor, tmp_path / "own")
    return tmp_path / "own", model


def test_an_own_folder_loads_as_from_pretrained(own_folder):
    folder, model = own_folder
    loaded, processor = load_any_checkpoint(folder)
    assert torch.equal(loaded(**tiny_inputs()).logits, model(**tiny_inputs()).logits)
    assert (processor.image_processor.fit, processor.max_caption_tokens) == ("squash", 20)
    assert load_any_checkpoint(folder, fit="crop")[1].image_processor.fit == "crop"


@pytest.mark.parametrize("contrastive_dim, kept", [(None, 8), (8, 8), (4, 4), (0, 0)])
def test_contrastive_heads_are_kept_made_anew_or_left_out(own_folder, contrastive_dim, kept):
    folder, model = own_folder
    loaded, _ = load_any_checkpoint(folder, contrastive_dim=contrastive_dim)
    assert loaded.config.contrastive_dim == kept
    assert torch.equal(loaded(**tiny_inputs()).logits, model(**tiny_inputs()).logits)
    if kept == 8:
        assert torch.equal(loaded.image_projection.weight, model.image_projection.weight)
    elif kept:
        assert loaded.image_projection.weight.std() > 0.05
        assert loaded.logit_scale.item() == pytest.approx(2.659, abs=1e-3)


# Errors ------------------------------------------------------------------------------------------------------------


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_malicious_pickle_does_nothing(tmp_path, as_zip):
    marker, path = tmp_path / "marker", tmp_path / "bad.ckpt"
    content = {"callbacks": Malice(marker), "state_dict": {}}
    if as_zip:
        torch.save(content | {"state_dict": tiny_published()}, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"was not read.*can run code.*GLOBAL posix\.system"):
        load_any_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if as_zip else pickle.loads(path.read_bytes())
    assert marker.exists()  # read the other way, it does its harm


def test_tensors_without_a_place_or_value_are_listed(tmp_path, tokenizer):
    state_dict = tiny_published(**{"transformer.blocks.0.gamma": torch.ones(24), "extra.weight": torch.ones(1)})
    del state_dict["pooler.dense.bias"]
    state_dict["transformer.norm.bias"] = torch.ones(25)
    source = save_lightning(state_dict, tmp_path / "ieft.ckpt")
    with pytest.raises(ValueError, match="4 faults") as error:
        load_any_checkpoint(source, tokenizer=tokenizer, num_attention_heads=2)
    assert str(error.value).splitlines()[1:] == [
        "no place for extra.weight",
        "no place for transformer.blocks.0.gamma",
        "no value for vilt.pooler.dense.bias",
        "vilt.layernorm.bias is [25], [24] expected",
    ]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: torch.save({"state_dict": {"a.weight": torch.ones(1)}}, path), "neither an original ViLT"),
        (lambda path: torch.save([1, 2], path), "no `state_dict`"),
        (lambda path: path.write_text("not a checkpoint"), "was not read"),
    ],
)
def test_files_that_are_no_checkpoints_say_so(tmp_path, make, message):
    make(tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=message):
        load_any_checkpoint(tmp_path / "file.ckpt")


def test_other_folders_and_missing_paths_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_any_checkpoint(tmp_path / "nowhere.ckpt")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is of type 'bert'"):
        load_any_checkpoint(tmp_path)


def test_nothing_is_written_half(tmp_path, capsys, monkeypatch):
    source = save_lightning(tiny_published(), tmp_path / "ieft.ckpt")
    output = tmp_path / "folders" / "converted"
    wrong = write_vocabulary(tmp_path / "wrong", 50)
    for tokenizer, message in [(tmp_path / "none", "Pass --tokenizer"), (wrong, "60 tokens, the tokenizer")]:
        with pytest.raises(SystemExit) as exit_:
            main([str(source), str(output), "--tokenizer", str(tokenizer)])
        assert exit_.value.code == 1 and message in capsys.readouterr().err
    assert not output.parent.exists()
    write_vocabulary(tmp_path, 60)
    monkeypatch.setattr(IeftProcessor, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(source), str(output)])
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    "output, message",
    [
        ("taken", "not an empty folder"),
        ("link", "not an empty folder"),
        ("file", "not an empty folder"),
        ("file/inner", "file is a file"),
        (".", "is the current folder"),
        ("", "is the current folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch, capsys, output, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    (tmp_path / "link").symlink_to("taken")
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here" if output in (".", "") else tmp_path)
    with pytest.raises(SystemExit):
        main(["https://nowhere.invalid/vilt.ckpt", output])
    assert message in capsys.readouterr().err  # not that there is no such server
    assert {path.name for path in tmp_path.rglob("*")} == {"taken", "mine", "link", "file", "here"}


def test_links_to_a_free_folder_are_followed_and_two_conversions_never_mix(tmp_path):
    source = save_lightning(tiny_published(), tmp_path / "ieft.ckpt")
    write_vocabulary(tmp_path, 60)
    (tmp_path / "empty").mkdir()
    for link, target in (("link", "empty"), ("dangling", "new")):
        (tmp_path / link).symlink_to(target)
        main([str(source), str(tmp_path / link)])
        assert (tmp_path / target / "model.safetensors").is_file() and (tmp_path / link).is_symlink()
    model, processor = load_any_checkpoint(source)
    save = processor.save_pretrained

    def save_late(folder):  # another process finishes meanwhile
        save(folder)
        (tmp_path / "both").mkdir()
        (tmp_path / "both" / "config.json").touch()

    processor.save_pretrained = save_late
    with pytest.raises(FileExistsError, match="both exists and is not an empty folder"):
        save_whole(model, processor, tmp_path / "both")
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["config.json"]


@pytest.mark.parametrize("source", ["", "folder/", "no/such/model"])
def test_a_source_that_is_nothing_is_named(source):
    with pytest.raises(FileNotFoundError, match=f"There is no file or folder '?{source}"):
        load_any_checkpoint(source)


def test_shortened_options_are_refused(capsys):
    """`--token` is what other commands call the secret for the Hub, and not --tokenizer."""
    with pytest.raises(SystemExit):
        main(["ieft.ckpt", "out", "--token", "hf_secret"])
    assert "unrecognized arguments: --token" in capsys.readouterr().err


def test_the_command_writes_a_folder_and_never_over_another(tmp_path, capsys):
    make_vilt(tmp_path / "vilt")
    command = [sys.executable, convert_checkpoint.__file__, str(tmp_path / "vilt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "parameters" in done.stdout and "Newly initialized, to be trained" in done.stderr
    assert {"model.safetensors", "config.json", "processor_config.json", "modeling_ieft.py"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    with pytest.raises(SystemExit) as ended:
        main(command[2:])
    assert ended.value.code == 1 and "not an empty folder" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_had_is_the_error(tmp_path):
    """Where transformers finds no vocabulary, it makes a tokenizer of special tokens alone."""
    with pytest.raises(OSError, match="No tokenizer could be loaded from"):
        load_processor(tmp_path, IeftConfig(), tokenizer=str(tmp_path))


def test_weights_without_permission_are_not_said_to_be_missing():
    """Files of safetensors are readable for their owner alone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "model.safetensors")
        save_file({"weight": torch.zeros(1)}, file)
        file.chmod(0)
        is_root = os.geteuid() == 0
        try:
            if is_root:  # who may read everything
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="Permission denied.*model.safetensors"):
                read_tensors(file)
        finally:
            if is_root:
                os.seteuid(0)
