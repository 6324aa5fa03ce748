"""An index in use: several writers, readers, files that go, archives that move, tables of the version before."""

import codecs
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from test_index import ADD, CAPTIONS, NUM_IMAGES, archive, checkpoint, index, loaded, scene  # noqa: F401
from test_search import run  # noqa: F401
from test_tiles import write_scene

from ieft.data.locate import walk_files
from ieft.evaluation.ranking import fingerprint
from ieft.search import archive_files
from ieft.search import index as index_module
from ieft.search.archive_files import find_images
from ieft.search.command import main
from ieft.search.geography import PLACE_COLUMNS
from ieft.search.index import CHECKPOINT, KEY, STATES, ImageIndex, fingerprint_checkpoint
from ieft.search.ingestion import embed, look_up, plan, write
from ieft.search.read_ahead import read_files
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

# ruff: noqa: F811


def open_rooted(tmp_path, loaded, archive, name="index"):
    return ImageIndex(tmp_path / name, loaded[0], processor=loaded[1], create=True, root=archive)


def described(index):
    """The content of an index, without what depends on the time of writing: metadata, and vectors in its order."""
    rows = index.rows(columns=["file", "col", "row", "content", "tiling", "width", "vector"])
    rows = sorted(rows, key=lambda row: (row["file"], row["col"], row["row"]))
    return [{name: row[name] for name in row if name != "vector"} for row in rows], [row["vector"] for row in rows]


# Several writers ----------------------------------------------------------------------------------------------------

WRITE = ADD.replace("flush=True)", "flush=True)\ninput()") + "index.optimize()\n"


def start_writer(*arguments):
    arguments = [sys.executable, "-c", WRITE, *arguments, "64"]
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_writers_of_which_one_is_killed_make_the_index_of_one(tmp_path, checkpoint, loaded, archive):
    """Both index the same folder at the same time; one is killed at some moment, and another starts."""
    for file in find_images(archive)[10:]:
        file.unlink()
    write_scene(archive / "scene.tif", np.random.default_rng(3).integers(0, 4000, (3, 40, 72), np.uint16))
    places, seed = (checkpoint, tmp_path / "index", archive), random.randrange(2**32)
    print(f"seed {seed}")  # of the kill, for when it fails
    writers = [start_writer(*places) for _ in range(2)]
    for writer in writers:  # all have opened the index when the first one begins
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    time.sleep(random.Random(seed).uniform(0.05, 1))
    writers[0].send_signal(signal.SIGKILL)
    writers[0].communicate()
    writers[0] = start_writer(*places)
    for writer in writers:
        _, errors = writer.communicate("\n")
        assert writer.returncode == 0, errors
    alone = ImageIndex(tmp_path / "alone", loaded[0], processor=loaded[1], create=True)
    alone.add(find_images(archive), tile=64)
    together = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1])
    (found, vectors), (expected, expected_vectors) = described(together), described(alone)
    assert found == expected
    np.testing.assert_allclose(vectors, expected_vectors, atol=1e-5)  # they depend on what is computed together
    assert together.add(find_images(archive), tile=64)["added"] == 0


def test_two_transactions_that_insert_one_key_leave_one_row(tmp_path, loaded, archive):
    """Both have searched, and found nothing, before either writes."""
    first, second = (open_rooted(tmp_path, loaded, archive) for _ in range(2))
    names = [first.name_of(file) for file in find_images(archive)]
    batches = []
    for each in (first, second):
        options = {"tile": 0, "overlap": 0.25, "bands": None}
        found = look_up(each.table, names)
        jobs = [plan(name, each.path_of(name), rows, each.prepared, **options) for name, rows in found.items()]
        found = [row for of_file in read_files(jobs) for row in of_file.rows]
        with each.network() as network:
            vectors = embed(each, network, np.stack([square for _, square in found]))
        named = [
            row | {"file": job.name, "content": "", "tiling": ""} for (row, _), job in zip(found, jobs, strict=True)
        ]
        batches.append([row | vector for row, vector in zip(named, vectors, strict=True)])
    write(first, batches[0])
    write(second, batches[1])
    assert len(first) == len(second) == NUM_IMAGES
    for each in (first, second):
        each.add_captions(CAPTIONS)
    assert first.captions.count_rows() == len(CAPTIONS)


