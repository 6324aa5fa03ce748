"""Tests of adding to an index: the pipeline gives the rows of a plain loop, and names what ends its workers."""

import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_index import NUM_IMAGES, archive, checkpoint, loaded, scene  # noqa: F401
from test_search import run  # noqa: F401
from test_tiles import write_scene

from ieft.data.images import read_image
from ieft.evaluation import ranking
from ieft.evaluation.devices import choose_device, choose_dtype
from ieft.search import geography, ingestion, read_ahead
from ieft.search.archive_files import find_images
from ieft.search.index import ImageIndex
from ieft.search.read_ahead import ReadAhead
from ieft.search.tables import KEY
from processing_ieft import IeftImageProcessor, IeftProcessor

# ruff: noqa: F811


def create(folder, loaded, **options):
    return ImageIndex(folder, loaded[0], processor=loaded[1], create=True, dtype="float32", **options)


def table_of(index):
    """Rows in the order in which they were added."""
    return index.table.to_arrow().to_pylist()


def same_rows(rows, others):
    """Whether rows and their order are the same, and vectors but for rounding."""
    vectors = [np.array([row.pop("vector") for row in some]) for some in (rows, others)]
    return rows == others and np.allclose(*vectors, atol=1e-5)


@pytest.fixture
def forked(monkeypatch):
    """Worker processes that are forked from this one, with what the test has changed in it."""
    monkeypatch.setattr(read_ahead, "_can_fork", lambda: True)


# The plain loop -----------------------------------------------------------------------------------------------------


def test_rows_are_those_of_a_plain_loop(tmp_path, loaded, archive):
    """Decoding in turn, the plain network: what the pipeline replaces."""
    model, processor = loaded
    files = find_images(archive)
    index = create(tmp_path / "index", loaded)
    index.add(files, batch_size=5)
    rows = table_of(index)
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row in rows:
        with Image.open(row["file"]) as image:
            assert (row["width"], row["height"]) == image.size
        with torch.no_grad():
            alone = model.get_image_features(processor(images=[read_image(row["file"])])["pixel_values"])[0]
        np.testing.assert_allclose(row["vector"], alone, atol=1e-5)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_processes_give_the_rows_of_one_in_their_order(tmp_path, loaded, archive, scene, forked, caplog, num_workers):
    (archive / "cut.png").write_bytes(find_images(archive)[0].read_bytes()[:600])
    files = [*find_images(archive), scene]
    one, many = create(tmp_path / "one", loaded), create(tmp_path / "many", loaded)
    expected = one.add(files, tile=32, batch_size=5)
    assert many.add(files, tile=32, batch_size=5, num_workers=num_workers) == expected
    assert list(expected["unreadable"]) == [str(archive / "cut.png")]
    assert same_rows(table_of(many), table_of(one))


def test_a_process_that_dies_is_named_by_its_file_and_the_rest_is_added(
    tmp_path, loaded, archive, forked, monkeypatch
):
    files, read_whole = find_images(archive), read_ahead.read_whole

    def die(file, **options):
        if str(file) == str(files[5]):
            os.kill(os.getpid(), signal.SIGKILL)
        return read_whole(file, **options)

    monkeypatch.setattr(read_ahead, "read_whole", die)
    with ReadAhead(2) as reader:
        while not reader._is_ready.done():
            time.sleep(0.01)
        report = create(tmp_path / "index", loaded).add(files, reader=reader)
    assert report["added"] == NUM_IMAGES - 1
    assert report["unreadable"] == {str(files[5]): f"{files[5]}: {read_ahead.DIED}"}


def test_warnings_of_processes_are_logged_here(forked, caplog):
    with ReadAhead(1) as reader:
        assert reader.run_alone(logging.getLogger("ieft.somewhere").warning, ("%s is wrong", "it")) is None
    assert [record.getMessage() for record in caplog.records] == ["it is wrong"]


