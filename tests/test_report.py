"""Tests of the contact sheet's pixels, the file of training curves and the text of the tables."""

import numpy as np
import pytest
from PIL import Image

from ieft.evaluation import report
from ieft.evaluation.metrics import retrieval_recalls
from ieft.evaluation.report import ranked_sheet, recall_table, training_curves

COLOURS = [(200, 40, 40), (40, 40, 200), (200, 200, 40), (120, 40, 160), (90, 90, 90), (230, 140, 20)]
PICTURES = [Image.new("RGB", (40, 40), colour) for colour in COLOURS]
TEXT_TOP = 66 + report.GAP  # of the first caption's thumbs, under the heading


def thumb_left(place, top_k=5):
    side = (report.WIDTH - report.MARGIN - report.RESULTS_LEFT - report.GAP * (top_k - 1)) // top_k
    return report.RESULTS_LEFT + place * (min(report.THUMB, side) + report.GAP)


def frame_and_middle(sheet, place, top=TEXT_TOP):
    left = thumb_left(place)
    return sheet.getpixel((left + 2, top + 80)), sheet.getpixel((left + 80, top + 80))


def results(**more):
    recalls = retrieval_recalls(np.eye(4) + 0.01 * np.arange(4), np.arange(4), [0, 1, 1, 2])
    return recalls | more


def test_best_images_stand_in_order_and_only_the_right_one_is_green():
    scores = np.array([[3.0], [5.0], [1.0], [4.0], [2.0], [0.0]])
    sheet = ranked_sheet(scores, PICTURES, ["a caption"], [3], num_queries=1)
    assert sheet.width == 1200 and sheet.mode == "RGB"
    for place, image in enumerate([1, 3, 0, 4, 2]):
        frame, middle = frame_and_middle(sheet, place)
        assert middle == COLOURS[image]
        assert frame == (report.GREEN if image == 3 else COLOURS[image])


def test_the_right_one_carries_a_check_mark():
    sheet = ranked_sheet(np.array([[1.0], [0.0]]), PICTURES[:2], ["a caption"], [0], num_queries=1)
    corner = np.asarray(sheet)[TEXT_TOP + 2 : TEXT_TOP + 32, thumb_left(1) - 46 : thumb_left(1) - 16]
    assert (corner > 200).all(axis=-1).sum() > 30  # the white stroke on its disc
    other = np.asarray(sheet)[TEXT_TOP + 2 : TEXT_TOP + 150, thumb_left(1) + 1 : thumb_left(1) + 158]
    assert (other == COLOURS[1]).all()


def test_an_image_with_the_same_sentence_is_right_too_if_text_ids_say_so():
    scores = np.array([[1.0, 1.0], [2.0, 2.0]])
    captions, owners = ["a pond .", "a pond ."], [0, 1]
    strict = ranked_sheet(scores, PICTURES[:2], captions, owners, num_queries=1)
    aware = ranked_sheet(scores, PICTURES[:2], captions, owners, caption_text_id=[7, 7], num_queries=1)
    greens = [[frame_and_middle(sheet, place)[0] == report.GREEN for place in (0, 1)] for sheet in (strict, aware)]
    assert greens == [[True, False], [True, True]]  # the caption in the middle is the second, written for image 1


def test_right_sentences_stand_on_green_wherever_they_rank():
    scores = np.array([[0.0, 3.0, 2.0, 1.0]])
    captions, both = ["d", "a", "b", "c"], np.vstack([scores, scores])
    one = ranked_sheet(scores, PICTURES[:1], captions, [0, 0, 0, 0], num_queries=2)
    two = ranked_sheet(both, PICTURES[:2], captions, [0, 0, 1, 1], num_queries=2)
    same = ranked_sheet(both, PICTURES[:2], captions, [0, 0, 1, 1], caption_text_id=[0, 5, 5, 1], num_queries=2)
    top = TEXT_TOP + report.THUMB + 52 + 66  # of the image query's lines
    step = (report.THUMB + 4) // 5
    right_edge = report.WIDTH - report.MARGIN - 3
    for picture, expected in ((one, [True] * 4), (two, [False, True, True, False]), (same, [True, True, True, False])):
        pale = [picture.getpixel((right_edge, top + place * step + 8)) == report.PALE_GREEN for place in range(4)]
        assert pale == expected


