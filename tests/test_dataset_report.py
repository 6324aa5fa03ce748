"""Tests of the report on a collection: recall ceilings against actual ranking, duplicates against known ones."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ieft.data.report import ALIKE_BITS, hash_image, look_at, measure_collection, recall_ceiling, write_report
from ieft.evaluation.metrics import keep_unique_captions, retrieval_recalls
from prepare_datasets import main


def best_scores(captions_per_image):
    """The best possible ranking: every sentence ranks the images that carry it first, in one order."""
    captions, caption_image, text_id = keep_unique_captions(captions_per_image)
    scores = np.zeros((len(captions_per_image), len(captions)))
    for row, image in enumerate(caption_image):
        scores[image, text_id == text_id[row]] = 1 + image  # distinct: no two are equal
    return scores, caption_image, text_id


@pytest.mark.parametrize("seed", range(5))
def test_the_ceiling_is_what_the_best_ranking_reaches(seed):
    generator = np.random.default_rng(seed)
    captions = [[f"sentence {number}" for number in generator.integers(0, 12 * (seed + 1), 5)] for _ in range(40)]
    recalls = retrieval_recalls(*best_scores(captions))
    ceiling = recall_ceiling([set(each) for each in captions])
    assert [ceiling[k] for k in (1, 5, 10)] == pytest.approx([recalls[f"ir_r{k}"] for k in (1, 5, 10)])
    assert ceiling[1] < 100 and recalls["dedup_ir_r1"] == 100


def test_ceilings_by_hand():
    assert recall_ceiling([["a"], ["a"], ["b"], ["c"]]) == {1: 75, 5: 100, 10: 100}
    assert recall_ceiling([["a", "a", "a"], ["a"], ["b"]])[1] == 80
    assert recall_ceiling([["a"]] * 10) == {1: 10, 5: 50, 10: 100}
    assert recall_ceiling([[], []]) == {1: 0, 5: 0, 10: 0}


def photograph(seed):
    """An image with coarse and fine structure, like a photograph."""
    generator = np.random.default_rng(seed)
    picture = sum(np.asarray(Image.fromarray(generator.random((side, side)).astype(np.float32)).resize((128, 128)))
                  for side in (4, 8, 16, 32))  # fmt: skip
    return Image.fromarray((picture * 60).astype(np.uint8)).convert("RGB")


def test_hashes_know_an_image_saved_again_and_no_other(tmp_path):
    hashes = [hash_image(photograph(seed)) for seed in range(30)]
    for seed in range(30):
        photograph(seed).save(tmp_path / "a.jpg", quality=60)
        photograph(seed).resize((90, 90)).save(tmp_path / "b.png")
        for path, at_most in ((tmp_path / "a.jpg", ALIKE_BITS), (tmp_path / "b.png", 2 * ALIKE_BITS)):
            bits = [int(np.bitwise_count(each ^ look_at(path)[3]).sum()) for each in hashes]
            assert bits[seed] <= at_most and min(bits[:seed] + bits[seed + 1 :]) > 3 * ALIKE_BITS


def collection(folder):
    """Three training and two test images, one of which is a training image saved again; and a missing one."""
    rows = []
    for number, split in enumerate(["train", "train", "train", "test", "test"]):
        path = folder / f"{number}.png"
        photograph(number).save(path)
        rows.append(
            {"filename": path.name, "split": split, "captions": [f"a field {number} .", "a river ."], "image": path}
        )
    photograph(1).save(folder / "again.jpg", quality=70)
    rows[3] |= {"filename": "again.jpg", "image": folder / "again.jpg"}
    return [*rows, {"filename": "gone.png", "split": "test", "captions": ["a field 0 .", " "], "image": None}]


def test_the_facts_of_a_small_collection(tmp_path):
    facts = measure_collection(collection(tmp_path), [])
    test = facts["splits"]["test"]
    assert (test["images"], test["readable_images"], test["captions"], test["distinct_sentences"]) == (3, 2, 5, 4)
    assert test["on_several_images"] == 2 and test["ceiling"][1] == 80 and sorted(test["words"]) == [3, 3, 4, 4, 4]
    shared = facts["shared_sentences"][0]
    assert (shared["sentences"], shared["captions"], shared["all"]) == (2, 3, ["a field 0 .", "a river ."])
    assert [(pair["splits"], pair["images"]) for pair in facts["near_duplicates"]] == [
        (["train", "test"], ["1.png", "again.jpg"])
    ]
    assert facts["sizes"] == {"128 x 128": 5} and facts["modes"] == {"RGB": 5}
    files = write_report("fields", collection(tmp_path), facts)
    text = files["report.txt"].decode()
    assert "again.jpg like 1.png" in text and "3 captions of test (60.0%)" in text
    assert json.loads(files["report.json"])["sizes"] == {"128 x 128": 5}
    with Image.open(io.BytesIO(files["report.png"])) as page:
        assert page.width > 1000 and len(page.convert("L").getcolors(256)) > 100  # it shows the pair of photographs


def test_annotations_without_any_image_are_reported_before_the_run_stops(tmp_path, capsys):
    entries = [{"filename": f"{number}.tif", "split": split, "sentences": [{"raw": "a field ."}, {"raw": " "}]}
               for number, split in enumerate(["train", "val", "test", "test"])]  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"images": entries}))
    command = [str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--report", "--on_bad_rows", "skip"]
    assert main([*command, "--cache_dir", str(tmp_path / "cache")]) == 1
    printed = capsys.readouterr().out
    assert (
        "Invalid examples: 4 x a blank caption, 4 x no such image file" in printed and "Image sizes: none" in printed
    )
    lines = {line[:42].strip(): line[42:].split() for line in printed.splitlines()}
    assert lines["text-to-image R@1 cannot exceed (strict)"] == ["100.0", "100.0", "50.0"]
    assert lines["images that can be read"] == ["0", "0", "0"]
    names = ["report.txt", "report.png", "report.json", ".sources", "bad_rows.json"]
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == sorted(names)
