"""Tests of probabilities in searches: in the index, in the command and in the pipeline."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

from test_index import CAPTIONS, NUM_IMAGES, archive, checkpoint, index, loaded  # noqa: E402, F401
from test_search import run  # noqa: E402, F401

from ieft.search.queries import Query  # noqa: E402

SCALE, OFFSET = 0.7, -0.2


@pytest.fixture
def calibrated(index, loaded, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loaded[0].config, "calibration_scale", SCALE)
    monkeypatch.setattr(loaded[0].config, "calibration_offset", OFFSET)
    return index


def probabilities(hits):
    return [hit["probability"] for hit in hits]


def test_re_ranked_hits_have_the_probability_of_their_score(calibrated):
    assert calibrated.has_probability
    hits = calibrated.search(CAPTIONS[0], top_k=10, rerank_top_k=6)
    expected = [1 / (1 + np.exp(-(SCALE * hit["score"] + OFFSET))) for hit in hits[:6]]
    assert probabilities(hits[:6]) == pytest.approx(expected, abs=1e-6) and probabilities(hits[6:]) == [None] * 4
    assert hits.best_probability == hits[0]["probability"] == max(probabilities(hits[:6]))
    assert probabilities(calibrated.search(CAPTIONS[0], similarity_weight=0.5)) == [None] * 10  # of no fitted score
    assert probabilities(calibrated.search(CAPTIONS[0], rerank_top_k=0)) == [None] * 10
    image = Image.new("RGB", (40, 40), "green")
    assert probabilities(calibrated.search_image(image, top_k=2)) == [None] * 2
    assert probabilities(calibrated.search(Query([CAPTIONS[0], image]), top_k=2)) == [None] * 2
    calibrated.add_captions(CAPTIONS)
    for hit in calibrated.search_captions(image):
        assert hit["probability"] == pytest.approx(1 / (1 + np.exp(-(SCALE * hit["score"] + OFFSET))), abs=1e-6)


def test_hits_below_the_least_probability_are_left_out(calibrated):
    every = calibrated.search(CAPTIONS[0], top_k=NUM_IMAGES, rerank_top_k=12)
    least = every[4]["probability"]
    likely = calibrated.search(CAPTIONS[0], top_k=NUM_IMAGES, rerank_top_k=12, min_probability=least)
    assert likely == every[: len(likely)] and 5 <= len(likely) < 12
    assert probabilities(likely)[-1] == least
    assert len(calibrated.search(CAPTIONS[0], top_k=NUM_IMAGES, rerank_top_k=12, min_probability=0)) == 12
    nothing = calibrated.search(CAPTIONS[0], rerank_top_k=12, min_probability=1)
    assert nothing == [] and nothing.best_probability == every.best_probability
    none_there = calibrated.search(CAPTIONS[0], where="width > 5000", min_probability=0.5)
    assert none_there == [] and none_there.best_probability is None


@pytest.mark.parametrize(
    "options, message",
    [({"min_probability": 1.2}, "from 0 to 1"), ({"min_probability": "0.5"}, "from 0 to 1"),
     ({"min_probability": float("nan")}, "from 0 to 1"),
     ({"min_probability": 0.5, "rerank_top_k": 0}, "leave out rerank_top_k=0"),
     ({"min_probability": 0.5, "similarity_weight": 0.5}, "leave out similarity_weight=0.5")],
)  # fmt: skip
def test_a_least_probability_that_means_nothing_is_refused(calibrated, options, message):
    with pytest.raises(ValueError, match=message):
        calibrated.search(CAPTIONS[0], **options)


def test_a_combination_has_no_least_probability(calibrated):
    with pytest.raises(ValueError, match="one sentence alone"):
        calibrated.search(Query([CAPTIONS[0]], unwanted=[CAPTIONS[1]]), min_probability=0.5)


def test_each_of_many_queries_keeps_its_own_likely_hits(calibrated):
    least = calibrated.search(CAPTIONS[0])[3]["probability"]
    together = list(calibrated.search_many(CAPTIONS, min_probability=least))
    alone = [calibrated.search(caption, min_probability=least) for caption in CAPTIONS]
    assert [[hit["file"] for hit in hits] for hits in together] == [[hit["file"] for hit in hits] for hits in alone]
    assert [hits.best_probability for hits in together] == pytest.approx([hits.best_probability for hits in alone])
    pages = [calibrated.search(CAPTIONS[0], top_k=2, offset=start, min_probability=least) for start in (0, 2, 4)]
    assert [hit["file"] for page in pages for hit in page] == [hit["file"] for hit in alone[0][:6]]


def test_without_calibration_no_probability_is_shown(index):  # noqa: F811
    assert not index.has_probability
    hits = index.search(CAPTIONS[0], top_k=3)
    assert probabilities(hits) == [None] * 3 and hits.best_probability is None
    with pytest.raises(ValueError, match="--do_calibrate"):
        index.search(CAPTIONS[0], min_probability=0.5)


@pytest.fixture
def calibrated_checkpoint(checkpoint):  # noqa: F811
    path = checkpoint / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"calibration_scale": SCALE, "calibration_offset": OFFSET}))
    yield
    path.write_text(before)


def test_the_command_refuses_a_least_probability_without_calibration(run, archive):  # noqa: F811
    run("index", archive)
    assert "prob." not in run("query", CAPTIONS[0])[1].out
    with pytest.raises(SystemExit, match="--do_calibrate"):
        run("query", CAPTIONS[0], "--min_probability", 0.5)


def test_the_command_shows_probabilities_and_says_that_nothing_fits(run, archive, calibrated_checkpoint):  # noqa: F811
    run("index", archive)
    hits = json.loads(run("query", CAPTIONS[0], "--top_k", 4, "--rerank_top_k", 3, "--json")[1].out)
    head, *lines = run("query", CAPTIONS[0], "--top_k", 4, "--rerank_top_k", 3)[1].out.splitlines()
    assert head.split() == ["rank", "score", "prob.", "stage", "file"]
    assert [line.split()[2] for line in lines] == [f"{hit['probability']:.2f}" for hit in hits[:3]] + ["shortlist"]
    assert {line.index(str(archive)) for line in lines} == {head.index("file")}
    printed = run("query", CAPTIONS[0], "--min_probability", 1)[1].out
    best = json.loads(run("query", CAPTIONS[0], "--json")[1].out)[0]["probability"]
    assert printed == f"Nothing in this archive fits: the best image has a probability of {best:.2f}.\n"
    assert json.loads(run("query", CAPTIONS[0], "--min_probability", 1, "--json")[1].out) == []
    for more in ((), ("--min_probability", 0)):  # what is behind the last page fits no less
        assert run("query", CAPTIONS[0], "--offset", 1000, *more)[1].out == "No further image matches.\n"
    with pytest.raises(SystemExit, match="--min_probability needs a sentence"):
        run("query", "--image", archive / "it's 04.png", "--min_probability", 0.5)


def test_ranked_captions_have_probabilities(loaded, monkeypatch):  # noqa: F811
    model, processor = loaded
    image = np.zeros((40, 40, 3), np.uint8)
    assert set(model.rank(image, CAPTIONS, processor=processor)[0]) == {"caption", "score", "rank"}
    monkeypatch.setattr(model.config, "calibration_scale", SCALE)
    monkeypatch.setattr(model.config, "calibration_offset", OFFSET)
    for each in model.rank(image, CAPTIONS, processor=processor):
        assert each["probability"] == pytest.approx(1 / (1 + np.exp(-(SCALE * each["score"] + OFFSET))), abs=1e-9)
