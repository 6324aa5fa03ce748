"""Tests of each kind of collection, as a small example: the same rows and pixels, or an error that names the fault."""

import csv
import io
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_archives import write_tar

from ieft.data.downloads import download
from ieft.data.invalid_examples import BadRowsError, caption_fault
from ieft.data.streaming import stream_hub_dataset
from prepare_datasets import image_fault, load_and_check, load_retrieval_dataset, read_hub_dataset

COUNTS = {"train": 4, "validation": 2, "test": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def samples():
    """Split, file name, PNG bytes and two captions of eight images."""
    for split, count in COUNTS.items():
        for number in range(count):
            colour = (40 * number, 50 * len(split) % 256, 7)
            encoded = io.BytesIO()
            Image.new("RGB", (9, 7), colour).save(encoded, "PNG")
            captions = [f"a {split} field {number} .", f"field {number} of {split} ."]
            yield split, f"{split}_{number}.png", encoded.getvalue(), captions


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for _, name, content, _ in samples():
        (folder / name).write_bytes(content)


def write_karpathy(folder):
    write_images(folder / "images")
    entries = [{"filename": name, "split": split, "sentences": [{"raw": each} for each in captions]}
               for split, name, _, captions in samples()]  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))
    return folder


def write_csv(folder, *, a_row_each=True, columns=("filepath", "caption")):
    write_images(folder / "pictures")
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "split"] if a_row_each else ["image", "caption_1", "caption_2", "split"])
        for split, name, _, captions in samples():
            lines = [[each] for each in captions] if a_row_each else [captions]
            writer.writerows([f"pictures/{name}", *line, split] for line in lines)
    return folder / "captions.csv"


def write_jsonl(folder):
    write_images(folder)
    records = [{"image": name, "captions": captions, "split": split} for split, name, _, captions in samples()]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "rows.jsonl"


def write_parquet(folder):
    write_images(folder)
    records = [{"path": name, "caption": captions, "split": split} for split, name, _, captions in samples()]
    pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_bytes_in_parquet(folder):
    folder.mkdir()
    for wanted in COUNTS:
        records = [{"image": {"bytes": content, "path": None}, "filename": name, "captions": captions}
                   for split, name, content, captions in samples() if split == wanted]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(records), folder / f"{wanted}-00000-of-00001.parquet")
    return folder


def write_image_folder(folder):
    for wanted in COUNTS:
        (folder / wanted).mkdir(parents=True)
        records = []
        for split, name, content, captions in samples():
            if split == wanted:
                (folder / wanted / name).write_bytes(content)
                records += [{"file_name": name, "text": each} for each in captions]
        (folder / wanted / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def write_coco(folder):
    write_images(folder)
    for wanted in COUNTS:
        chosen = [each for each in samples() if each[0] == wanted]
        content = {
            "images": [{"id": number, "file_name": each[1]} for number, each in enumerate(chosen)],
            "annotations": [{"image_id": number, "caption": caption}
                            for number, each in enumerate(chosen) for caption in each[3]],
        }  # fmt: skip
        (folder / f"captions_{wanted}.json").write_text(json.dumps(content))
    return folder


def write_webdataset(folder):
    folder.mkdir()
    for wanted in COUNTS:
        files = {}
        for split, name, content, captions in samples():
            if split == wanted:
                files[name] = content
                files[name.replace(".png", ".txt")] = "\n".join(captions).encode()
        write_tar(folder / f"{wanted}-000.tar", files)
    return folder


def write_legacy_arrow(folder):
    folder.mkdir()
    for wanted, named in {"train": "train", "validation": "val", "test": "test"}.items():
        rows = [each for each in samples() if each[0] == wanted]
        table = pa.Table.from_pydict({
            "image": [each[2] for each in rows],
            "caption": [each[3] for each in rows],
            "image_id": [each[1] for each in rows],
            "split": [named] * len(rows),
        })  # fmt: skip
        with pa.ipc.new_file(str(folder / f"rsicd_caption_karpathy_new_{named}.arrow"), table.schema) as file:
            file.write_table(table)
    return folder


def zipped(folder):
    write_karpathy(folder / "RSICD")
    return shutil.make_archive(str(folder), "zip", folder)


def tarred(folder):
    write_karpathy(folder / "RSICD")
    return shutil.make_archive(str(folder), "gztar", folder)


SOURCES = [write_karpathy, write_csv, lambda folder: write_csv(folder, a_row_each=False), write_jsonl, write_parquet,
           write_bytes_in_parquet, write_image_folder, write_coco, write_webdataset, write_legacy_arrow, zipped,
           tarred]  # fmt: skip
NAMES = ["karpathy", "csv", "csv of caption columns", "jsonl", "parquet of paths", "parquet of bytes", "imagefolder",
         "coco", "webdataset", "legacy arrow", "zip", "tar.gz"]  # fmt: skip


def check_everything(splits):
    expected = {(split, captions[0]): (content, captions) for split, _, content, captions in samples()}
    assert {name: len(split) for name, split in splits.items()} == COUNTS
    for name, split in splits.items():
        for row in split:
            content, captions = expected.pop((name, row["captions"][0]))
            assert row["captions"] == captions and row["filename"]
            assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(io.BytesIO(content))))
    assert not expected


