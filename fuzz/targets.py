"""Fuzzing targets: each reads bytes as untrusted input; an exception that is not a documented error is a finding.

Each target also has a few valid inputs, made by code, as its seed corpus.
"""

import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet  # noqa: F401 (pa.parquet)
import torch
from PIL import Image
from safetensors.torch import save
from transformers import BertTokenizer

from configuration_ieft import IeftConfig
from convert_checkpoint import build_model, published_config, read_tensors, rename_published
from ieft.data.archives import Limits, extract
from ieft.data.images import read_image
from ieft.data.invalid_examples import describe, usable_rows
from ieft.data.sources import read_source
from ieft.evaluation.ranking import _ScoreCache
from ieft.search.filters import check_where, fetch
from ieft.search.index import METADATA
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor, open_image
from run_retrieval import parse_arguments

TINY = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8, "enhancement_layers": [0, 2], "contrastive_dim": 8,
}  # fmt: skip
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a folder in memory
LIMITS = Limits(members=1000, file_bytes=2**20, total_bytes=2**22)
SMALL_NETWORK = 10**6  # parameters; larger networks are not built
TEXTS = ("dataset.json", "captions_train2017.json", "rows.json", "rows.csv", "rows.tsv", "rows.jsonl")
TABLES = ("rows.parquet", "rows.arrow")
ARCHIVES = ("a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz")
CHECKPOINTS = ("a.ckpt", "a.safetensors")


def is_documented(error):
    """Whether an error is of a kind that the commands catch, and has a message of ours."""
    bare = isinstance(error, UnicodeError | json.JSONDecodeError)  # ValueErrors, but raised inside a library
    return isinstance(error, ValueError | OSError) and not bare and bool(str(error))


def call(target, data):
    """Run a target in an empty folder, ignoring documented errors.

    Raises:
        AssertionError: if anything was written outside the folder.
    """
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as parent:
        folder = Path(parent) / "inside"
        folder.mkdir()
        try:
            target(folder, data)
        except Exception as error:
            if not is_documented(error):
                raise
        assert os.listdir(parent) == ["inside"], "written outside the folder"


def _named(folder, data, names):
    """Write all but the first byte to a file; the first byte selects its name."""
    path = folder / names[data[0] % len(names)] if data else folder / names[0]
    path.write_bytes(data[1:])
    return path


# Targets -----------------------------------------------------------------------------------------------------------


def _read(path):
    source = read_source(path, "rows")
    missing = {number: "no such image file" for number, row in enumerate(source.rows) if row["image"] is None}
    usable, bad = usable_rows(source.rows, missing)
    describe(bad, path).encode("utf-8", "backslashreplace")
    pa.Table.from_pylist([{"filename": row["filename"], "captions": row["captions"]} for row in usable])


def annotations(folder, data):
    _read(_named(folder, data, TEXTS))


def tables(folder, data):
    _read(_named(folder, data, TABLES))


def webdataset(folder, data):
    _read(_named(folder, b"\0" + data, ("rows.tar",)))


def archives(folder, data):
    path = _named(folder, data, ARCHIVES)
    try:
        extract(path, folder / "out", limits=LIMITS)
    finally:
        assert {each.name for each in folder.iterdir()} <= {path.name, "out"}, "something was left"


def images(folder, data):
    assert open_image(data).mode == "RGB"


def pictures(folder, data):
    assert read_image(data).mode == "RGB"


def configs(folder, data):
    (folder / "config.json").write_bytes(data)
    config = IeftConfig.from_pretrained(folder)
    if config.count_parameters() < SMALL_NETWORK and config.num_hidden_layers < 20:
        with torch.device("meta"):
            IeftForImageTextRetrieval(config)


def processors(folder, data):
    (folder / "preprocessor_config.json").write_bytes(data)
    processor = IeftImageProcessor.from_pretrained(folder)
    if processor.image_size < 100:
        processor(Image.new("RGB", (5, 7)))


def checkpoints(folder, data):
    path = _named(folder, data, CHECKPOINTS)
    tensors = read_tensors(path)
    config = published_config(path, tensors, {})
    if config.count_parameters() < SMALL_NETWORK and config.num_hidden_layers < 20:
        build_model(config, *rename_published(tensors))


