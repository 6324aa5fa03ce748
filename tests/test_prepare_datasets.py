"""Tests of dataset preparation: spellings of folder names, missing validation splits, invalid examples."""

import io
import json
import logging
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import rasterio
from hub_server import running_hub
from huggingface_hub import DatasetCard
from PIL import Image

import prepare_datasets
from ieft.data.images import read_image
from ieft.data.streaming import stream_hub_dataset
from prepare_datasets import BadRowsError, load_lazily, load_retrieval_dataset, main, published_counts
from processing_ieft import to_rgb

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep prepared splits of the tests out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_folder(folder, *, annotations="dataset.json", images="images", suffix=".jpg",
                 splits=("train", "val", "test"), count=10):  # fmt: skip
    """A small dataset in the distributed format, `count` images per split."""
    (folder / images).mkdir(parents=True)
    entries = []
    for split in splits:
        for number in range(count):
            filename = f"{split}_{number}{suffix}"
            pixels = np.random.default_rng(len(entries)).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / images / filename)
            sentences = [{"raw": f" a {split} scene {number} seen {look} . "} for look in range(5)]
            entries.append({"filename": filename, "split": split, "sentences": sentences, "imgid": len(entries)})
    (folder / annotations).write_text(json.dumps({"images": entries, "dataset": "test"}))
    return entries


def rewrite(folder, entries):
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))


@pytest.mark.parametrize(
    "name, annotations, images, suffix",
    [
        ("rsicd", "dataset_rsicd.json", "RSICD_images", ".jpg"),
        ("rsitmd", "dataset_RSITMD.json", "images", ".tif"),
        ("ucm", "dataset.json", "imgs", ".tif"),
        ("sydney", "dataset.json", "imgs", ".tif"),
    ],
)
def test_each_benchmark_in_its_distributed_spelling(tmp_path, name, annotations, images, suffix):
    write_folder(tmp_path / "data", annotations=annotations, images=images, suffix=suffix)
    splits = load_retrieval_dataset(name, tmp_path / "data")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 10, "validation": 10, "test": 10}
    row = splits["test"][3]
    assert set(row) == {"image", "filename", "captions"}
    assert row["filename"] == f"test_3{suffix}" and row["image"].size == (24, 20)
    assert row["captions"] == [f"a test scene 3 seen {look} ." for look in range(5)]


def test_a_folder_is_taken_by_its_path_from_anywhere(tmp_path, monkeypatch):
    write_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    splits = load_retrieval_dataset("mine")
    monkeypatch.chdir("/")
    assert splits["train"][0]["image"].size == (24, 20)  # absolute paths outlive a change of directory


def test_a_missing_validation_split_is_carved_from_train_and_said(tmp_path, caplog):
    write_folder(tmp_path / "data", splits=("train", "test"), count=30)
    with caplog.at_level(logging.WARNING):
        first = load_retrieval_dataset(str(tmp_path / "data"), seed=0)
    assert "3 of 30 training images are set aside" in caplog.text
    assert {split: len(rows) for split, rows in first.items()} == {"train": 27, "validation": 3, "test": 30}
    again = load_retrieval_dataset(str(tmp_path / "data"), seed=0)
    other = load_retrieval_dataset(str(tmp_path / "data"), seed=1)
    assert list(first["validation"]["filename"]) == list(again["validation"]["filename"])
    assert list(first["validation"]["filename"]) != list(other["validation"]["filename"])
    assert not set(first["validation"]["filename"]) & set(first["train"]["filename"])


def test_an_edited_annotation_file_is_noticed(tmp_path):
    entries = write_folder(tmp_path / "data")
    load_retrieval_dataset(str(tmp_path / "data"))
    entries[0]["sentences"][0]["raw"] = "something new ."
    rewrite(tmp_path / "data", entries)
    assert load_retrieval_dataset(str(tmp_path / "data"))["train"][0]["captions"][0] == "something new ."


def test_scenes_are_drawn_once_and_kept(tmp_path):
    splits = load_retrieval_dataset("scenes")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 1000, "validation": 100, "test": 100}
    assert splits["test"][0]["image"].size == (96, 96) and len(splits["test"][0]["captions"]) == 5
    captions = [set(caption for row in splits[name]["captions"] for caption in row) for name in ("train", "test")]
    assert len(captions[1] - captions[0]) > 300  # the test split is not the training split again
    streamed = next(iter(load_retrieval_dataset("scenes", streaming=True)["test"]))
    assert streamed["captions"] == splits["test"][0]["captions"]
    again = load_retrieval_dataset("scenes", seed=5)  # the seed of a training run draws no other scenes
    assert list(again["test"]["captions"]) == list(splits["test"]["captions"])


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_named_dataset_without_its_folder_says_where_to_get_it():
    with pytest.raises(ValueError, match="https://github.com/.*--data_dir"):
        load_retrieval_dataset("rsicd")
    with pytest.raises(ValueError, match="scenes, twins, rsicd, rsitmd, ucm, sydney.*'nowhere'"):
        load_retrieval_dataset("nowhere")