def test_workers_end_when_the_command_is_killed_and_it_resumes(tmp_path, checkpoint, loaded, archive):
    """The processes are those of the real command."""
    command = [sys.executable, "-m", "ieft.search.command", "index", archive, "--num_workers", "2"]
    places = ["--model", checkpoint, "--index", tmp_path / "index"]
    with subprocess.Popen([*command, *places], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as indexing:
        while indexing.poll() is None and len(workers := children_of(indexing.pid)) < 2:
            time.sleep(0.01)
        indexing.kill()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(is_running, workers))
    index = create(tmp_path / "index", loaded)
    index.add(find_images(archive))
    assert len(index) == NUM_IMAGES


def children_of(process):
    try:
        with open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        pytest.skip("child processes are listed by Linux alone")


def is_running(process):
    try:
        with open(f"/proc/{process}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Scenes in parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_window", [True, False])
def test_a_scene_that_is_read_in_many_tasks_has_the_rows_of_one(tmp_path, loaded, scene, monkeypatch, by_window):
    if by_window:
        monkeypatch.setattr("ieft.data.images.MAX_PIXELS", 1000)  # larger ones are read by window
    else:
        scene = tmp_path / "scene.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 104, 3), np.uint8)).save(scene)
    whole, parts = create(tmp_path / "whole", loaded), create(tmp_path / "parts", loaded)
    report = whole.add([scene], tile=16)
    assert report["added"] == 63
    monkeypatch.setattr(read_ahead, "BYTES_PER_TASK", 5 * 3 * 32**2)
    monkeypatch.setattr(read_ahead, "MOST_BYTES_PER_TASK", 7 * 3 * 32**2)
    monkeypatch.setattr(ingestion, "ROWS_AT_ONCE", 4)
    assert parts.add([scene], tile=16) == report
    assert same_rows(table_of(parts), table_of(whole))
    parts.table.delete("col > 40 OR row = 12")
    missing = 63 - len(parts)
    assert parts.add([scene], tile=16) == {"added": missing, "unchanged": 63 - missing, "unreadable": {}}


def test_a_scene_that_breaks_off_in_a_later_task_keeps_what_comes_before(tmp_path, loaded, scene, monkeypatch):
    monkeypatch.setattr("ieft.data.images.MAX_PIXELS", 1000)
    write_scene(scene, np.random.default_rng(3).integers(0, 256, (3, 80, 104), np.uint8))
    content = scene.read_bytes()
    scene.write_bytes(content[: len(content) * 2 // 3])
    whole, parts = create(tmp_path / "whole", loaded), create(tmp_path / "parts", loaded)
    report = whole.add([scene], tile=16)
    monkeypatch.setattr(read_ahead, "BYTES_PER_TASK", 5 * 3 * 32**2)
    monkeypatch.setattr(read_ahead, "MOST_BYTES_PER_TASK", 7 * 3 * 32**2)
    assert parts.add([scene], tile=16) == report
    assert 0 < report["added"] < 63 and list(report["unreadable"]) == [str(scene)]
    assert [[row[name] for name in KEY] for row in table_of(parts)] == [
        [row[name] for name in KEY] for row in table_of(whole)
    ]


# What the network takes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 2, 1]},
                                      {"do_normalize": False, "rescale_factor": 1 / 100}])  # fmt: skip
def test_pixels_are_scaled_as_the_processor_scales_them(tmp_path, loaded, settings):
    processor = IeftProcessor(IeftImageProcessor(32, **settings), loaded[1].tokenizer)
    index = ImageIndex(tmp_path / "index", loaded[0], processor=processor, create=True)
    squares = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    expected = processor(images=[Image.fromarray(square) for square in squares])["pixel_values"]
    torch.testing.assert_close(index.to_pixels(squares), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_embeddings_are_comparable_with_those_in_float32(tmp_path, loaded, archive, monkeypatch):
    index = create(tmp_path / "index", loaded)
    index.add(find_images(archive))
    expected = np.array([row["vector"] for row in index.rows(columns=["vector"])])
    files = [row["file"] for row in index.rows(columns=["file"])]
    monkeypatch.setattr(ranking, "multiplies_bfloat16", lambda: True)  # imitated, if need be
    monkeypatch.setattr("ieft.cpu.prepacked.multiplies_bfloat16", lambda: True)
    reduced = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1], dtype="bfloat16")
    found = reduced.embed_images([read_image(file) for file in files])
    assert reduced.dtype == torch.bfloat16
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    differences = np.abs(found @ expected.T - expected @ expected.T)
    assert 0 < differences.max() < 0.02
    assert reduced.add(files)["unchanged"] == NUM_IMAGES