def filters(folder, data):
    fetch(_table().search().select(["file"]), check_where(data.decode("utf-8", "surrogateescape")))


def captions(folder, data):
    text = data.decode("utf-8", "surrogateescape")
    ids = _processor()(text=[text])["input_ids"]
    assert 2 <= ids.shape[1] <= 40


def tiles(folder, data):
    cache = _ScoreCache.__new__(_ScoreCache)
    cache.folder = folder
    (folder / f"{'k' * 32}.safetensors").write_bytes(data)
    scores = cache.get_or_compute("k" * 64, 4, lambda: np.ones(4))
    assert scores.shape == (4,) and scores.dtype == np.float32


def settings(folder, data):
    (folder / "settings.json").write_bytes(data)
    parse_arguments([str(folder / "settings.json")])


_kept = {}


def _table():
    if "table" not in _kept:
        schema = pa.schema([pa.field(name, kind) for name, kind in METADATA.items()])
        rows = [{"file": f"/it's {number}%.png", "width": number, "north": number / 2} for number in range(5)]
        folder = tempfile.mkdtemp(dir=IN_MEMORY)
        _kept["table"] = lancedb.connect(folder).create_table("images", pa.Table.from_pylist(rows, schema=schema))
        _kept["folder"] = folder
    return _kept["table"]


def _processor():
    if "processor" not in _kept:
        tokenizer = BertTokenizer().train_new_from_iterator(["two red houses .", "a green river ."], vocab_size=60)
        _kept["processor"] = IeftProcessor(IeftImageProcessor(32), tokenizer)
    return _kept["processor"]


def remove_kept():
    """Delete what the targets cache between calls."""
    shutil.rmtree(_kept.pop("folder", None) or "", ignore_errors=True)
    _kept.clear()


# Seed corpus of valid inputs ----------------------------------------------------------------------------------------


def _seed_annotations():
    entry = {"filename": "a.png", "split": "train", "sentences": [{"raw": "a house ."}]}
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a house ."}]}
    nwpu = {"airport": [{"filename": "a.png", "split": "val", "raw": "one .", "raw_1": "two ."}]}
    record = {"image": "a.png", "caption": "a house .", "split": "test"}
    for number, content in enumerate([{"images": [entry]}, coco, [record], nwpu]):
        yield bytes([number % 3]) + json.dumps(content).encode()
    yield b"\3filepath,caption_1,caption_2,split\na.png,one,two,train\n"
    yield b"\4image\tcaptions\na.png\tone\n"
    yield b"\5" + json.dumps(record).encode() + b"\n" + json.dumps(record | {"caption": ["a", "b"]}).encode()


def _seed_tables():
    record = {"image": _png(), "caption": ["a house ."], "image_id": "a.png", "split": "train"}
    table = pa.Table.from_pylist([record, record | {"image_id": "b.png"}])
    for compression in ("none", "snappy", "zstd"):
        file = io.BytesIO()
        pa.parquet.write_table(table, file, compression=compression)
        yield b"\0" + file.getvalue()
    for compression in (None, "zstd"):
        file = io.BytesIO()
        with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table)
        yield b"\1" + file.getvalue()


