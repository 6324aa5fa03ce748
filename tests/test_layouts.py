"""Tests of folders and archives as found in practice: names and metadata of other systems, links, known layouts."""

import io
import json
import logging
import os
import signal
import unicodedata
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from test_archives import write_tar

from ieft.data.archives import extract
from ieft.data.duplicates import find_copies, make_thumbnail
from ieft.data.invalid_examples import BadRowsError
from ieft.data.prepared import PreparedFolder
from ieft.data.scenes import draw_scene
from ieft.data.sources import read_source
from prepare_datasets import load_and_check, main


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(number=0):
    encoded = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(encoded, "PNG")
    return encoded.getvalue()


def write_files(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def karpathy(names, split="train", captions=("a river .",)):
    return json.dumps({"images": [{"filename": name, "split": split, "sentences": [{"raw": each} for each in captions]}
                                  for name in names]})  # fmt: skip


def found(folder):
    """Name -> the path of its image below the folder, or the reason why there is none."""
    return {row["filename"]: row["image"].relative_to(folder).as_posix() if row["image"] else row.get("missing")
            for row in read_source(folder, "x").rows}  # fmt: skip


# Names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named, there",
    [
        ("beach\\a.png", "images/beach/a.png"),
        ("BEACH/A.PNG", "images/beach/a.png"),
        (unicodedata.normalize("NFD", "Köln.png"), unicodedata.normalize("NFC", "images/Köln.png")),
        (unicodedata.normalize("NFC", "Köln.png"), unicodedata.normalize("NFD", "images/Köln.png")),
        ("/home/somebody/data/RSICD/a.png", "RSICD_images/a.png"),
        ("C:\\data\\beach\\a.png", "images/beach/a.png"),
        ("./a.png", "a.png"),
    ],
)
@pytest.mark.parametrize("kind", ["karpathy", "csv"])
def test_a_name_of_another_system_is_found(tmp_path, named, there, kind):
    write_files(tmp_path, [there])
    if kind == "csv":
        (tmp_path / "rows.csv").write_text(f"image,caption\n{named},a river .\n", encoding="utf-8")
    else:
        (tmp_path / "dataset.json").write_text(karpathy([named]))
    assert found(tmp_path) == {named: there}