@pytest.mark.parametrize("write", SOURCES, ids=NAMES)
def test_a_source_gives_its_rows_and_pixels(tmp_path, write):
    splits, bad = load_and_check(str(write(tmp_path / "data")))
    assert bad == []
    check_everything(splits)


def test_nwpu_in_its_distributed_shape(tmp_path):
    content = {}
    for split, number in (("train", 0), ("val", 1), ("test", 2)):
        for land_use in ("airport", "beach"):
            name = f"{land_use}_{number}.jpg"
            (tmp_path / "NWPU_images" / land_use).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number * 90, 5, 5)).save(tmp_path / "NWPU_images" / land_use / name)
            sentences = {key: f"{land_use} {key} ." for key in ("raw", "raw_1", "raw_2", "raw_3", "raw_4")}
            content.setdefault(land_use, []).append({"filename": name, "imgid": number, "split": split} | sentences)
    (tmp_path / "dataset_nwpu.json").write_text(json.dumps(content))
    splits = load_retrieval_dataset("nwpu", tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation": 2, "test": 2}
    assert splits["test"][1]["filename"] == "beach/beach_2.jpg" and len(splits["test"][1]["captions"]) == 5
    del content["beach"][0]["raw"]
    (tmp_path / "dataset_nwpu.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image 0 of class 'beach' must have"):
        load_retrieval_dataset("nwpu", tmp_path)


def test_other_column_names_are_asked_for_and_named(tmp_path):
    path = write_csv(tmp_path / "data", columns=("where", "what"))
    with pytest.raises(ValueError, match="columns are where, what, split. Pass --image_column"):
        load_retrieval_dataset(str(path))
    with pytest.raises(ValueError, match="columns are where, what, split"):
        load_retrieval_dataset(str(path), image_column="wrong", caption_column="what")
    check_everything(load_retrieval_dataset(str(path), image_column="where", caption_column="what"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "[1, 2]", "must hold records"),
        ("a.json", '{"images": [{"id": 1}], "annotations": []}', "must be COCO captions"),
        ("a.json", '{"annotations": [], "images": 3}', "must be COCO captions"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.csv", "", "must hold records"),
        ("a.jsonl", '{"image": "x"', "cannot be read as a table"),
        ("a.jsonl", '{"image": "x", "caption": "y", "split": "holdout"}', "split 'holdout'; expected one of train"),
        ("a.parquet", "none", "cannot be read as a table"),
        ("a.arrow", "none", "is not an arrow file"),
        ("a.tar", "none", "is not a tar"),
        ("a.zip", "none", "cannot be unpacked"),
        ("a.doc", "none", "a file that ends in"),
    ],
)
def test_a_file_of_another_shape_is_an_error_that_says_so(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_retrieval_dataset(str(tmp_path / name))


# Captions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("a river .", None),
        ("eine Straße, 3 Bäume", None),
        ("河流", None),
        ("two lines\nof text", None),
        (" ", "a blank caption"),
        ("", "a blank caption"),
        (". , !", "punctuation only"),
        ("a\x00river", "control characters"),
        ("a \x1b[31mriver", "control characters"),
        ("a \ud800 river", "control characters"),
        ("tree " * 10_000, "more than 1,000 words: 10,000"),
        (3, "not text: '3'"),
        (None, "not text"),
        (["a"], "not text"),
    ],
)
def test_each_kind_of_caption(caption, reason):
    fault = caption_fault(caption)
    assert fault is None if reason is None else reason in fault