def test_threads_that_embed_compute_in_the_chosen_type(tmp_path, loaded, archive):
    """Where the network is not prepacked, as on a GPU, the type is a state of each thread."""
    index = create(tmp_path / "index", loaded)
    file = find_images(archive)[0]
    exact = index.embed_images([read_image(file)])[0]
    index.dtype = torch.bfloat16
    index.add([file])
    stored = index.rows(columns=["vector"])[0]["vector"]
    np.testing.assert_allclose(stored, index.embed_images([read_image(file)])[0], atol=1e-5)
    assert np.abs(stored - exact).max() > 1e-4


def test_devices_and_types_that_are_not_there_are_refused(tmp_path, run, loaded, monkeypatch):
    with pytest.raises(ValueError, match="A device such as cuda.* got 'gpu'"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="got 'cuda:77'"):
        choose_device("cuda:77")
    with pytest.raises(ValueError, match="got 'meta'"):
        choose_device("meta")
    with pytest.raises(ValueError, match="one of auto, float32, bfloat16, float16; got 'int8'"):
        choose_dtype(loaded[0], "int8")
    with pytest.raises(ValueError, match="slower than float32 on a CPU"):
        choose_dtype(loaded[0], "float16")
    with pytest.raises(SystemExit, match="ieft-search: A device such as"):
        run("info", "--device", "cuda:77")
    for name in ("--embedder", "--cluster"):
        with pytest.raises(SystemExit, match="2"):
            run("index", str(tmp_path), name, "")
    assert choose_device("cpu").type == "cpu" and choose_dtype(loaded[0], "float32") is None
    monkeypatch.setattr("ieft.evaluation.devices.multiplies_bfloat16", lambda: True)
    assert choose_dtype(loaded[0]) == torch.bfloat16
    monkeypatch.setattr("ieft.evaluation.devices.multiplies_bfloat16", lambda: False)
    assert choose_dtype(loaded[0]) is None


# Metadata behind the pixels, progress, summary -----------------------------------------------------------------------


def test_a_png_is_decoded_for_its_metadata_only_if_there_is_some_behind_the_pixels(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x8769] = {0x9003: "2021:06:01 10:20:30"}
    Image.new("RGB", (40, 30)).save(tmp_path / "plain.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "early.png", exif=exif)
    content = (tmp_path / "early.png").read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    end = content.index(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(content[:start] + content[stop:end] + content[start:stop] + content[end:])
    decoded, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile, "load", lambda image: decoded.append(image.filename) or load(image)
    )
    found = [geography.read_metadata(str(tmp_path / f"{name}.png")) for name in ("plain", "early", "late")]
    assert found[0] == {} and found[1] == found[2] and found[1]["acquired"].year == 2021
    assert {os.path.basename(file) for file in decoded} == {"late.png"}


def test_the_bar_counts_images_and_tiles_and_the_command_sums_up(tmp_path, loaded, archive, scene, run, capsys):
    create(tmp_path / "other", loaded).add([*find_images(archive)[:3], scene], tile=32)
    assert "| 4 of 4 images, 22 tiles [" in capsys.readouterr().err
    printed = run("index", archive)[1]
    first, second = printed.out.splitlines()
    assert first.startswith("24 added, 0 unchanged, 24 images in ") and printed.err == ""
    assert second.startswith("24 images in ") and second.endswith(" images/s")
    (archive / "cut.png").write_bytes(b"no image")
    printed = run("index", archive)[1]
    assert ", 1 not indexed, for the reasons below\n" in printed.out and "not indexed: " in printed.err
    with pytest.raises(SystemExit, match="--num_workers from 0"):
        run("index", archive, "--num_workers", -1)