@pytest.mark.parametrize(
    "named, there, reason",
    [
        ("a.png", ["x/a.png", "y/a.png"], "2 files could be meant: x/a.png, y/a.png"),
        ("old/A.png", ["x/a.png", "y/a.png"], "2 files could be meant"),
        ("beach/1.png", ["beach/2.png", "airport/1.png"], None),  # another class's image would be a guess
        ("test/1.png", ["train/1.png"], None),
    ],
)
def test_a_name_that_could_be_two_files_or_another_is_refused(tmp_path, named, there, reason):
    write_files(tmp_path, there)
    (tmp_path / "rows.csv").write_text(f"image,caption\n{named},a river .\n")
    missing = found(tmp_path)[named]
    assert missing is None if reason is None else reason in missing
    with pytest.raises(BadRowsError, match="which image file is meant is not known" if reason else "no such image"):
        load_and_check(str(tmp_path))


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    write_files(tmp_path / "elsewhere", ["p0.png", "deep/p1.png"])
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "part1").symlink_to("../../elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "itself.png").symlink_to("itself.png")
    (tmp_path / "set" / "dataset.json").write_text(karpathy(["part1/p0.png", "p1.png"]))
    assert found(tmp_path / "set") == {"part1/p0.png": "images/part1/p0.png", "p1.png": "images/part1/deep/p1.png"}


def test_files_of_the_hubs_cache_keep_the_names_of_their_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    (snapshot / "images").mkdir(parents=True)
    write_files(blobs, ["0" * 40, "1" * 40])
    (blobs / ("e" * 40)).write_text("image,caption,split\nimages/0.png,a river .,train\nimages/1.png,a lake .,test\n")
    for number in (0, 1):
        (snapshot / "images" / f"{number}.png").symlink_to(f"../../../blobs/{str(number) * 40}")
    (snapshot / "captions.csv").symlink_to(f"../../blobs/{'e' * 40}")
    for place in (snapshot / "captions.csv", snapshot):
        splits, bad = load_and_check(str(place))
        assert (splits["train"]["filename"][0], splits["test"]["filename"][0], bad) == (
            "images/0.png", "images/1.png", [],
        )  # fmt: skip


def test_one_file_under_two_names_is_not_in_two_splits(tmp_path, caplog):
    write_files(tmp_path, [f"{number}.png" for number in range(4)])
    rows = [("0.png", "train"), ("./0.png", "test"), ("1.png", "train"), ("2.png", "test")]
    (tmp_path / "rows.csv").write_text("image,caption,split\n" + "".join(f"{n},a .b,{s}\n" for n, s in rows))
    with pytest.raises(BadRowsError, match="named before in another split: train and test, as 0.png"):
        load_and_check(str(tmp_path))
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    rows[1] = ("copy.png", "test")
    (tmp_path / "rows.csv").write_text("image,caption,split\n" + "".join(f"{n},a .b,{s}\n" for n, s in rows))
    load_and_check(str(tmp_path))
    assert "1 images are in more than one split under different names" in caplog.text


def test_copies_of_an_image_are_set_aside_together(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(png(number // 4))
    (tmp_path / "rows.csv").write_text("image,caption\n" + "".join(f"{n}.png,river {n} .\n" for n in range(40)))
    splits, _ = load_and_check(str(tmp_path))
    shown = [{int(name.split(".")[0]) // 4 for name in split["filename"]} for split in splits.values()]
    assert len(shown) == 3 and not (shown[0] & shown[1] or shown[0] & shown[2] or shown[1] & shown[2])
    assert sum(map(len, splits.values())) == 40


# Families of layouts ----------------------------------------------------------------------------


def test_coco_as_it_is_laid_out(tmp_path):
    write_files(tmp_path, ["train2017/1.png", "val2017/1.png", "val2017/2.png"])
    (tmp_path / "annotations").mkdir()
    for split, names in (("train2017", ["1.png"]), ("val2017", ["1.png", "2.png"])):
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        captions = [{"image_id": each["id"], "caption": f"{split} {each['file_name']} {n}"} for each in images
                    for n in range(2)]  # fmt: skip
        for kind, annotations in (("captions", captions), ("instances", [{"image_id": 0, "bbox": [0, 0, 1, 1]}])):
            content = json.dumps({"images": images, "annotations": annotations})
            (tmp_path / "annotations" / f"{kind}_{split}.json").write_text(content)
    rows = read_source(tmp_path, "x").rows
    assert [(row["split"], row["image"].relative_to(tmp_path).as_posix(), len(row["captions"])) for row in rows] == [
        ("train", "train2017/1.png", 2), ("validation", "val2017/1.png", 2), ("validation", "val2017/2.png", 2),
    ]  # fmt: skip


def test_the_lists_of_blip_with_the_folder_of_their_images(tmp_path):
    write_files(tmp_path / "pictures", ["train/a.png", "train/b.png", "test/c.png"])
    (tmp_path / "json").mkdir()
    train = [{"image": f"train/{name}.png", "caption": f"{name} {number}", "image_id": name}
             for name in "ab" for number in range(5)]  # fmt: skip
    (tmp_path / "json" / "rs_train.json").write_text(json.dumps(train))
    (tmp_path / "json" / "rs_test.json").write_text(json.dumps([{"image": "test/c.png", "caption": ["c 0", "c 1"]}]))
    splits, bad = load_and_check(str(tmp_path / "json"), str(tmp_path / "pictures"))
    assert sorted(len(row["captions"]) for name in ("train", "validation") for row in splits[name]) == [5, 5]
    assert splits["test"]["captions"][0] == ["c 0", "c 1"] and bad == []
    splits, _ = load_and_check(str(tmp_path / "json" / "rs_train.json"), str(tmp_path / "pictures"))
    assert sum(map(len, splits.values())) == 2
    with pytest.raises(ValueError, match="the folder of the images"):
        load_and_check(str(tmp_path / "json"), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("a_name_each", [True, False])
def test_the_texts_of_amfmn(tmp_path, a_name_each):
    write_files(tmp_path / "images", ["a.png", "b.png", "c.png", "d.png"])
    splits = {"train": "ab", "train_verify": "a", "val_verify": "b", "test": "cd"}
    for split, names in splits.items():
        stem, _, verify = split.partition("_")
        ending = f"_{verify}.txt" if verify else ".txt"
        lines = [f" {name} scene {number} ." for name in names for number in range(5)]
        files = [f"{name}.png" for name in names for _ in range(1 if a_name_each else 5)]
        (tmp_path / f"{stem}_caps{ending}").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{stem}_filename{ending}").write_bytes("\r\n".join(files).encode())
    rows = read_source(tmp_path, "x").rows
    shown = {row["filename"]: (row["split"], len(row["captions"]), row["image"].name) for row in rows}
    assert shown == {"a.png": ("train", 5, "a.png"), "b.png": ("validation", 5, "b.png"),
                     "c.png": ("test", 5, "c.png"), "d.png": ("test", 5, "d.png")}  # fmt: skip
    (tmp_path / "test_caps.txt").write_text("one\ntwo\n\n")
    with pytest.raises(ValueError, match="test_caps.txt has 3 lines, .*test_filename.txt has"):
        read_source(tmp_path, "x")


def test_names_with_dots_in_a_webdataset(tmp_path):
    names = ["tile_0", "tile_3_0.5m", "d/tile_3_0", "tile.3"]
    files = {f"{name}.png": png(n) for n, name in enumerate(names)} | {f"{name}.txt": b"a river ." for name in names}
    rows = read_source(write_tar(tmp_path / "a.tar", files), "a").rows
    assert sorted(row["filename"] for row in rows) == sorted(f"{name}.png" for name in names)
    files = {"a.png": png(), "a.seg.png": png(1), "a.txt": b"a mask beside it", "._a.png": b"x", ".DS_Store": b"x"}
    assert len(read_source(write_tar(tmp_path / "a.tar", files), "a").rows) == 1
    files = {"a.b.png": png(), "a.c.txt": b"whose?", "d.png": png(), "d.txt": b"a river ."}
    with pytest.raises(ValueError, match="further dots in their names belong to no sample"):
        read_source(write_tar(tmp_path / "a.tar", files), "a")
    files = {"a.png": png(), "a.json": b'["one", "two"]'}
    assert read_source(write_tar(tmp_path / "a.tar", files), "a").rows[0]["captions"] == ["one", "two"]


LEFT_BEHIND = ["__MACOSX/RSICD/._d.json", "__MACOSX/._RSICD", ".DS_Store", "RSICD/Thumbs.db", "RSICD/desktop.ini",
               "RSICD/images/._a.png"]  # fmt: skip


@pytest.mark.parametrize("left", [*([each] for each in LEFT_BEHIND), LEFT_BEHIND], ids=str)
def test_what_systems_leave_in_a_zip_is_no_content(tmp_path, left):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("RSICD/dataset.json", karpathy(["a.png", "b.png", "c.png"]))
        for number, name in enumerate("abc"):
            archive.writestr(f"RSICD/images/{name}.png", png(number))
        for name in left:
            archive.writestr(name, b"\0\5\x16\7")
    splits, bad = load_and_check("ucm", str(tmp_path / "a.zip"))
    assert sum(map(len, splits.values())) == 3 and bad == []


def test_names_in_zips_of_windows(tmp_path):
    """Backslashes separate folders, and UTF-8 is written without its flag."""
    name = "images/Köln.png"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("set\\", b"")
        archive.writestr("set\\one.txt", b"one")
        archive.writestr("KXXln.png".join(["", ""]) or "x", b"")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"KXXln", "Köln".encode()))
    extract(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "out" / "set" / "one.txt").read_bytes() == b"one"
    assert (tmp_path / "out" / Path(name).name).is_file()


# Published benchmarks ----------------------------------------------------------------------------


def test_known_faults_of_published_benchmarks_are_left_out_and_all_others_stop(tmp_path, caplog):
    names = ["bridge_218.jpg", "parking_211.jpg", "river_1.jpg", "river_2.jpg"]
    write_files(tmp_path / "RSICD_images", names)
    content = json.loads(karpathy(names, captions=("a river .", "a bridge .")))
    content["images"][0]["sentences"][1]["raw"] = content["images"][1]["sentences"][0]["raw"] = " ."
    (tmp_path / "dataset_rsicd.json").write_text(json.dumps(content))
    splits, bad = load_and_check("rsicd", str(tmp_path))
    assert len(bad) == 2 and sum(len(each) for split in splits.values() for each in split["captions"]) == 6
    assert "rsicd: 2 captions that are known to be faulty as published are skipped" in caplog.text
    content["images"][2]["sentences"][1]["raw"] = " ."
    (tmp_path / "dataset_rsicd.json").write_text(json.dumps(content))
    with pytest.raises(BadRowsError, match="river_1.jpg") as raised:
        load_and_check("rsicd", str(tmp_path))
    assert len(raised.value.bad_rows) == 1
    write_files(tmp_path / "rsitmd" / "images", ["viaduct_4635.tif", "river_1.tif", "river_2.tif"])
    content = json.loads(karpathy(["viaduct_4635.tif", "river_1.tif", "river_2.tif"]))
    content["images"][0]["sentences"][0]["raw"] = ""
    (tmp_path / "rsitmd" / "dataset_RSITMD.json").write_text(json.dumps(content))
    splits, bad = load_and_check("rsitmd", str(tmp_path / "rsitmd"))
    assert [each.dropped for each in bad] == ["image and captions"] and sum(map(len, splits.values())) == 2


# Nothing is overwritten ----------------------------------------------------------------------------


def small_set(folder):
    write_files(folder, [f"{number}.png" for number in range(6)])
    (folder / "rows.csv").write_text("image,caption\n" + "".join(f"{n}.png,river {n} .\n" for n in range(6)))
    return str(folder)


def content_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["README.md", "notes.txt", "bad_rows.json", "data/train.parquet", "report.txt", "x/y"]
)
def test_a_folder_of_something_else_is_refused_before_any_work(tmp_path, capsys, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious")
    before = content_of(out)
    nowhere = str(tmp_path / "nowhere")  # never looked at
    assert main([nowhere, "--output_dir", str(out), "--report"]) == 1
    printed = capsys.readouterr().err
    assert name in printed and "pass --overwrite" in printed and "nowhere" not in printed
    assert content_of(out) == before
    assert main([small_set(tmp_path / "set"), "--output_dir", str(out), "--overwrite"]) == 0
    assert len(datasets.load_dataset(str(out))["train"]) == 4
    assert (out / name).exists() == (name != "data/train.parquet")
    if name in ("notes.txt", "x/y"):
        assert (out / name).read_text() == "precious"


def test_the_same_run_goes_on_and_others_are_refused(tmp_path, capsys):
    folder, out = small_set(tmp_path / "set"), tmp_path / "out"
    command = [folder, "--output_dir", str(out)]
    assert main(command) == 0
    before = content_of(out / "data")
    assert main(command) == 0 and "holds these splits already" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 1 and "dataset of another run" in capsys.readouterr().err
    assert main([small_set(tmp_path / "other"), *command[1:]]) == 1
    with (tmp_path / "set" / "rows.csv").open("a") as file:
        file.write("5.png,seen again .\n")
    assert main(command) == 1 and "the source or its images were edited" in capsys.readouterr().err
    with (tmp_path / "set" / "rows.csv").open("a") as file:
        file.write("gone.png,a river .\n")
    assert main(command) == 1 and "gone.png" in capsys.readouterr().err
    assert json.loads((out / "bad_rows.json").read_text()) == []  # it is of the dataset that is there
    assert content_of(out / "data") == before
    (out / "README.md").write_text("my own words")
    assert main(command) == 1 and "were edited since (README.md)" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "my own words"


def in_another_process(work):
    """Fork, and give the number of the process: imports are not done again."""
    process = os.fork()
    if process:
        return process
    try:
        os._exit(work())
    finally:
        os._exit(99)


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    command = [small_set(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:  # shards are written, and the card is not
        patch.setattr("ieft.data.prepared.PreparedFolder.write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        _, status = os.waitpid(in_another_process(lambda: main(command)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL and (tmp_path / "out" / "data").is_dir()
    assert main(command) == 0
    assert len(datasets.load_dataset(str(tmp_path / "out"))["train"]) == 4


@pytest.mark.parametrize("number", [4, 7])  # of the card, and of the second file of the report
def test_a_run_killed_before_any_record_of_its_files_goes_on(tmp_path, monkeypatch, number):
    """Between a file and its record, the file would be taken for one of the user's."""
    command = [small_set(tmp_path / "set"), "--output_dir", str(tmp_path / "out"), "--report"]
    save, calls = PreparedFolder._save, []

    def save_or_die(folder, manifest):
        calls.append(manifest)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(PreparedFolder, "_save", save_or_die)
        _, status = os.waitpid(in_another_process(lambda: main(command)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert main(command) == 0
    assert {"README.md", "bad_rows.json", "report.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len(datasets.load_dataset(str(tmp_path / "out"))["train"]) == 4


def test_two_processes_may_prepare_one_archive_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("set/dataset.json", karpathy([f"{number}.png" for number in range(30)]))
        for number in range(30):
            archive.writestr(f"set/images/{number}.png", png(number))
    command = [str(tmp_path / "a.zip"), "--output_dir", str(tmp_path / "out")]
    processes = [in_another_process(lambda: main(command)) for _ in range(3)]
    assert [os.waitpid(each, 0)[1] for each in processes] == [0, 0, 0]
    assert sum(map(len, datasets.load_dataset(str(tmp_path / "out")).values())) == 30


# Copies ----------------------------------------------------------------------------


def saved(image, kind, **options):
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return Image.open(io.BytesIO(encoded.getvalue()))


def test_images_that_were_saved_anew_are_recognised_and_others_are_not():
    images = [Image.open(io.BytesIO(png(number))).resize((224, 224)) for number in range(20)]
    ours = [make_thumbnail(each) for each in images]
    for kind, options in (
        ("PNG", {}),
        ("JPEG", {"quality": 75}),
        ("JPEG", {"quality": 50}),
        ("WEBP", {"quality": 80}),
    ):
        copies = [make_thumbnail(saved(each, kind, **options)) for each in images[:10]]
        assert find_copies(ours, copies).tolist() == [True] * 10 + [False] * 10
    small = [draw_scene(2023, number).image for number in range(60)]  # 96 x 96: JPEG changes their cells more
    copies = [make_thumbnail(saved(each, "JPEG", quality=75)) for each in small]
    assert find_copies([make_thumbnail(each) for each in small], copies).all()
    assert not find_copies(copies[:30], copies[30:]).any()
    changed = images[0].copy()
    changed.paste((255, 0, 0), (100, 100, 116, 116))  # one small house
    assert not find_copies([make_thumbnail(changed)], ours).any()
    assert find_copies(ours, []).tolist() == [False] * 20


logging.getLogger("filelock").setLevel(logging.WARNING)
