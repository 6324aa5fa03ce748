"""Tests of probabilities: the fit against another optimiser, the error against a loop, the pairs against one query at
a time, and the numbers in a checkpoint."""

import json

import numpy as np
import pytest
import torch
from test_modeling import tiny_config
from test_two_stage import evaluation_set, model, slow_scores  # noqa: F401

from configuration_ieft import IeftConfig
from ieft.evaluation import calibration
from ieft.evaluation.calibration import (
    ShownPairs,
    expected_calibration_error,
    fit_probability,
    judge_probability,
    logistic,
    reliability_bins,
    shown_pairs,
)
from ieft.evaluation.ranking import fingerprint
from modeling_ieft import IeftForImageTextRetrieval

NOISE = np.random.default_rng(0)


def draw(count, scale, offset, middle=0.0, spread=1.0):
    scores = NOISE.normal(middle, spread, count)
    return scores, NOISE.random(count) < logistic(scale * scores + offset)


def slow_fit(scores, belongs):
    """Platt's targets and their likelihood, by the optimiser of torch."""
    right, wrong = belongs.sum(), (~belongs).sum()
    targets = torch.from_numpy(np.where(belongs, (right + 1) / (right + 2), 1 / (wrong + 2)))
    values = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([values], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = values[0] * torch.from_numpy(scores) + values[1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return values.tolist()


@pytest.mark.parametrize(
    "scale, offset, middle, spread", [(1.0, -2.0, 0.0, 1.0), (0.4, -3.0, 2.0, 4.0), (3, 1, -1, 0.3)]
)
def test_the_fit_is_the_most_likely_one(scale, offset, middle, spread):
    scores, belongs = draw(4000, scale, offset, middle, spread)
    fitted = fit_probability(scores, belongs)
    np.testing.assert_allclose(fitted, slow_fit(scores, belongs), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fitted, (scale, offset), atol=0.35)


def test_scores_far_from_zero_and_separable_ones_are_fitted_too():
    scores, belongs = draw(2000, 2.0, -1.0)
    scale, offset = fit_probability(1e6 + 1000 * scores, belongs)
    assert (scale * 1000, offset + scale * 1e6) == pytest.approx(fit_probability(scores, belongs), rel=1e-4)
    separate = np.array([-1.0, -2.0, 3.0, 4.0])
    scale, offset = fit_probability(separate, separate > 0)
    assert 0 < scale < 10 and logistic(scale * 3 + offset) > 0.5 > logistic(scale * -1 + offset)


def test_scores_that_tell_nothing_have_no_probability():
    scores, belongs = draw(2000, 1.0, 0.0)
    assert fit_probability(-scores, belongs) is None
    assert fit_probability(scores, belongs | True) is None and fit_probability(scores, belongs & False) is None
    assert fit_probability(np.ones(4), np.array([True, False, True, False])) is None
    assert fit_probability(np.empty(0), np.empty(0, bool)) is None


def slow_error(probability, belongs):
    error = 0.0
    for step in range(15):
        low, high = step / 15, (step + 1) / 15
        some = [row for row, each in enumerate(probability) if low <= each < high or (step == 14 and each == 1)]
        if some:
            distance = abs(np.mean([probability[row] for row in some]) - np.mean([belongs[row] for row in some]))
            error += len(some) / len(probability) * distance
    return error


def test_the_error_is_that_of_a_loop_over_bins():
    probability = np.append(NOISE.random(500) ** 2, [0.0, 1.0, 1 / 3])
    belongs = NOISE.random(503) < 0.4
    bins = reliability_bins(probability, belongs)
    assert expected_calibration_error(bins) == pytest.approx(slow_error(probability, belongs), abs=1e-12)
    assert sum(each["pairs"] for each in bins) == 503
    assert expected_calibration_error(reliability_bins([1.0, 0.0], [True, False])) == 0
    assert expected_calibration_error(reliability_bins([0.0, 1.0], [True, False])) == 1


def test_a_fit_on_one_half_is_true_on_the_other():
    scores, belongs = draw(8000, 0.8, -2.0, 1.0, 2.0)
    fitted = fit_probability(scores[:4000], belongs[:4000])
    judged = judge_probability(ShownPairs(scores[4000:].reshape(-1, 10), belongs[4000:].reshape(-1, 10)), *fitted)
    assert judged["ece"] < 0.03 and (judged["sentences"], judged["pairs"]) == (400, 4000)
    assert judged["brier"] < judged["brier_of_share"] and judged["share"] == belongs[4000:].mean()
    worse = judge_probability(ShownPairs(scores.reshape(-1, 10), belongs.reshape(-1, 10)), fitted[0], fitted[1] + 2)
    assert worse["ece"] > 0.1


def test_the_pairs_are_what_a_search_for_each_sentence_shows(model, evaluation_set, monkeypatch):  # noqa: F811
    monkeypatch.setattr(calibration, "CANDIDATES", 5)
    monkeypatch.setattr(calibration, "SHOWN", 3)
    similarity, scores = slow_scores(model, evaluation_set)
    asked = [column for column in range(20) if column != 15]  # 15 is the sentence of 2 again
    pairs = shown_pairs(model, evaluation_set, progress=False)
    assert pairs.scores.shape == pairs.belongs.shape == (19, 3)
    for row, column in enumerate(asked):
        nearest = sorted(range(12), key=lambda image: -similarity[image, column])[:5]
        best = sorted(nearest, key=lambda image: -scores[image, column])[:3]
        np.testing.assert_allclose(pairs.scores[row], scores[best, column], rtol=1e-4, atol=1e-4)
        owners = evaluation_set.caption_image[evaluation_set.caption_text_id == column]
        assert pairs.belongs[row].tolist() == [image in owners for image in best]
    few = shown_pairs(model, evaluation_set, progress=False, most_sentences=4, seed=1)
    assert few.scores.shape == (4, 3) and all(
        any(np.allclose(each, one) for one in pairs.scores) for each in few.scores
    )


@pytest.mark.parametrize("pair", [(1.0, None), (None, 0.0), (0.0, 1.0), (-1.0, 1.0), (float("nan"), 0.0), (1.0, "2")])
def test_a_calibration_that_cannot_be_is_refused(pair):
    with pytest.raises(ValueError, match="calibration_"):
        tiny_config(calibration_scale=pair[0], calibration_offset=pair[1])


def test_a_checkpoint_keeps_its_calibration_unless_its_scores_become_others(tmp_path):
    model = IeftForImageTextRetrieval(tiny_config())  # noqa: F811
    before = fingerprint(model, []).hexdigest()
    assert model.probability(torch.zeros(2)) is None
    model.config.calibration_scale, model.config.calibration_offset = 0.5, -1.0
    assert fingerprint(model, []).hexdigest() == before  # scores that were kept stay valid
    assert model.probability(torch.tensor([[2.0, 4.0]])).tolist() == [[0.5, pytest.approx(1 / (1 + np.exp(-1)))]]
    model.save_pretrained(tmp_path)
    loaded = IeftForImageTextRetrieval.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (loaded.config.calibration_scale, loaded.config.calibration_offset) == (0.5, -1.0)
    other = IeftForImageTextRetrieval.from_pretrained(tmp_path, first_joint_layer=1)
    assert other.config.first_joint_layer == 1 and other.probability(torch.zeros(1)) is None
    same = IeftConfig.from_pretrained(
        tmp_path, first_joint_layer=model.config.first_joint_layer, output_attentions=True
    )
    assert same.calibration_scale == 0.5
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("calibration_scale", "calibration_offset"):
        del written[name]  # as an earlier version wrote it
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert IeftConfig.from_pretrained(tmp_path).calibration_scale is None