def test_readers_see_what_others_add_and_take_out(tmp_path, loaded, archive):
    writer = open_rooted(tmp_path, loaded, archive)
    reader = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1])
    assert reader.search(CAPTIONS[0]) == []
    writer.add(find_images(archive))
    assert len(reader.search(CAPTIONS[0], top_k=50)) == len(reader) == NUM_IMAGES
    writer.delete(find_images(archive)[:4])
    writer.optimize()
    assert len(reader.search(CAPTIONS[0], top_k=50)) == NUM_IMAGES - 4


def test_optimize_drops_old_versions(index, monkeypatch):
    for _ in range(5):
        index.delete(find_images(index.rows()[0]["file"]))
    monkeypatch.setattr(index_module, "KEPT_VERSIONS", timedelta(0))
    before = len(index.table.list_versions())
    index.optimize()
    assert len(index.table.list_versions()) <= 2 < before
    assert len(index.search(CAPTIONS[0], top_k=50)) == NUM_IMAGES - 5


# Files that go, archives that move ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_image", [False, True])
def test_files_that_are_gone_or_damaged_are_skipped_and_the_shortlist_refilled(index, archive, caplog, by_image):
    image = Image.new("RGB", (50, 40), "red")
    search = (lambda **options: index.search_image(image, **options)) if by_image else (
        lambda **options: index.search(CAPTIONS[0], rerank_top_k=6, **options)
    )  # fmt: skip
    nearest = [hit["file"] for hit in search(top_k=6)]
    os.unlink(nearest[0])
    if not by_image:  # by embedding alone, no file is read
        with open(nearest[1], "wb") as file:
            file.write(b"no image any more")
    hits = search(top_k=6)
    skipped = {nearest[0]} if by_image else set(nearest[:2])
    assert len(hits) == 6 and not skipped & {hit["file"] for hit in hits}
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert len(caplog.records) == 1 and "ieft-search prune" in caplog.text


def test_prune_takes_out_what_is_gone_and_refuses_what_is_not_mounted(tmp_path, run, archive):
    outside = tmp_path / "elsewhere" / "far" / "one.png"
    outside.parent.mkdir(parents=True)
    shutil.copy(find_images(archive)[0], outside)
    run("index", archive)
    run("index", outside)
    gone = find_images(archive)[2]
    gone.unlink()
    printed = run("prune")[1].out
    assert printed == f"taken out: {gone}\n1 files taken out, 24 images or tiles left\n"
    away = archive.rename(tmp_path / "away")
    for attempt in range(2):  # a mount point that is missing, and one that is empty
        with pytest.raises(SystemExit, match=f"All 23 files of {archive} in the index are gone.*--force"):
            run("prune")
        if not attempt:
            archive.mkdir()
    archive.rmdir()
    with pytest.raises(SystemExit, match="is not there: mount it"):
        run("query", CAPTIONS[0])
    away.rename(archive)
    assert run("prune")[1].out.startswith("0 files taken out, 24")
    shutil.rmtree(archive)
    assert "23 files taken out, 1 images" in run("prune", "--force")[1].out


def test_an_archive_that_moved_is_recognised_and_embeds_nothing(tmp_path, run, archive):
    run("index", archive)
    moved = tmp_path / "other place's $1"
    archive.rename(moved)
    assert run("index", moved)[1].out.startswith("0 added, 24 unchanged, 24 images")
    assert f"root {moved}\n" in run("info")[1].out
    hits = json.loads(run("query", CAPTIONS[0], "--json")[1].out)
    assert all(os.path.exists(hit["file"]) and hit["file"].startswith(str(moved)) for hit in hits)


