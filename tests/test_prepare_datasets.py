"""Distributed folders in every spelling, validation splits that are missing, and rows that cannot be used."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from prepare_datasets import BadRowsError, load_retrieval_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Prepared splits of the tests stay out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_folder(folder, *, annotations="dataset.json", images="images", suffix=".jpg",
                 splits=("train", "val", "test"), count=10):  # fmt: skip
    """A small dataset in the distributed format, `count` images a split."""
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
    again = load_retrieval_dataset("scenes", seed=5)  # the seed of a training run draws no other scenes
    assert list(again["test"]["captions"]) == list(splits["test"]["captions"])


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_named_dataset_without_its_folder_says_where_to_get_it():
    with pytest.raises(ValueError, match="https://github.com/.*--data_dir"):
        load_retrieval_dataset("rsicd")
    with pytest.raises(ValueError, match="scenes, rsicd, rsitmd, ucm, sydney.*'nowhere'"):
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
        ('{"images": [{"filename": "a.jpg", "split": "dev", "sentences": []}]}', "image 0 must have .*dev"),
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