def _tar(mode="w", **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, **options) as archive:
        for name, content in {"d/a.png": _png(), "d/a.txt": b"a house .", "b" * 120: b"", "c.json": b"{}"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _seed_webdataset():
    yield _tar(format=tarfile.GNU_FORMAT)
    yield _tar(format=tarfile.PAX_FORMAT)


def _seed_archives():
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("d/a.txt", b"a house . " * 9)
            archive.writestr("../b", b"")
        yield b"\0" + file.getvalue()
    for number, mode in enumerate(("w", "w:gz", "w:bz2", "w:xz"), start=1):
        yield bytes([number]) + _tar(mode)


def _png(mode="RGB", kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, (9, 7), 5 if mode in ("L", "I;16", "F", "P") else None).save(file, kind)
    return file.getvalue()


def _seed_images():
    for kind, modes in {"PNG": ("RGB", "I;16", "P", "LA"), "TIFF": ("F", "RGB", "I;16"), "JPEG": ("RGB", "L"),
                        "GIF": ("P",), "WEBP": ("RGBA",), "BMP": ("RGB",), "JPEG2000": ("RGB",), "PPM": ("L",),
                        "TGA": ("RGB",), "SGI": ("RGB",), "PCX": ("L",)}.items():  # fmt: skip
        for mode in modes:
            yield _png(mode, kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "JPEG", exif=exif)
    yield file.getvalue()


def _seed_configs():
    yield json.dumps(TINY | {"model_type": "ieft"}).encode()
    yield json.dumps(IeftConfig(**TINY, num_labels=1, dtype="float32").to_dict(), default=str).encode()


def _seed_processors():
    yield json.dumps({"image_size": 32, "fit": "squash", "image_processor_type": "IeftImageProcessor"}).encode()


def tiny_published():
    """Tensors in the published layout, of the sizes of `TINY`, with two blocks and no enhancement stage."""
    block = {
        "norm1.weight": [24], "norm1.bias": [24], "attn.qkv.weight": [72, 24], "attn.qkv.bias": [72],
        "attn.proj.weight": [24, 24], "attn.proj.bias": [24], "norm2.weight": [24], "norm2.bias": [24],
        "mlp.fc1.weight": [48, 24], "mlp.fc1.bias": [48], "mlp.fc2.weight": [24, 48], "mlp.fc2.bias": [24],
    }  # fmt: skip
    shapes = {
        "transformer.pos_embed": [1, 17, 24], "transformer.cls_token": [1, 1, 24],
        "transformer.patch_embed.proj.weight": [24, 3, 8, 8], "transformer.patch_embed.proj.bias": [24],
        "transformer.norm.weight": [24], "transformer.norm.bias": [24], "pooler.dense.weight": [24, 24],
        "pooler.dense.bias": [24], "text_embeddings.word_embeddings.weight": [60, 24],
        "text_embeddings.position_embeddings.weight": [40, 24],
        "text_embeddings.token_type_embeddings.weight": [2, 24],
        "text_embeddings.LayerNorm.weight": [24], "text_embeddings.LayerNorm.bias": [24],
        "token_type_embeddings.weight": [2, 24], "rank_output.weight": [1, 24], "rank_output.bias": [1],
    }  # fmt: skip
    shapes |= {f"transformer.blocks.{number}.{name}": shape for number in (0, 1) for name, shape in block.items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _seed_checkpoints():
    for old in (False, True):
        file = io.BytesIO()
        torch.save({"state_dict": tiny_published()}, file, _use_new_zipfile_serialization=not old)
        yield b"\0" + file.getvalue()
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file)
    yield b"\0" + file.getvalue()
    yield b"\1" + save(tiny_published())
    yield b"\1" + save({"a": torch.zeros(3)})


def _seed_filters():
    yield b"width >= 2 AND north > 0.5"
    yield b"file LIKE '%it''s%' OR NOT (width IN (1, 2)) AND lower(file) IS NOT NULL"
    yield b"CAST(width AS DOUBLE) / 2 BETWEEN 0 AND 1 -- all"


def _seed_captions():
    yield b"two red houses ."
    yield "ein grünes Tal \U0001f3de\u202e\0".encode()


def _seed_tiles():
    yield save({"scores": torch.zeros(4)}, {"key": "k" * 64, "sha256": "0" * 64})


def _seed_settings():
    yield b'{"dataset_name": "scenes", "learning_rate": 1e-4, "do_train": true, "max_steps": 2, "use_cpu": true}'
    yield b'{"eval_datasets": ["ucm=UCM", "scenes"], "lr_scheduler_kwargs": {"a": 1}, "seed": null}'


TARGETS = {
    annotations: _seed_annotations, tables: _seed_tables, webdataset: _seed_webdataset, archives: _seed_archives,
    images: _seed_images, pictures: _seed_images, configs: _seed_configs, processors: _seed_processors,
    checkpoints: _seed_checkpoints, filters: _seed_filters, captions: _seed_captions, tiles: _seed_tiles,
    settings: _seed_settings,
}  # fmt: skip
TARGETS = {target.__name__: (target, seeds) for target, seeds in TARGETS.items()}
