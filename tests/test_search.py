"""Tests of the command `ieft-search`, run as users run it, and of its output formats."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

from test_index import CAPTIONS, NUM_IMAGES, archive, checkpoint  # noqa: E402, F401

import ieft  # noqa: E402
from ieft.data.images import read_image  # noqa: E402
from ieft.search.archive_files import read_hit  # noqa: E402
from ieft.search.command import draw_sheet, hit_table, main  # noqa: E402
from processing_ieft import IeftProcessor  # noqa: E402


@pytest.fixture
def run(tmp_path, checkpoint, capsys):  # noqa: F811
    def run(command, *arguments):
        code = main([command, *map(str, arguments), "--model", str(checkpoint), "--index", str(tmp_path / "index")])
        return code, capsys.readouterr()

    return run


def test_index_query_info_export_delete(run, archive):  # noqa: F811
    code, printed = run("index", archive)
    assert code == 0 and printed.out.startswith("24 added, 0 unchanged, 24 images")
    assert run("index", archive)[1].out.startswith("0 added, 24 unchanged")
    table = run("query", CAPTIONS[0], "--top_k", 4)[1].out.splitlines()
    hits = json.loads(run("query", CAPTIONS[0], "--top_k", 4, "--json")[1].out)
    assert [line.split(maxsplit=3)[3] for line in table[1:]] == [hit["file"] for hit in hits]
    assert run("info")[1].out.startswith("24 images or tiles\n0 captions\ncheckpoint ")
    exported = [json.loads(line) for line in run("export", "--where", "width < 40")[1].out.splitlines()]
    assert sorted(row["width"] for row in exported) == list(range(30, 40))
    assert run("delete", hits[0]["file"])[1].out == "1 deleted\n"
    assert hits[0]["file"] not in run("query", CAPTIONS[0], "--top_k", NUM_IMAGES)[1].out


def test_an_image_as_query_and_hits_as_a_sheet(run, archive, tmp_path):  # noqa: F811
    run("index", archive)
    file = archive / "it's 04.png"
    arguments = ("query", "--image", file, "--top_k", 6)
    hits = json.loads(run(*arguments, "--json", "--sheet", tmp_path / "sheet.png")[1].out)["images"]
    assert hits[0]["file"] == str(file.resolve()) and {hit["stage"] for hit in hits} == {"shortlist"}
    one, six = draw_sheet(hits[:1]), Image.open(tmp_path / "sheet.png")
    assert six.height > one.height and np.array_equal(np.asarray(six)[:200], np.asarray(draw_sheet(hits))[:200])
    assert len(np.unique(np.asarray(one)[12:204, 12:204])) > 100  # the picture is there


def test_captions_of_an_image_and_why(run, archive, tmp_path):  # noqa: F811
    (tmp_path / "captions.txt").write_text("\n".join([*CAPTIONS, "", CAPTIONS[0]]))
    code, printed = run("index", archive, "--captions", tmp_path / "captions.txt")
    assert code == 0 and "3 added, 0 unchanged, 3 captions" in printed.out
    arguments = ("query", "--image", archive / "it's 04.png", "--explain", tmp_path / "why")
    found = json.loads(run(*arguments, "--json")[1].out)
    assert sorted(hit["caption"] for hit in found["captions"]) == sorted(CAPTIONS) and len(found["images"]) == 10
    with pytest.raises(SystemExit, match="why exists already: pass --overwrite"):
        run(*arguments)
    printed = run(*arguments, "--overwrite")[1].out
    assert printed.index(found["captions"][0]["caption"]) < printed.index(found["images"][0]["file"])
    assert sorted(path.name for path in (tmp_path / "why").iterdir()) == ["001.png", "002.png", "003.png"]
    assert np.ptp(np.asarray(Image.open(tmp_path / "why" / "001.png"))) > 100
    assert [word for word, _ in found["captions"][0]["words"]] == found["captions"][0]["caption"].split()


def test_a_scene_by_tiles_is_found_by_window(run, tmp_path):  # noqa: F811
    pytest.importorskip("rasterio", reason="GeoTIFF, extra `geo`, is not installed")
    from test_tiles import write_scene

    file = write_scene(tmp_path / "scene.tif", np.random.default_rng(0).integers(0, 256, (3, 80, 104), np.uint8))
    assert run("index", file, "--tile", 32, "--overlap", 0.25)[1].out.startswith("12 added, 0 unchanged, 12 tiles")
    printed = run("query", CAPTIONS[0], "--geojson", tmp_path / "hits.json", "--explain", tmp_path / "why")[1].out
    features = json.loads((tmp_path / "hits.json").read_text())["features"]
    first = features[0]["properties"]
    assert f"{file}  [{first['col']} {first['row']} 32 32" in printed and first["merged"] > 1
    assert len(list((tmp_path / "why").iterdir())) == len(features) < 12
    assert len(json.loads(run("export", "--geojson")[1].out)["features"]) == 12


def test_an_unreadable_image_is_named_and_fails_the_command(run, archive):  # noqa: F811
    (archive / "broken.png").write_bytes(b"no image")
    code, printed = run("index", archive)
    assert code == 1 and "24 added" in printed.out and "not indexed" in printed.err and "broken.png" in printed.err


@pytest.mark.parametrize(
    "arguments, message",
    [((), "sentence or --image"), ((" ",), "empty one"), (("a", "--image", "b"), "sentence or --image"),
     (("--image", "setup.cfg"), "cannot be read"), (("a", "--where", "no_column > 1"), "no_column")],
)  # fmt: skip
def test_a_wrong_query_says_what_was_expected(run, archive, arguments, message):  # noqa: F811
    run("index", archive)
    with pytest.raises(SystemExit, match=message):
        run("query", *arguments)


def test_no_hit_is_said():
    assert hit_table([]) == "No image matches."


@pytest.mark.parametrize("tile", [[], ["--tile", 96]])
def test_bands_are_asked_for_and_remembered(run, tmp_path, tile):
    rasterio = pytest.importorskip("rasterio", reason="GeoTIFF, extra `geo`, is not installed")
    scene, pixels = tmp_path / "a.tif", np.random.default_rng(0).integers(0, 4000, (5, 192, 192), np.uint16)
    shape = {"count": 5, "width": 192, "height": 192, "dtype": "uint16"}
    with rasterio.open(scene, "w", driver="GTiff", **shape) as raster:
        raster.write(pixels)
    code, printed = run("index", scene, *tile)
    assert code == 1 and "such as --bands" in printed.err
    assert run("index", scene, *tile, "--bands", "4,3,2")[0] == 0
    count = 9 if tile else 1
    assert f"0 added, {count} unchanged" in run("index", scene, *tile)[1].out  # chosen before
    expected = np.asarray(read_image(scene, bands=(4, 3, 2)))
    for hit in json.loads(run("query", CAPTIONS[0], "--json", "--top_k", 20)[1].out):
        part = expected[hit["row"] : hit["row"] + hit["tile_height"], hit["col"] : hit["col"] + hit["tile_width"]]
        assert hit["bands"] == "4,3,2" and np.array_equal(np.asarray(read_hit(hit)), part)
    assert f"{count} added" in run("index", scene, *tile, "--bands", "1")[1].out
    with pytest.raises(SystemExit, match="Bands are one number or three"):
        run("index", scene, "--bands", "1,2")


def test_a_caption_enters_each_package_once(run, checkpoint, archive):  # noqa: F811
    """From the command to the table."""
    run("index", archive)
    root, entries = str(Path(ieft.__file__).parent), Counter()

    def package_of(frame):
        file = frame.f_code.co_filename
        return file.removeprefix(root).split(os.sep)[1] if file.startswith(root) else None

    def holds_caption(value):
        return value == CAPTIONS[0] if isinstance(value, str) else isinstance(value, list) and value == token_ids

    def note(frame, event, _):
        if event != "call" or (package := package_of(frame)) is None:
            return
        caller = frame.f_back
        while caller and package_of(caller) is None:
            caller = caller.f_back
        if not (caller and package_of(caller) == package):
            entries[package] += any(map(holds_caption, list(frame.f_locals.values())))

    token_ids = IeftProcessor.from_pretrained(checkpoint)(text=[CAPTIONS[0]])["input_ids"].tolist()
    sys.setprofile(note)
    try:
        table = run("query", CAPTIONS[0], "--top_k", 3)[1].out
    finally:
        sys.setprofile(None)
    assert table.count("re-ranked") == 3
    assert entries.pop("search") <= 1 and {name: count for name, count in entries.items() if count} == {
        "evaluation": 1
    }