def test_the_report_names_every_row_and_its_remedy(tmp_path):
    path = write_jsonl(tmp_path / "data")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["captions"], records[1]["captions"] = ["...", "a field ."], []
    records.append(records[2])
    records.append(records[3] | {"split": "test"})
    records[4]["image"] = "gone.png"
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(BadRowsError) as raised:
        load_retrieval_dataset(str(path))
    expected = [
        "row 0, train_0.png: a caption of punctuation only: '...'",
        "row 1, train_1.png: no captions",
        "row 4, gone.png: no such image file",
        "row 8, train_2.png: named before",
        "row 9, train_3.png: named before in another split: train and test",
        "1 x a caption of punctuation only: write the caption",
    ]
    assert [each for each in expected if each not in str(raised.value)] == []
    splits, bad = load_and_check(str(path), on_bad_rows="skip")
    assert [(each.row, each.dropped) for each in bad] == [
        (0, "caption"), (1, "image and captions"), (4, "image and captions"), (8, "image and captions"),
        (9, "image and captions"),
    ]  # fmt: skip
    assert splits["train"]["captions"][0] == ["a field ."]
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 1, "test": 2}


# URLs ----------------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder):
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            """Tests stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_images_by_url_are_fetched_once_and_failures_are_bad_rows(tmp_path):
    write_images(tmp_path / "web")
    with served(tmp_path / "web") as address:
        records = [{"url": f"{address}/{name}", "captions": captions, "split": split}
                   for split, name, _, captions in samples()]  # fmt: skip
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
        check_everything(load_retrieval_dataset(str(tmp_path / "a.jsonl")))
        gone = {"url": f"{address}/gone.png", "captions": ["a field ."], "split": "train"}
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write("\n" + json.dumps(gone))
        with pytest.raises(BadRowsError, match="gone.png: cannot be downloaded: HTTP Error 404"):
            load_retrieval_dataset(str(tmp_path / "a.jsonl"))
        path, reason = download(f"{address}/test_0.png", tmp_path / "small", max_bytes=10)
        assert path is None and "larger than 10 bytes" in reason and not list((tmp_path / "small").iterdir())
    splits, bad = load_and_check(str(tmp_path / "a.jsonl"), on_bad_rows="skip")  # the server is gone, the files kept
    check_everything(splits)
    assert len(bad) == 1


# Streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_karpathy, write_csv, write_webdataset])
def test_a_stream_gives_the_rows_and_pixels_of_the_prepared_splits(tmp_path, write):
    path = str(write(tmp_path / "data"))
    streams = load_retrieval_dataset(path, streaming=True)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    check_everything({name: list(stream) for name, stream in streams.items()})
    assert list(streams["train"])[0]["filename"] == list(load_retrieval_dataset(path)["train"])[0]["filename"]


def test_an_unreadable_image_in_a_stream_stops_or_is_left_out_when_it_passes(tmp_path, caplog):
    path = write_jsonl(tmp_path / "data")
    (tmp_path / "data" / "train_1.png").write_bytes(b"")
    streams = load_retrieval_dataset(str(path), streaming=True)
    assert len(list(streams["test"])) == 2
    with pytest.raises(BadRowsError, match="train_1.png: unreadable image"):
        list(streams["train"])
    streams = load_retrieval_dataset(str(path), streaming=True, on_bad_rows="skip")
    assert [row["filename"] for row in streams["train"]] == ["train_0.png", "train_2.png", "train_3.png"]
    assert "train_1.png: unreadable image" in caplog.text


def test_parquet_is_streamed_as_from_the_hub(tmp_path, caplog):
    folder = write_bytes_in_parquet(tmp_path / "data")
    options = {"image_fault": image_fault, "cache_dir": str(tmp_path / "cache")}
    streams = stream_hub_dataset(str(folder), {}, on_bad_rows="stop", **options)
    check_everything({name: list(stream) for name, stream in streams.items()})
    rows = pq.read_table(folder / "test-00000-of-00001.parquet").to_pylist()
    rows[0]["captions"], rows[1]["image"]["bytes"] = ["..", "a field ."], b"no image"
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    streams = stream_hub_dataset(str(folder), {}, on_bad_rows="stop", **options)
    with pytest.raises(BadRowsError, match="row 0, test_0.png: a caption of punctuation only"):
        list(streams["test"])
    streams = stream_hub_dataset(str(folder), {}, on_bad_rows="skip", **options)
    assert [row["captions"] for row in streams["test"]] == [["a field ."]]
    assert "row 1, test_1.png: unreadable image" in caplog.text


def test_the_splits_of_the_hub_may_be_called_valid(tmp_path):
    """Like `arampacha/rsicd`: columns filename, captions and image, splits train, test and valid."""
    text = datasets.Value("string")
    columns = {"filename": text, "captions": datasets.List(text), "image": datasets.Image()}
    for wanted in COUNTS:
        records = [
            {"filename": f"rsicd_images/{name}", "captions": captions, "image": {"bytes": content, "path": None}}
            for split, name, content, captions in samples()
            if split == wanted
        ]
        named = "valid" if wanted == "validation" else wanted
        datasets.Dataset.from_list(records, datasets.Features(columns)).to_parquet(
            tmp_path / "data" / f"{named}-0.parquet"
        )
    files = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "test", "valid"))
    (tmp_path / "data" / "README.md").write_text("")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    source = read_hub_dataset(str(tmp_path), {}, tmp_path / "kept")
    found = {name: sum(row["split"] == name for row in source.rows) for name in COUNTS}
    assert found == COUNTS and source.rows[0]["filename"] == "rsicd_images/train_0.png"
    streams = stream_hub_dataset(str(tmp_path), {}, image_fault=image_fault, on_bad_rows="stop")
    check_everything({name: list(stream) for name, stream in streams.items()})


def test_a_dataset_that_the_hub_does_not_give_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="someone/nothing-of-this-name is no existing path, and cannot be loaded"):
        load_retrieval_dataset("someone/nothing-of-this-name")
    with pytest.raises(ValueError, match="someone/nothing-of-this-name is no existing path, and cannot be loaded"):
        load_retrieval_dataset("someone/nothing-of-this-name", streaming=True)


@pytest.mark.parametrize("name", ["rsitmd", "ucm", "sydney", "nwpu"])
def test_a_benchmark_without_its_folder_is_told_where_it_is_and_in_which_layout(name):
    with pytest.raises(ValueError, match=rf"{name} has to be downloaded.*https://github.*json beside.*user/name"):
        load_retrieval_dataset(name)


def test_rsicd_without_the_hub_is_told_where_else_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="arampacha/rsicd.*cannot be loaded from the Hub.*rsicd is also.*--data_dir"):
        load_retrieval_dataset("rsicd", cache_dir=tmp_path)


def test_a_file_that_a_table_names_in_two_splits_is_not_merged_but_named(tmp_path):
    path = write_csv(tmp_path / "data")
    with path.open("a") as file:
        file.write("pictures/train_0.png,seen again .,test\n")
    with pytest.raises(BadRowsError, match="train_0.png: named before in another split: train and test"):
        load_retrieval_dataset(str(path))