def break_missing(folder, entries):
    (folder / "images" / "train_0.jpg").unlink()


def break_truncated(folder, entries):
    path = folder / "images" / "train_0.jpg"
    path.write_bytes(path.read_bytes()[:400])


def break_not_an_image(folder, entries):
    (folder / "images" / "train_0.jpg").write_text("<html>not found</html>")


def break_empty(folder, entries):
    (folder / "images" / "train_0.jpg").write_bytes(b"")


def break_bomb(folder, entries):
    Image.new("1", (13_500, 13_500)).save(folder / "images" / "bomb.png")  # 182 million pixels in some kilobytes
    (folder / "images" / "bomb.png").rename(folder / "images" / "train_0.jpg")


def break_no_captions(folder, entries):
    entries[0]["sentences"] = []


def break_twice(folder, entries):
    entries.append(entries[0] | {"split": "test"})


@pytest.mark.parametrize(
    "fault, reason, left",
    [
        (break_missing, "train_0.jpg: no such image file", 29),
        (break_truncated, "train_0.jpg: unreadable image: .*[Tt]runcated", 29),
        (break_not_an_image, "train_0.jpg: unreadable image: cannot identify", 29),
        (break_empty, "train_0.jpg: unreadable image", 29),
        (break_bomb, "train_0.jpg: unreadable image: .*decompression bomb.*cut the image into tiles", 29),
        (break_no_captions, "train_0.jpg: no captions", 29),
        (break_twice, "train_0.jpg: named before", 30),
    ],
)
def test_a_bad_row_stops_before_anything_or_is_skipped_by_name(tmp_path, caplog, fault, reason, left):
    entries = write_folder(tmp_path / "data")
    fault(tmp_path / "data", entries)
    rewrite(tmp_path / "data", entries)
    with pytest.raises(BadRowsError, match=f"(?s){reason}.*--on_bad_rows skip"):
        load_retrieval_dataset(str(tmp_path / "data"))
    with caplog.at_level(logging.WARNING):
        splits = load_retrieval_dataset(str(tmp_path / "data"), on_bad_rows="skip")
    assert "train_0.jpg" in caplog.text
    assert sum(len(rows) for rows in splits.values()) == left


def test_a_blank_caption_is_dropped_and_its_image_kept(tmp_path):
    entries = write_folder(tmp_path / "data")
    entries[0]["sentences"][2]["raw"] = "  "
    rewrite(tmp_path / "data", entries)
    with pytest.raises(BadRowsError, match="train_0.jpg: a blank caption"):
        load_retrieval_dataset(str(tmp_path / "data"))
    splits = load_retrieval_dataset(str(tmp_path / "data"), on_bad_rows="skip")
    assert len(splits["train"][0]["captions"]) == 4 and len(splits["train"]) == 10


@pytest.mark.parametrize(
    "content, message",
    [
        ("not json", "is not JSON"),
        ('{"pictures": []}', "list `images` that is not empty"),
        ('{"images": [{"filename": "a.jpg", "split": "train"}]}', "image 0 must have .*`sentences`"),
        ('{"images": [{"filename": "a.jpg", "split": "holdout", "sentences": []}]}', "image 0 must have .*holdout"),
        ('{"images": ["a.jpg"]}', "image 0 must have"),
    ],
)
def test_a_file_of_another_shape_is_an_error_that_shows_the_place(tmp_path, content, message):
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_retrieval_dataset(str(tmp_path / "data"))


def test_a_folder_without_annotations_names_what_was_expected(tmp_path):
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="no annotation file: expected one of dataset.json.*found images"):
        load_retrieval_dataset(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="stop, skip"):
        load_retrieval_dataset("scenes", on_bad_rows="ignore")


# Images as remote sensing has them -----------------------------------------------------------------------------------


