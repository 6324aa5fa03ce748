"""Tests of malicious images, checkpoints, queries and settings: a documented error, and no code of theirs is run."""

import ast
import io
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, BertTokenizer

pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

import ieft  # noqa: E402, F401 (makes the auto classes know it)
from configuration_ieft import IeftConfig  # noqa: E402
from convert_checkpoint import load_any_checkpoint, main, read_tensors  # noqa: E402
from fuzz.targets import TINY, is_documented, tiny_published  # noqa: E402
from ieft.search.archive_files import find_images  # noqa: E402
from ieft.search.filters import check_where  # noqa: E402
from ieft.search.index import ImageIndex  # noqa: E402
from modeling_ieft import IeftForImageTextRetrieval, IeftModel  # noqa: E402
from prepare_datasets import image_fault  # noqa: E402
from processing_ieft import IeftImageProcessor, IeftProcessor, open_image  # noqa: E402
from ranking_ieft import find_processor  # noqa: E402
from run_retrieval import parse_arguments  # noqa: E402

ROOT = Path(__file__).parent.parent
PNG = io.BytesIO()
Image.new("RGB", (9, 7)).save(PNG, "PNG")
PNG = PNG.getvalue()


# Images --------------------------------------------------------------------------------------------------------------


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """PIL reads EPS by running Ghostscript, whatever the file is called."""
    marker, script = tmp_path / "ran", tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {marker}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (open_image, image_fault, IeftImageProcessor(32)):
        try:
            assert "unreadable" in str(read(str(path)))
        except ValueError as error:
            assert "cannot identify" in str(error)
    assert not marker.exists()


def test_a_bomb_of_pixels_is_an_error_of_ours(tmp_path):
    chunk = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    import zlib

    header = struct.pack(">I", 13) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    with pytest.raises(ValueError, match="exceeds limit"):
        open_image(PNG[:8] + header + PNG[33:])