def test_another_archive_in_the_place_of_one_that_is_gone_is_refused_until_it_is_relocated(tmp_path, run, archive):
    run("index", archive)
    moved = tmp_path / "new"
    archive.rename(moved)
    for file in find_images(moved)[:20]:
        file.rename(file.with_name("renamed " + file.name))
    with pytest.raises(SystemExit, match="relocate FOLDER"):
        run("index", moved)
    with pytest.raises(SystemExit, match="None of the index's 24 files"):
        run("relocate", tmp_path)
    assert run("relocate", moved)[1].out == f"root {moved}: 4 of 24 files found\n"
    assert run("index", moved)[1].out.startswith("20 added, 4 unchanged, 44 images")
    assert "20 files taken out, 24 images" in run("prune")[1].out


def test_a_reader_follows_an_archive_that_another_process_relocated(tmp_path, loaded, archive):
    writer = open_rooted(tmp_path, loaded, archive)
    writer.add(find_images(archive))
    reader = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1])
    assert len(reader.search(CAPTIONS[0])) == 10
    moved = archive.rename(tmp_path / "moved")
    writer.relocate(moved)
    assert {os.path.dirname(hit["file"]) for hit in reader.search(CAPTIONS[0])} <= {str(moved), str(moved / "deep")}


# How scenes are cut, what files are called --------------------------------------------------------------------------


def test_indexing_again_keeps_how_a_scene_was_cut_unless_asked(index, scene):
    assert index.add([scene], tile=32)["added"] == 12
    assert index.add([scene]) == {"added": 0, "unchanged": 12, "unreadable": {}}
    pixels = np.random.default_rng(4).integers(0, 4000, (3, 80, 104), np.uint16)
    write_scene(scene, pixels)  # its content changed: cut anew in the same way
    assert index.add([scene])["added"] == 12 and len(index) == NUM_IMAGES + 12
    with pytest.raises(ValueError, match="overlap needs tile"):
        index.add([scene], overlap=0.5)
    assert index.add([scene], tile=0)["added"] == 1 and len(index) == NUM_IMAGES + 1


def test_a_file_that_became_unreadable_keeps_its_row_and_is_named(index, archive):
    file = find_images(archive)[0]
    file.write_bytes(b"no image")
    report = index.add([file])
    assert "what was indexed of it before is kept" in report["unreadable"][str(file)] and len(index) == NUM_IMAGES


def test_files_keep_the_names_of_their_links_and_loops_end(tmp_path, archive):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    archive.joinpath("it's 00.png").rename(blobs / "0a1b2c")
    archive.joinpath("it's 00.png").symlink_to(blobs / "0a1b2c")
    (blobs / "inner.png").write_bytes((blobs / "0a1b2c").read_bytes())
    archive.joinpath("linked").symlink_to(blobs)
    archive.joinpath("deep", "loop").symlink_to(archive)
    archive.joinpath("aa").symlink_to(archive / "deep")  # comes first by name, and is visited as `deep`
    (archive / "__MACOSX").mkdir()
    for name in ("._it's 01.png", "__MACOSX/it's 01.png"):
        (archive / name).write_bytes(b"\0\5\x16\7")
    found = [str(path.relative_to(archive)) for path in find_images(archive)]
    plain = [f"{'deep/' if number % 2 else ''}it's {number:02}.png" for number in range(NUM_IMAGES)]
    assert found == sorted([*plain, "linked/inner.png"])


def test_linked_files_are_indexed_by_name(tmp_path, run, archive):
    blob = tmp_path / "blob"
    write_scene(blob, np.random.default_rng(0).integers(0, 256, (3, 40, 60), np.uint8))
    (archive / "city.tif").symlink_to(blob)
    run("index", archive)
    rows = [json.loads(line) for line in run("export", "--where", "file = 'city.tif'")[1].out.splitlines()]
    assert [row["file"] for row in rows] == [str(archive / "city.tif")] and rows[0]["north"] > 48


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_captions_with_any_byte_order_mark(tmp_path, run, encoding):
    text = "\r\n".join(["a red house .", "zwei Häuser", ""])
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "captions.txt").write_bytes(mark + text.encode(encoding))
    assert "2 added, 0 unchanged, 2 captions" in run("index", "--captions", tmp_path / "captions.txt")[1].out
    again = run("index", "--captions", tmp_path / "captions.txt")[1].out
    assert "0 added, 2 unchanged" in again