def write_scenes(folder, bands, depth):
    """As `write_folder`, with TIFF images of several bands."""
    entries = write_folder(folder, suffix=".tif", count=2)
    for number, entry in enumerate(entries):
        pixels = np.random.default_rng(number).integers(200, 3000, (bands, 20, 24)).astype(depth)
        shape = {"count": bands, "width": 24, "height": 20, "dtype": depth}
        with rasterio.open(folder / "images" / entry["filename"], "w", driver="GTiff", **shape) as scene:
            scene.write(pixels)
    return folder


@pytest.mark.parametrize("bands, depth", [(13, "uint16"), (4, "float32"), (3, "uint16"), (1, "int16")])
@pytest.mark.parametrize("streaming", [False, True])
def test_scenes_of_every_kind_come_out_as_they_are_read(tmp_path, bands, depth, streaming):
    folder = write_scenes(tmp_path / "data", bands, depth)
    chosen = "3,2,1" if bands > 3 else None
    splits = load_retrieval_dataset(str(folder), bands=chosen, streaming=streaming)
    lazy, _ = load_lazily(str(folder), bands=chosen)
    for name, split in splits.items():
        for row, same in zip(split, lazy[name], strict=True):
            expected = read_image(folder / "images" / row["filename"], bands=(3, 2, 1) if chosen else None)
            for image in (row["image"], same["image"]):
                assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(expected))
            assert np.asarray(expected).mean() > 90 and row["captions"] == same["captions"]


def test_bands_that_were_not_chosen_are_asked_for_before_anything(tmp_path, capsys):
    folder = write_scenes(tmp_path / "data", 13, "uint16")
    command = [str(folder), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 1
    printed = capsys.readouterr().err
    assert "train_0.tif: unreadable image: it has 13 bands: choose three, such as --bands 3,2,1" in printed
    assert "6 x unreadable image: choose bands that there are with --bands" in printed
    assert main([*command, "--bands", "red"]) == 1 and "one number or three" in capsys.readouterr().err
    assert main([*command, "--bands", "4,3,2"]) == 0
    first = datasets.load_dataset(str(tmp_path / "out"))["train"][0]["image"]
    assert np.array_equal(
        np.asarray(first), np.asarray(read_image(folder / "images" / "train_0.tif", bands=(4, 3, 2)))
    )
    assert main([*command, "--bands", "1,2,3"]) == 1 and "pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--bands", "1,2,3", "--overwrite"]) == 0 and "out written" in capsys.readouterr().out
    other = load_retrieval_dataset(str(tmp_path / "out"))["train"][0]["image"]  # `load_dataset` may keep the old ones
    assert not np.array_equal(np.asarray(first), np.asarray(other))