# Checkpoints and configurations --------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle", "inside a state_dict", "bin of a folder"])
def test_no_pickle_is_executed(tmp_path, way, capsys):
    marker, path = tmp_path / "ran", tmp_path / "a.ckpt"
    content = Payload(marker)
    if way == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif way == "bin of a folder":
        torch.save({"a": content}, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vilt"}))
        path = tmp_path
    else:
        content = {"state_dict": tiny_published() | {"x": content}} if way.startswith("inside") else content
        torch.save(content, path, _use_new_zipfile_serialization=way != "legacy")
    with pytest.raises(SystemExit) as ended:
        main([str(path), str(tmp_path / "out")])
    assert ended.value.code == 1 and "convert_checkpoint: " in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_tensor_larger_than_its_numbers_is_refused(tmp_path):
    """A few bytes with a stride of 0 can have any shape, and take its full size once copied."""
    torch.save({"state_dict": {"a": torch.zeros(1).expand(10**12)}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds fewer numbers"):
        read_tensors(tmp_path / "a.ckpt")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole:
        with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
            for member in whole.infolist():
                archive.writestr(member.filename, whole.read(member))
    with pytest.raises(ValueError, match="unpacks to"):
        read_tensors(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        *(
            struct.pack("<Q", len(header)) + header
            for header in (
                b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
                b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
                b'{"a":' * 5000,
                b"{" + b" " * 500,
            )
        ),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file, or it is damaged"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_small_checkpoint_builds_no_large_network(tmp_path):
    """Sizes are inferred from shapes: a position table of width 1 would need terabytes of channel attention."""
    shapes = {"transformer.pos_embed": (1, 2**18 + 1, 1), "transformer.patch_embed.proj.weight": (1, 1, 1, 1)}
    torch.save(tiny_published() | {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="patches"):
        load_any_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": -1},
        {"hidden_size": 0},
        {"hidden_size": True},
        {"hidden_size": "768"},
        {"hidden_size": 10**12},
        {"image_size": True, "patch_size": True},
        {"patch_size": 0},
        {"image_size": None},
        {"image_size": [32, "a"]},
        {"image_size": 10**30, "patch_size": 10**30},
        {"image_size": 2**14, "patch_size": 1},
        {"num_attention_heads": 0},
        {"enhancement_num_heads": 0},
        {"enhancement_num_heads": -3},
        {"enhancement_num_heads": "a"},
        {"enhancement_layers": 5},
        {"enhancement_layers": None},
        {"enhancement_layers": [True]},
        {"enhancement_layers": [1, "a"]},
        {"enhancement_mlp_ratio": float("inf")},
        {"enhancement_expansion": -3},
        {"layer_norm_eps": float("nan")},
        {"hidden_dropout_prob": 7},
        {"contrastive_dim": -1},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"hidden_act": "evil"},
        {"id2label": [1]},
        {"num_labels": 10**12},
        {"dtype": "evil"},
        {"dtype": "load"},
        {"to_dict": 3},
        {"__class__": 3},
        {"attribute_map": {"a": "b"}},
        {"pad_token_id": 10**6},
        {"attn_implementation": "evil/kernel"},
        {"quantization_config": 5},
        {"hidden_size": 2**16, "num_hidden_layers": 2**10},
    ],
    ids=str,
)
def test_a_field_of_a_configuration_out_of_its_range(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ieft"} | fields))
    with pytest.raises(ValueError) as error:
        IeftConfig.from_pretrained(tmp_path)
    assert is_documented(error.value)


@pytest.mark.parametrize("fields", [{"hidden_size": -3}, {"num_hidden_layers": 10**9}, {"image_size": 0}])
def test_a_field_that_is_set_while_loading_is_checked_too(tmp_path, fields):
    IeftConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        IeftConfig.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize("text", ["[]", "5", "[" * 100_000, "{", "\0"])
def test_a_configuration_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for load in (IeftConfig.from_pretrained, load_any_checkpoint):
        with pytest.raises(OSError):
            load(tmp_path)


def test_networks_that_people_use_are_in_range():
    for sizes in (
        {},
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        {"image_size": 1024},
        {"image_size": 384, "patch_size": 16},
        {"vocab_size": 250_002},
        {"hidden_size": 2048, "num_hidden_layers": 40, "intermediate_size": 8192},
    ):
        IeftConfig(**sizes)
    config = IeftConfig(**TINY)
    with torch.device("meta"):
        built = IeftForImageTextRetrieval(config).num_parameters()
    assert built / 2 < config.count_parameters() < built * 2


# Queries -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    tokenizer = BertTokenizer().train_new_from_iterator(["two red houses .", "a green river ."], vocab_size=60)
    model = IeftForImageTextRetrieval(IeftConfig(**TINY | {"vocab_size": len(tokenizer)})).eval()
    return model, IeftProcessor(IeftImageProcessor(32), tokenizer)


@pytest.fixture
def index(tmp_path, loaded):
    return ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1], create=True)


NAMES = [
    "it's.png",
    'quo"te.png',
    "per%cent.png",
    "new\nline.png",
    "back\\slash.png",
    "\u202e.png",
    "; DROP TABLE.png",
    "'.png",
]


def test_files_of_any_name_are_indexed_found_and_deleted(tmp_path, index):
    (tmp_path / "archive").mkdir()
    for name in NAMES:
        (tmp_path / "archive" / name).write_bytes(PNG)
    broken = os.fsencode(tmp_path / "archive") + b"/\xff.png"
    Path(os.fsdecode(broken)).write_bytes(PNG)
    files = find_images(tmp_path / "archive")
    report = index.add(files)
    assert report["added"] == len(NAMES) and list(report["unreadable"].values()) == [
        "its name is not UTF-8: rename it"
    ]
    assert index.add(files)["unchanged"] == len(NAMES)
    assert {Path(hit["file"]).name for hit in index.search("a house", top_k=20)} == set(NAMES)
    assert [index.delete([file]) for file in files] == [0 if "\udcff" in str(file) else 1 for file in files]


@pytest.mark.parametrize(
    "where",
    [
        "width >",
        "nosuch = 1",
        "'",
        "width / 0 = 1",
        "cast(file as int) > 1",
        "sum(width) > 1",
        "$1 = 1",
        "? = 1",
        "1=1; DROP TABLE images",
        "lpad(file, 2000000000) = 'a'",
        "lpad/**/(file, 9) = 'a'",
        "\"lpad\"(file, 9) = 'a'",
        "repeat(file, 9) = 'a'",
        "file || file = 'a'",
        "E'\\' ' = lpad(file, 9)",
        "(select 1)",
        "\ud800",
        "\0",
        5,
        b"x",
        "(" * 100_000 + ")" * 100_000,
        "NOT " * 2000 + "true",
        "(" * 4000 + "true" + ")" * 4000,
        "row_number() over () = 1",
        " ",
        "width > 1 -- and",
        "width" + " + 1" * 1000 + " > 3",
        "true" + " = true" * 900,
        "width" + " IS NULL" * 900,
        "limits[1] > 1",
        "regexp_like(file, '(a{999}){999}')",
    ],
    ids=lambda where: ascii(where)[:30],
)
def test_a_filter_that_is_none_is_an_error_that_shows_it(tmp_path, index, where):
    (tmp_path / "a.png").write_bytes(PNG)
    index.add([tmp_path / "a.png"])
    for ask in (lambda: index.rows(where), lambda: index.search("a house", where=where)):
        with pytest.raises(ValueError, match="^where"):
            ask()


@pytest.mark.parametrize(
    "where",
    [
        "file LIKE '%port%' AND (width >= 1)",
        "NOT (width IN (1, 2))",
        "file = 'lpad(;'",
        "lower(file) LIKE '%''s%'",
        "CAST(width AS DOUBLE) BETWEEN 0 AND 1",
        'width > 1000 AND `height` > 1 AND "width" < 5',
        "width * height > 10000 AND date_part('year', time) < 1980",
        f"width IN ({', '.join(map(str, range(100, 1000)))})",
        None,
        "",
    ],
)
def test_filters_that_people_write_pass(index, where):
    assert check_where(where) == (where or None)
    assert index.rows(where) == []


def test_a_caption_of_a_million_characters_is_read_in_seconds(loaded):
    for caption in ("a" * 1_000_000, "\U0001f3de " * 500_000):
        assert loaded[1](text=[caption])["input_ids"].shape[1] <= 40


@pytest.mark.parametrize("caption", ["\ud800", None, 5, b"a", ["a"]])
def test_a_caption_that_is_no_text(index, caption):
    with pytest.raises(ValueError, match="[Cc]aption"):
        index.search(caption)
    with pytest.raises(ValueError, match="[Cc]aption"):
        index.processor(text=[caption])


# Code of others ------------------------------------------------------------------------------------------------------


def test_trust_remote_code_is_never_switched_on():
    """Except in a checkpoint's own code, which the user has agreed to run: IS_HUB_CODE."""
    found = []
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("ieft/*.py"),
        *ROOT.glob("metrics/**/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = getattr(node, "arg", None) == "trust_remote_code" or (
                isinstance(node, ast.Constant) and node.value == "trust_remote_code"
            )
            if named:
                found.append((path.name, ast.unparse(node.value) if isinstance(node, ast.keyword) else "as a word"))
    assert found == [("ranking_ieft.py", "IS_HUB_CODE")]
    assert __import__("ranking_ieft").IS_HUB_CODE is False


def test_the_code_of_a_hostile_checkpoint_does_not_run(tmp_path, loaded, monkeypatch):
    marker = tmp_path / "ran"
    folder = tmp_path / "hostile"
    loaded[0].save_pretrained(folder)
    loaded[1].save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    evil = {
        name: "evil.Evil"
        for name in (
            "AutoConfig",
            "AutoModel",
            "AutoModelForSequenceClassification",
            "AutoProcessor",
            "AutoImageProcessor",
            "AutoVideoProcessor",
            "AutoFeatureExtractor",
        )
    }
    for path in folder.glob("*.json"):
        if path.name not in ("tokenizer.json", "model.safetensors.index.json"):
            content = json.loads(path.read_text())
            more = {"auto_map": evil | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
            path.write_text(
                json.dumps(content | more | {"custom_pipelines": {"image-text-retrieval": {"impl": "evil.Evil"}}})
            )
    monkeypatch.setattr("builtins.input", lambda *prompt: "n")
    loads = (
        IeftConfig,
        IeftModel,
        IeftForImageTextRetrieval,
        IeftProcessor,
        IeftImageProcessor,
        AutoConfig,
        AutoModel,
        AutoProcessor,
    )
    for each in loads:
        try:
            each.from_pretrained(folder)
        except (ValueError, OSError):
            pass
    model, _ = load_any_checkpoint(folder)
    model.config._name_or_path = str(folder)
    find_processor(model)
    assert not marker.exists()
    runpy.run_path(str(folder / "evil.py"))
    assert marker.exists()  # the module does leave its mark where it is run


# Settings and the fuzzer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        "{",
        "[" * 100_000,
        '{"nosuch": 1}',
        '{"learning_rate": "high"}',
        '{"seed": [1, 2]}',
        '{"eval_datasets": []}',
        '{"eval_datasets": ["--do_train"]}',
        '{"network": "huge"}',
        '{"dataset_name": {"a": 1}, "max_steps": 1.5}',
    ],
)
def test_settings_that_are_wrong_are_named(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match="settings.json"):
        parse_arguments([str(tmp_path / "settings.json")])