def test_captions_that_are_no_text_are_named(tmp_path, run):
    (tmp_path / "latin.txt").write_bytes("Häuser".encode("latin-1"))
    with pytest.raises(SystemExit, match="latin.txt: text in UTF-8 expected"):
        run("index", "--captions", tmp_path / "latin.txt")


# The checkpoint's fingerprint ---------------------------------------------------------------------------------------


def test_the_fingerprint_covers_what_changes_embeddings_and_nothing_else(checkpoint, loaded):
    model, processor = loaded
    ours = fingerprint_checkpoint(model, processor)
    reduced = IeftForImageTextRetrieval.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert fingerprint_checkpoint(reduced, processor) == ours
    renamed = IeftForImageTextRetrieval.from_pretrained(checkpoint)
    renamed.config.transformers_version, renamed.config.name_or_path = "9.9", "elsewhere"
    renamed.config.hidden_dropout_prob, renamed.config.initializer_range = 0.3, 0.5
    assert fingerprint_checkpoint(renamed, processor) == ours
    with torch.no_grad():
        max(renamed.parameters(), key=torch.numel)[0] += 0.1
    assert fingerprint_checkpoint(renamed, processor) != ours
    for name, value in (("layer_norm_eps", 1e-3), ("hidden_act", "relu"), ("num_attention_heads", 1)):
        other = IeftForImageTextRetrieval.from_pretrained(checkpoint)
        setattr(other.config, name, value)
        assert fingerprint_checkpoint(other, processor) != ours, name
    tokenizer = processor.tokenizer
    for other in (IeftProcessor(IeftImageProcessor(32, fit="squash"), tokenizer),
                  IeftProcessor(IeftImageProcessor(32), tokenizer, max_caption_tokens=7)):  # fmt: skip
        assert fingerprint_checkpoint(model, other) != ours


# Indexes of the version before --------------------------------------------------------------------------------------

OLD = {
    "file": pa.string(), "content": pa.string(), "bytes": pa.int64(), "time": pa.timestamp("ms", "UTC"),
    "width": pa.int32(), "height": pa.int32(), "col": pa.int32(), "row": pa.int32(), "tile_width": pa.int32(),
    "tile_height": pa.int32(), "tiling": pa.string(), "limits": pa.list_(pa.float64()), "west": pa.float64(),
    "south": pa.float64(), "east": pa.float64(), "north": pa.float64(), "crs": pa.string(),
}  # fmt: skip


def write_as_before(uri, index, made_by):
    """The rows of an index as the version before kept them: whole paths, the raster's own bounds, each row twice."""
    own = dict(zip(("west", "south", "east", "north"), ("left", "bottom", "right", "top"), strict=True))
    rows = [
        {name: row[own.get(name, name)] for name in OLD} | {"vector": row["vector"]}
        for row in index.rows(columns=[*index_module.METADATA, "vector"])
    ]
    metadata = {CHECKPOINT: made_by.encode(), STATES: b""}
    vector = pa.field("vector", pa.list_(pa.float32(), 8))
    schemas = [pa.schema([pa.field(name, kind) for name, kind in columns.items()] + [vector], metadata=metadata)
               for columns in (OLD, {"caption": pa.string()})]  # fmt: skip
    database = lancedb.connect(str(uri))
    table = database.create_table("images", schema=schemas[0])
    for _ in range(2):
        table.add(pa.Table.from_pylist(rows, schema=schemas[0]))
    captions = database.create_table("captions", schema=schemas[1])
    captions.add([{"caption": "a", "vector": index.embed_caption("a")}] * 2)