# The command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_shards_that_the_library_reads_back(tmp_path, capsys, monkeypatch):
    write_folder(tmp_path / "data")
    command = [str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--num_proc", "2"]
    monkeypatch.setattr("ieft.data.prepared.ROWS_IN_A_SHARD", 4)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "train: 10 images, 50 captions" in printed and "0 bad rows" in printed and "written" in printed
    shutil.move(tmp_path / "data", tmp_path / "moved")  # the shards hold the images
    read = datasets.load_dataset(str(tmp_path / "out"))
    shutil.move(tmp_path / "moved", tmp_path / "data")
    splits = load_retrieval_dataset(str(tmp_path / "data"))
    assert set(read) == set(splits) and len(list((tmp_path / "out" / "data").glob("test-*-of-00003.parquet"))) == 3
    for name, split in splits.items():
        assert read[name]["filename"] == split["filename"] and read[name]["captions"] == split["captions"]
        for ours, theirs in zip(read[name], split, strict=True):
            assert np.array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
    assert main(command) == 0 and "holds these splits already" in capsys.readouterr().out
    again = load_retrieval_dataset(str(tmp_path / "out"))  # what was prepared is a source itself
    assert again["test"]["captions"] == splits["test"]["captions"]


def test_the_command_ends_with_the_report_and_no_traceback(tmp_path, capsys):
    entries = write_folder(tmp_path / "data")
    break_missing(tmp_path / "data", entries)
    assert main([str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "row 0, train_0.jpg: no such image file" in capsys.readouterr().err
    listed = json.loads((tmp_path / "out" / "bad_rows.json").read_text())
    assert [row["filename"] for row in listed] == ["train_0.jpg"] and not (tmp_path / "out" / "data").exists()
    assert main([str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "an existing folder or file" in capsys.readouterr().err
    foreign = tmp_path / "foreign" / "data"
    foreign.mkdir(parents=True)
    (foreign / "train.parquet").write_bytes(b"precious")
    options = ["--on_bad_rows", "skip", "--output_dir", str(tmp_path / "foreign")]
    assert main([str(tmp_path / "data"), *options]) == 1
    assert (foreign / "train.parquet").read_bytes() == b"precious"


def test_counts_are_compared_with_the_published_ones(tmp_path):
    write_folder(tmp_path / "data")
    lines = published_counts("sydney", load_retrieval_dataset("sydney", tmp_path / "data"))
    assert lines == [
        "sydney: 30 images; 613 are published: -583.",
        "sydney: 150 captions; 3,065 are published: -2,915.",
    ]


def test_checked_images_are_not_decoded_again_until_one_changes(tmp_path, monkeypatch):
    write_folder(tmp_path / "data")
    load_retrieval_dataset(str(tmp_path / "data"))
    decoded = []
    monkeypatch.setattr("prepare_datasets.image_fault", lambda image, bands: decoded.append(image))
    load_retrieval_dataset(str(tmp_path / "data"))
    assert decoded == []
    images = tmp_path / "data" / "images"
    (images / "test_0.jpg").write_bytes((images / "train_0.jpg").read_bytes())
    load_retrieval_dataset(str(tmp_path / "data"))
    assert len(decoded) == 30


def test_a_split_whose_rows_are_all_bad_is_not_replaced_by_training_images(tmp_path, caplog):
    entries = write_folder(tmp_path / "data")
    for entry in entries:
        if entry["split"] == "test":
            entry["sentences"] = []
    rewrite(tmp_path / "data", entries)
    splits = load_retrieval_dataset(str(tmp_path / "data"), on_bad_rows="skip")
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "validation": 10}
    assert "No row of the test split can be used" in caplog.text


PUSH_AND_LOAD = """
import sys
from prepare_datasets import load_retrieval_dataset, main
assert main([sys.argv[1], "--output_dir", "out", "--push_to_hub", "someone/fields"]) == 0
splits = load_retrieval_dataset("someone/fields")
print({name: (len(split), split[3]["filename"], split[3]["image"].size) for name, split in splits.items()})

from huggingface_hub import HfApi
hub = HfApi()
def edit(repository, path, content):
    hub.create_repo(repository, repo_type="dataset", exist_ok=True)
    hub.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repository, repo_type="dataset")
push = [sys.argv[1], "--output_dir", "out", "--push_to_hub"]
assert main([*push, "someone/fields"]) == 0  # the same run again
for repository, path in (("foreign", "data/mine.parquet"), ("fields", "README.md"), ("fields", "data/mine.parquet")):
    edit(f"someone/{repository}", path, b"mine")
    assert main([*push, f"someone/{repository}"]) == 1
edit("someone/fields", "notes.md", b"mine")
assert main([*push, "someone/fields", "--overwrite"]) == 0
"""


def test_a_push_to_the_hub_comes_back_by_its_name(tmp_path):
    write_folder(tmp_path / "data")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with running_hub() as (address, hub):
        environment |= {"HF_ENDPOINT": address, "HF_TOKEN": "anything", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", PUSH_AND_LOAD, str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        files, foreign = hub.files("someone/fields"), hub.files("someone/foreign")
    refused = re.findall(r"^someone/(.*) on the Hub (?:holds files that this run did not push|was edited).*\((.*)\)",
                         done.stderr, re.MULTILINE)  # fmt: skip
    assert refused == [("foreign", "data/mine.parquet"), ("fields", "README.md"),
                       ("fields", "README.md, data/mine.parquet")]  # fmt: skip
    assert foreign["data/mine.parquet"] == b"mine"  # and what is pushed over with --overwrite is the dataset alone:
    assert "data/mine.parquet" not in files and files["notes.md"] == b"mine"
    assert f"Pushed: {address}/" in done.stdout
    expected = {name: (10, f"{short}_3.jpg", (24, 20))
                for name, short in (("train", "train"), ("validation", "val"), ("test", "test"))}  # fmt: skip
    assert str(expected) in done.stdout.splitlines()
    card = DatasetCard(files["README.md"].decode())
    assert card.data.configs[0]["data_files"][2] == {"split": "test", "path": "data/test-*"}
    assert "| train | 10 | 50 |" in card.text and "remote-sensing" in card.data.tags


def write_caption_rows(folder, order):
    """A Hub dataset with one caption per row: the images by number, in the given order."""
    images = [to_bytes(Image.new("RGB", (8, 8), (40 * number, 90, 10))) for number in range(3)]
    rows = [{"image": {"bytes": images[number], "path": None}, "caption": f"field {number}, sentence {place} ."}
            for place, number in enumerate(order)]  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def to_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_stream_joins_the_captions_of_one_image_or_is_refused(tmp_path):
    options = {"image_fault": lambda image, bands: None, "on_bad_rows": "stop"}
    follow = write_caption_rows(tmp_path / "follow", [0, 0, 1, 1, 1, 2])
    rows = list(stream_hub_dataset(str(follow), {}, **options)["train"])
    assert [len(row["captions"]) for row in rows] == [2, 3, 1]
    apart = write_caption_rows(tmp_path / "apart", [0, 1, 0])
    with pytest.raises(ValueError, match="do not follow one another"):
        list(stream_hub_dataset(str(apart), {}, **options)["train"])


def test_a_report_on_an_edited_source_replaces_nothing(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    entries = write_folder(data, count=3)
    command = [str(data), "--output_dir", str(out), "--report", "--cache_dir", str(tmp_path / "cache")]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"report.txt", "report.json", "report.png"}
    entries[0]["sentences"].pop()
    rewrite(data, entries)
    assert main(command) == 1
    assert "splits of other rows" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main([*command, "--overwrite"]) == 0
    assert (out / "report.json").read_bytes() != before[out / "report.json"]


def test_images_in_an_archive_beside_the_annotations_are_named(tmp_path, capsys):
    data = tmp_path / "data"
    write_folder(data, count=2)
    shutil.make_archive(str(data / "images"), "zip", data / "images")
    shutil.rmtree(data / "images")
    assert main([str(data), "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]) == 1
    printed = capsys.readouterr().err
    assert "no such image file, but an archive beside the annotations: images.zip" in printed and "unpack" in printed


def test_no_folder_of_this_machine_is_published(tmp_path):
    """Whether the table names images by whole paths, as on this machine or on another, or they are damaged."""
    write_folder(tmp_path / "data", count=4)
    (tmp_path / "data" / "images" / "test_0.jpg").write_bytes(b"no image")
    names = sorted(path.name for path in (tmp_path / "data" / "images").iterdir())
    for number, folder in enumerate([f"{tmp_path}/data/images/", "C:\\Users\\me\\images\\", "/home/me/images/"]):
        table, out = tmp_path / "data" / f"{number}.csv", tmp_path / f"out{number}"
        table.write_text("\n".join(["image,caption", *(f"{folder}{name},a field {name}" for name in names)]))
        options = ["--on_bad_rows", "skip", "--report", "--cache_dir", str(tmp_path / "cache")]
        assert main([str(table), "--output_dir", str(out), *options]) == 0
        pushed = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert not [path for path, content in pushed.items() if b"/images" in content or b"images\\" in content]
        splits = datasets.load_dataset(str(out))
        assert sorted(name for split in splits.values() for name in split["filename"]) == sorted(
            set(names) - {"test_0.jpg"}
        )
        assert [bad["filename"] for bad in json.loads((out / "bad_rows.json").read_text())] == ["test_0.jpg"]


def test_names_that_would_no_longer_differ_stay_whole():
    rows = [{"filename": name} for name in ("/a/1.png", "/b/1.png", "b/1.png")]
    prepare_datasets.shorten_names(rows)
    assert [row["filename"] for row in rows] == ["/a/1.png", "/b/1.png", "b/1.png"]
    prepare_datasets.shorten_names(
        rows := [{"filename": "/a/x/1.png"}, {"filename": "/a/y/1.png"}, {"filename": "2.png"}]
    )
    assert [row["filename"] for row in rows] == ["x/1.png", "y/1.png", "2.png"]


@pytest.mark.parametrize("limit", [1000, 20_000])  # the cache of splits, and a shard, cannot be written
def test_a_full_disk_is_named_and_the_same_command_goes_on_later(tmp_path, capsys, limit):
    write_folder(tmp_path / "data", suffix=".png")
    command = [str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--num_proc", "1"]
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, whole[1]))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert "must be writable and have room" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/data/*"))
    assert main(command) == 0
    assert len(datasets.load_dataset(str(tmp_path / "out"))["train"]) == 10


def test_names_that_the_terminal_cannot_show_end_no_command(tmp_path, monkeypatch):
    write_folder(tmp_path / "daten", suffix=".png")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "daten"), "--output_dir", str(tmp_path / "日本")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "prepare_datasets.py"), run_name="__main__")
    assert ended.value.code == 0
    printed.flush()
    assert b"\\u65e5\\u672c written" in printed.buffer.getvalue()