def test_the_note_tells_the_rank_of_the_best_right_result():
    assert report._found(np.array([4, 2, 0, 1, 3]), np.array([3, 0])) == "right one at rank 3"


def test_only_the_pictures_shown_are_opened():
    asked = []

    def picture(row):
        asked.append(row)
        return PICTURES[row % len(PICTURES)]

    scores = np.random.default_rng(0).normal(size=(500, 500))
    ranked_sheet(scores, picture, ["a caption"] * 500, np.arange(500), num_queries=4, top_k=3)
    assert len(asked) == 2 * 3 + 2 and all(type(row) is int for row in asked)


def test_queries_are_spread_and_do_not_hang_on_the_scores():
    asked = []
    for seed in (0, 1):
        rows = []
        scores = np.random.default_rng(seed).normal(size=(100, 100))
        ranked_sheet(scores, lambda row, rows=rows: rows.append(row) or PICTURES[0], ["x"] * 100, np.arange(100))
        asked.append(rows[-3:])  # the images that ask
    assert asked == [[25, 58, 91]] * 2


@pytest.mark.parametrize("top_k", [1, 5, 10])
@pytest.mark.parametrize(
    "caption",
    ["", "   ", "w" * 5000, "many planes " * 500, "самолёты у моря — naïve café 飞机 🛩", "two\nlines\tand a tab"],
)
def test_any_caption_and_a_single_image(caption, top_k):
    sheet = ranked_sheet(np.array([[0.5]]), PICTURES[:1], [caption], [0], top_k=top_k)
    pixels = np.asarray(sheet)
    assert (pixels[:, : report.MARGIN - 8] == 255).all()
    assert (pixels[:, report.WIDTH - report.MARGIN + 1 :] == 255).all()
    gutter = pixels[TEXT_TOP : TEXT_TOP + report.THUMB, report.RESULTS_LEFT - 10 : report.RESULTS_LEFT]
    assert (gutter == 255).all()  # a long caption does not run into the images
    words = pixels[TEXT_TOP : TEXT_TOP + report.THUMB, report.MARGIN : report.RESULTS_LEFT - 10]
    assert (words < 128).any()  # something is written, for an empty caption too


def test_pictures_of_other_modes_and_shapes():
    pictures = [Image.new("RGBA", (90, 30), (9, 9, 9, 255)), Image.new("L", (7, 70), 60), Image.new("P", (1, 1))]
    sheet = ranked_sheet(np.eye(3), pictures, ["a", "b", "c"], [0, 1, 2], num_queries=1)
    assert {frame_and_middle(sheet, place)[1] for place in range(3)} == {(9, 9, 9), (60, 60, 60), (0, 0, 0)}