def test_settings_are_read_as_the_command_line_is(tmp_path):
    options = {
        "dataset_name": "scenes",
        "learning_rate": 3e-5,
        "seed": 7,
        "do_train": True,
        "do_predict": True,
        "bf16": False,
        "fit": None,
        "eval_datasets": ["a=B", "c"],
        "lr_scheduler_kwargs": {"a": 1},
        "output_dir": str(tmp_path),
    }
    (tmp_path / "settings.json").write_text(json.dumps(options))
    model_args, data_args, args = parse_arguments([str(tmp_path / "settings.json")])
    assert (args.learning_rate, args.seed, args.do_train, args.do_eval, args.bf16) == (3e-5, 7, True, False, False)
    assert data_args.eval_datasets == ["a=B", "c"] and args.lr_scheduler_kwargs == {"a": 1} and model_args.fit is None


@pytest.mark.soak
def test_the_fuzzer_runs(tmp_path):
    pytest.importorskip("atheris", reason="the fuzzer, extra `fuzz`, is not installed")
    command = [
        sys.executable,
        ROOT / "fuzz/run.py",
        "--seconds",
        "2",
        "--targets",
        "annotations",
        "--findings",
        tmp_path,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])["targets"]["annotations"]
    assert result["executions"] > 50 and result["edges"] > 50 and result["findings"] == []