@pytest.mark.parametrize("made_by", ["fingerprint", "embeddings", "other"])
def test_an_index_of_the_version_before_is_mended_and_embeds_nothing(tmp_path, loaded, archive, index, made_by):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 60), np.uint8)
    write_scene(archive / "scene.tif", pixels)
    index.add(find_images(archive))
    model, processor = loaded
    settings = [32, "crop", processor.max_caption_tokens, processor.tokenizer.get_vocab()]
    digest = fingerprint(model, settings).hexdigest() if made_by == "fingerprint" else "0" * 64
    write_as_before(tmp_path / "before", index, digest)
    if made_by == "other":
        torch.manual_seed(1)
        with pytest.raises(ValueError, match="cannot be compared"):
            ImageIndex(tmp_path / "before", IeftForImageTextRetrieval(model.config), processor=processor)
        return
    mended = open_rooted(tmp_path, loaded, archive, "before")
    assert mended.captions.count_rows() == 1 and described(mended) == described(index)
    assert {row["file"] for row in mended.table.search().to_list()} == {
        str(file.relative_to(archive)) for file in find_images(archive)
    }
    assert mended.add(find_images(archive)) == {"added": 0, "unchanged": NUM_IMAGES + 1, "unreadable": {}}
    (row,), (fresh,) = (each.rows("crs IS NOT NULL") for each in (mended, index))
    assert row == fresh and row["north"] == pytest.approx(48.753, abs=0.001) and row["top"] == 5400000
    again = ImageIndex(tmp_path / "before", model.to(torch.bfloat16), processor=processor)
    model.to(torch.float32)
    assert len(again) == NUM_IMAGES + 1
    table = lancedb.connect(str(tmp_path / "before")).open_table("images")
    twins = pa.Table.from_pylist(mended.table.search().limit(1).to_list(), schema=table.schema)
    for each in (table, mended.table):  # the primary key holds for tables that were mended too
        each.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all().execute(twins)
    assert len(again) == NUM_IMAGES + 1


def test_an_archive_of_the_version_before_that_moved_is_relocated(tmp_path, loaded, archive, index):
    model, processor = loaded
    settings = [32, "crop", processor.max_caption_tokens, processor.tokenizer.get_vocab()]
    write_as_before(tmp_path / "before", index, fingerprint(model, settings).hexdigest())
    moved = archive.rename(tmp_path / "moved")
    mended = ImageIndex(tmp_path / "before", model, processor=processor)
    with pytest.raises(ValueError, match="--former"):
        mended.relocate(moved)
    assert mended.relocate(moved, former=archive) == (NUM_IMAGES, NUM_IMAGES)
    assert mended.add(find_images(moved))["added"] == 0 and len(mended) == NUM_IMAGES


# Errors in one line -------------------------------------------------------------------------------------------------


def test_what_is_no_index_is_refused_in_one_line(tmp_path, run, archive):
    place = tmp_path / "index"
    with pytest.raises(SystemExit, match="No index at"):
        run("query", CAPTIONS[0])
    assert not place.exists()
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds other files"):
        run("index", archive)
    assert [path.name for path in place.iterdir()] == ["mine.txt"]
    shutil.rmtree(place)
    place.write_text("a file")
    for command in (("index", archive), ("info",)):
        with pytest.raises(SystemExit, match="^ieft-search: .*index") as refused:
            run(*command)
        assert "\n" not in str(refused.value)
    place.unlink()
    run("index", archive)
    for manifest in (place / "images.lance" / "_versions").iterdir():
        manifest.write_bytes(b"damaged" * 10)
    with pytest.raises(SystemExit, match="damaged"):
        run("query", CAPTIONS[0])
    with pytest.raises(SystemExit, match="--overlap needs --tile"):
        run("index", archive, "--overlap", 0.5)


def test_outputs_are_never_replaced_unasked(tmp_path, run, archive):
    run("index", archive)
    mine = tmp_path / "hits.json"
    mine.write_text("mine")
    for option in ("--geojson", "--sheet", "--explain"):
        with pytest.raises(SystemExit, match="pass --overwrite"):
            run("query", CAPTIONS[0], option, mine)
    assert mine.read_text() == "mine"
    with pytest.raises(SystemExit, match="there is no folder"):
        run("query", CAPTIONS[0], "--sheet", tmp_path / "none" / "a.png")
    run("query", CAPTIONS[0], "--geojson", mine, "--overwrite")
    assert json.loads(mine.read_text())["type"] == "FeatureCollection"