def test_equal_scores_and_images_without_captions_can_be_drawn():
    sheet = ranked_sheet(np.zeros((3, 2)), PICTURES[:3], ["a", "b"], [2, 2], num_queries=6)
    assert sheet.height > 4 * report.THUMB


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((np.zeros((2, 3)), PICTURES[:2], ["a", "b"], [0, 1]), {}, r"expected \(2, 2\).*got \(2, 3\)"),
        ((np.zeros((2, 2)), PICTURES[:3], ["a", "b"], [0, 1]), {}, r"expected \(3, 2\)"),
        ((np.zeros((2, 2)), PICTURES[:2], ["a", "b"], [0]), {}, r"caption_image: .* 2 captions, got \(1,\)"),
        ((np.zeros((2, 2)), PICTURES[:2], ["a", "b"], [0, 2]), {}, "rows from 0 to 1; got 0 to 2"),
        ((np.zeros((1, 1)), PICTURES[:1], ["a"], [0]), {"caption_text_id": [1, 2]}, "caption_text_id"),
        ((np.zeros((1, 1)), PICTURES[:1], ["a"], [0]), {"top_k": 0}, "top_k from 1"),
        ((np.zeros((1, 1)), PICTURES[:1], ["a"], [0]), {"top_k": 11}, "top_k from 1 to 10"),
        ((np.zeros((1, 1)), PICTURES[:1], ["a"], [0]), {"num_queries": 0}, "num_queries from 1"),
        ((np.zeros((2, 0)), PICTURES[:2], [], []), {}, "at least one of each"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ranked_sheet(*arguments, **options)


def training_log(evaluated):
    log = [{"step": step, "loss": 3.0 / step} for step in range(10, 60, 10)]
    if evaluated:
        log += [{"step": 25, "eval_mean_recall": 40.0, "eval_dedup_mean_recall": 50.0, "eval_ir_r1": 9.0}]
    return log + [{"step": 50, "train_loss": 1.0, "train_runtime": 3.0}]


def ink(path, colour):
    """Columns of an image that contain a colour, as fractions of its width."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    columns = np.flatnonzero((abs(pixels - colour).max(axis=-1) < 30).any(axis=0))
    return columns / pixels.shape[1]


def test_curves_with_and_without_evaluations(tmp_path):
    blue, orange = (31, 119, 180), (255, 127, 14)
    training_curves(training_log(evaluated=True), tmp_path / "both.png")
    training_curves(training_log(evaluated=False), tmp_path / "loss.png")
    both, loss = Image.open(tmp_path / "both.png"), Image.open(tmp_path / "loss.png")
    assert both.format == "PNG" and both.width == 2 * loss.width
    assert ink(tmp_path / "both.png", blue).min() < 0.5 < ink(tmp_path / "both.png", blue).max()
    assert ink(tmp_path / "both.png", orange).min() > 0.5  # the second recall, in the right panel alone
    assert np.ptp(ink(tmp_path / "loss.png", blue)) > 0.6 and not len(ink(tmp_path / "loss.png", orange))


@pytest.mark.parametrize("log", [[], [{"step": 5, "train_loss": 1.0}], [{"step": 5, "eval_mean_recall": 3.0}]])
def test_curves_of_a_run_too_short_to_log(log, tmp_path):
    training_curves(log, str(tmp_path / "training.png"))
    assert Image.open(tmp_path / "training.png").height > 100


def test_table_shows_every_recall_in_its_place():
    numbers = {f"{prefix}{way}_r{k}": 0.0 for prefix in ("", "dedup_") for way in ("ir", "tr") for k in (1, 5, 10)}
    numbers = {name: 10.0 + place for place, name in enumerate(numbers)} | {
        "mean_recall": 1.25,
        "dedup_mean_recall": 99,
    }
    lines = recall_table(numbers).splitlines()
    assert lines[0].split() == ["strict", "duplicate-aware"]
    assert lines[1].split() == ["R@1", "R@5", "R@10"] * 2
    assert lines[2].split() == "text to image 10.0 11.0 12.0 16.0 17.0 18.0".split()
    assert lines[3].split() == "image to text 13.0 14.0 15.0 19.0 20.0 21.0".split()
    assert lines[4].split() == "mean recall 1.2 99.0".split()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1  # right edges in line


def test_table_says_what_was_measured_and_keeps_to_80_columns():
    table = recall_table(results(dataset="/a long path" * 20, num_images=4, num_captions=4, protocol="clean"))
    assert "4 images, 4 captions, clean protocol" in " ".join(table.split())
    assert max(map(len, table.splitlines())) < 80
    perfect = dict.fromkeys(results(), 100.0)
    assert max(map(len, recall_table(perfect).splitlines())) < 80


@pytest.mark.parametrize("num_images, captions_each", [(1, 1), (4, 1), (60, 5), (7, 3)])
def test_chance_is_the_recall_of_constant_scores(num_images, captions_each):
    num_captions = num_images * captions_each
    owners = np.repeat(np.arange(num_images), captions_each)
    expected = retrieval_recalls(np.zeros((num_images, num_captions)), owners)["mean_recall"]
    table = recall_table(results(num_images=num_images, num_captions=num_captions))
    assert table.splitlines()[-1].split() == ["chance,", "about", f"{expected:.1f}"]