def test_without_lancedb_the_command_says_what_to_install(checkpoint, tmp_path):
    block = "import sys; sys.modules['lancedb'] = None\nfrom ieft.search.command import main\nmain(sys.argv[1:])"
    arguments = ["info", "--model", checkpoint, "--index", tmp_path / "index"]
    done = subprocess.run([sys.executable, "-c", block, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == (
        "ieft-search: The index needs lancedb: pip install 'ieft[search]'."
    )


# Folders and files without permission, and metadata that came later --------------------------------------------------


@pytest.fixture
def as_nobody():
    """A folder that everyone may enter, and a context without the rights of root, which may read everything."""
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o755)
    is_root = os.geteuid() == 0

    @contextmanager
    def without_rights():
        if is_root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if is_root:
                os.seteuid(0)

    yield Path(folder), without_rights
    subprocess.run(["chmod", "-R", "u+rwx", folder])
    shutil.rmtree(folder)


def test_folders_and_links_that_lead_nowhere_are_named(as_nobody, loaded, archive, caplog):
    folder, without_rights = as_nobody
    there = Path(shutil.copytree(archive, folder / "archive"))
    (there / "gone.png").symlink_to("nowhere")
    (there / "deep").chmod(0)
    unreadable = {}
    with without_rights():
        assert len(find_images(there, unreadable)) == NUM_IMAGES // 2
        with pytest.raises(PermissionError):
            find_images(there)
        assert len(list(walk_files(there))) == NUM_IMAGES // 2
    assert sorted(unreadable) == [str(there / "deep"), str(there / "gone.png")]
    assert f"{there / 'deep'} cannot be searched for files: Permission denied" in caplog.text


def test_a_link_to_itself_is_named_and_the_rest_is_found(archive):
    (archive / "itself.png").symlink_to("itself.png")
    unreadable = {}
    assert len(find_images(archive, unreadable)) == NUM_IMAGES
    assert list(unreadable) == [str(archive / "itself.png")]


def test_weights_that_are_no_numbers_index_nothing(tmp_path, checkpoint, archive):
    model = IeftForImageTextRetrieval.from_pretrained(checkpoint)
    model.vilt.embeddings.cls_token.data.fill_(torch.nan)
    index = open_rooted(tmp_path, (model, IeftProcessor.from_pretrained(checkpoint)), archive)
    with pytest.raises(ValueError, match="The embeddings of the network are not all finite numbers"):
        index.add(find_images(archive))
    assert len(index) == 0


def test_a_name_that_the_terminal_cannot_show_loses_no_hit(tmp_path, checkpoint, loaded, archive, monkeypatch):
    (archive / "it's 00.png").rename(archive / "日本.png")
    ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1], create=True).add(find_images(archive))
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    options = ["--model", str(checkpoint), "--index", str(tmp_path / "index"), "--top_k", str(NUM_IMAGES)]
    assert main(["query", CAPTIONS[0], *options]) == 0
    printed.flush()
    assert rb"\u65e5\u672c.png" in printed.buffer.getvalue()


def test_an_index_that_cannot_be_written_is_searched_all_the_same(as_nobody, loaded, archive):
    folder, without_rights = as_nobody
    there = Path(shutil.copytree(archive, folder / "archive"))
    index = ImageIndex(folder / "index", loaded[0], processor=loaded[1], create=True, root=there)
    index.add(find_images(there))
    subprocess.run(["chmod", "-R", "a+rX,a-w", folder], check=True)
    with without_rights():
        read_only = ImageIndex(folder / "index", loaded[0], processor=loaded[1], root=there)
        assert len(read_only.search(CAPTIONS[0], top_k=50)) == NUM_IMAGES
        assert read_only.add(find_images(there))["unchanged"] == NUM_IMAGES
        with pytest.raises((OSError, RuntimeError), match="Permission denied"):
            read_only.delete(find_images(there)[:1])


def test_indexing_again_adds_places_and_times_that_earlier_versions_did_not_read(tmp_path, loaded, archive, index):
    """Also where rasterio was installed later; nothing is embedded anew."""
    exif = Image.Exif()
    exif[0x8769] = {0x9003: "2021:06:01 10:20:30"}
    Image.new("RGB", (40, 30)).save(archive / "photo.jpg", exif=exif)
    Image.new("RGB", (40, 30)).save(archive / "plain.jpg")
    scene = archive / "scene.tif"
    write_scene(scene, np.random.default_rng(0).integers(0, 256, (3, 40, 72), np.uint8))
    index.add(find_images(archive))
    index.add([scene], tile=32)
    before = index.rows()
    nothing = dict.fromkeys((*PLACE_COLUMNS, "acquired"), "NULL")
    index.table.update(values_sql=nothing)
    vectors = [row["vector"] for row in index.rows(columns=["vector"])]
    report = index.add(find_images(archive))
    assert report["added"] == 0 and report["unchanged"] == len(before) == len(index)
    key = lambda row: (row["file"], row["col"], row["row"])  # noqa: E731
    assert sorted(index.rows(), key=key) == sorted(before, key=key)
    assert sorted(map(tuple, vectors)) == sorted(tuple(row["vector"]) for row in index.rows(columns=["vector"]))
    taken = index.rows("acquired >= timestamp '2021-06-01'")
    assert [row["acquired"] for row in taken] == [datetime(2021, 6, 1, 10, 20, 30, tzinfo=timezone.utc)]
    assert len(index.rows("north > 48")) > 4
    with pytest.raises(ValueError, match="Times are written as: acquired >= timestamp '2021-06-01'"):
        index.rows("acquired >= '2021-06-01'")


def test_a_folder_in_place_of_a_file_means_that_the_file_is_gone(index, archive):
    file = find_images(archive)[0]
    file.unlink()
    file.mkdir()
    assert index.prune() == [str(file)]


# Mistakes in options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"top_k": 0}, {"top_k": -1}, {"top_k": True}, {"rerank_top_k": -3}, {"similarity_weight": float("nan")},
])  # fmt: skip
def test_numbers_of_hits_out_of_range_are_refused(index, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        index.search(CAPTIONS[0], **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        index.search_captions(Image.new("RGB", (40, 40)), **options)


def test_mistakes_of_a_new_user_are_named(tmp_path, run, archive, monkeypatch):
    with pytest.raises(SystemExit, match="there is no .*nothere"):
        run("index", tmp_path / "nothere")
    run("index", archive)
    with pytest.raises(SystemExit, match="--bands needs --image"):
        run("query", CAPTIONS[0], "--bands", "1")
    with pytest.raises(SystemExit, match="two of them name the same"):
        run("query", CAPTIONS[0], "--geojson", tmp_path / "same", "--sheet", f"{tmp_path}/./same")
    code, printed = run("delete", archive, find_images(archive)[0])
    assert (code, printed.out, printed.err) == (1, "1 deleted\n", f"not in the index: {archive}\n")
    with pytest.raises(SystemExit, match="--model /no/where: a checkpoint's folder or a Hub id"):
        main(["info", "--model", "/no/where", "--index", str(tmp_path / "index")])


def test_a_reader_that_has_enough_is_no_error(tmp_path, run, archive, monkeypatch):
    run("index", archive)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert run("export")[0] == 1


def test_without_rasterio_places_are_missed_once_and_added_later(tmp_path, index, archive, monkeypatch, caplog):
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (3, 40, 60), np.uint8)
        write_scene(archive / f"{number}.tif", pixels)
    archive_files._warn_once.cache_clear()
    with monkeypatch.context() as without:
        for name in ("rasterio", "rasterio.io", "rasterio.enums", "rasterio.errors"):
            without.setitem(sys.modules, name, None)
        assert index.add(find_images(archive))["added"] == 2
    assert [record.message for record in caplog.records] == [
        "Places of GeoTIFFs cannot be read without rasterio: pip install 'ieft[geo]', and index again to add them."
    ]
    assert index.rows("north > 48") == []
    assert index.add(find_images(archive))["added"] == 0 and len(index.rows("north > 48")) == 2
