"""Tests of recalls: worked examples, a slow reference implementation that sorts, and the treatment of ties."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ieft.evaluation.metrics import expected_hits, keep_unique_captions, retrieval_recalls

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden_metrics.json").read_text())


def slow_recalls(scores, caption_image, caption_text_id):
    """Strict and duplicate-aware recalls in percent, by a full sort for every query and every order of its ties."""
    num_images, num_captions = scores.shape
    texts = [{caption_text_id[c] for c in range(num_captions) if caption_image[c] == i} for i in range(num_images)]
    rights = {
        "": [[caption_image[c] == i for c in range(num_captions)] for i in range(num_images)],
        "dedup_": [[caption_text_id[c] in texts[i] for c in range(num_captions)] for i in range(num_images)],
    }
    recalls = {}
    for prefix, right in rights.items():
        right = np.array(right)
        six = {}
        for name, way_scores, way_right in (("ir", scores.T, right.T), ("tr", scores, right)):
            for k in (1, 5, 10):
                hits = [slow_hit(s, r, k) for s, r in zip(way_scores, way_right, strict=True) if r.any()]
                six[f"{name}_r{k}"] = 100 * np.mean(hits)
        recalls |= {prefix + key: value for key, value in (six | {"mean_recall": np.mean(list(six.values()))}).items()}
    return recalls


def slow_hit(scores, right, k):
    """Among all orders of the items that agree with the scores, the share with a relevant item in the first k."""
    levels = [np.flatnonzero(scores == level) for level in sorted(set(scores.tolist()), reverse=True)]
    before = 0
    for level in levels:
        if right[level].any():
            orders = list(itertools.permutations(right[level]))
            return np.mean([any(order[: max(0, k - before)]) for order in orders])
        before += len(level)
    raise AssertionError("a query without a right item")


@st.composite
def small_cases(draw):
    num_images = draw(st.integers(1, 5))
    num_captions = draw(st.integers(1, 6))
    levels = draw(st.integers(1, 5))  # few levels: many ties
    numbers = st.integers(0, levels - 1)
    scores = draw(st.lists(numbers, min_size=num_images * num_captions, max_size=num_images * num_captions))
    owners = draw(st.lists(st.integers(0, num_images - 1), min_size=num_captions, max_size=num_captions))
    texts = draw(st.lists(st.integers(0, 3), min_size=num_captions, max_size=num_captions))
    return np.array(scores, dtype=float).reshape(num_images, num_captions), np.array(owners), np.array(texts)


@settings(max_examples=200, deadline=None)
@given(small_cases())
def test_equals_a_full_sort_over_every_order_of_the_ties(case):
    assert retrieval_recalls(*case) == pytest.approx(slow_recalls(*case))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 3))
def test_without_ties_equals_a_plain_sort(seed, num_images, captions_each):
    generator = np.random.default_rng(seed)
    owners = np.repeat(np.arange(num_images), captions_each)
    scores = generator.permutation(num_images * len(owners)).reshape(num_images, -1).astype(np.float32)
    recalls = retrieval_recalls(scores, owners)
    order = np.argsort(-scores, axis=1)
    for k in (1, 5, 10):
        found = [(owners[order[image, :k]] == image).any() for image in range(num_images)]
        assert recalls[f"tr_r{k}"] == pytest.approx(100 * np.mean(found))
        ranks = [(scores[:, caption] > scores[owners[caption], caption]).sum() for caption in range(len(owners))]
        assert recalls[f"ir_r{k}"] == pytest.approx(100 * np.mean(np.array(ranks) < k))


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_worked_cases(case):
    recalls = retrieval_recalls(np.array(case["scores"]), case["caption_image"], case["caption_text_id"])
    for prefix, version in (("", "original"), ("dedup_", "improved")):
        for name, fraction in case["expected"][version].items():
            assert recalls[prefix + name] == pytest.approx(100 * fraction), prefix + name


@pytest.mark.parametrize("num_images, captions_each", [(1, 1), (3, 2), (12, 5), (40, 1)])
def test_constant_scores_give_chance(num_images, captions_each):
    owners = np.repeat(np.arange(num_images), captions_each)
    num_captions = len(owners)
    recalls = retrieval_recalls(np.full((num_images, num_captions), 0.3), owners)
    for k in (1, 5, 10):
        assert recalls[f"ir_r{k}"] == pytest.approx(100 * min(1, k / num_images))
        miss = np.prod([max(0, num_captions - captions_each - j) / max(1, num_captions - j) for j in range(k)])
        assert recalls[f"tr_r{k}"] == pytest.approx(100 * (1 - miss))


@settings(max_examples=30, deadline=None)
@given(small_cases(), st.integers(0, 1000))
def test_neither_order_nor_scale_changes_anything(case, seed):
    scores, owners, texts = case
    generator = np.random.default_rng(seed)
    captions, images = generator.permutation(len(owners)), generator.permutation(len(scores))
    moved = scores[images][:, captions]
    new_row = np.argsort(images)
    expected = retrieval_recalls(scores, owners, texts)
    assert retrieval_recalls(moved, new_row[owners[captions]], texts[captions] * 7 + 3) == pytest.approx(expected)
    assert retrieval_recalls(np.exp(scores) * 3, owners, texts) == pytest.approx(expected)


def test_a_repeated_sentence_is_right_for_each_image_that_carries_it():
    scores = np.array([[0.1, 0.9], [0.2, 0.8]])  # both images prefer the sentence written for image 1
    strict = retrieval_recalls(scores, [0, 1])
    assert strict["tr_r1"] == strict["dedup_tr_r1"] == 50
    assert retrieval_recalls(scores, [0, 1], [4, 4])["dedup_tr_r1"] == 100


def test_images_without_captions_are_candidates_but_no_queries():
    recalls = retrieval_recalls(np.array([[0.0], [1.0]]), [0])
    assert recalls["tr_r1"] == 100 and recalls["ir_r1"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((2, 3)), [0, 1]), r"scores \(2, 3\), caption_image \(2,\)"),
        ((np.zeros((2, 2)), [0, 2]), "rows of the 2 images; got 0 to 2"),
        ((np.zeros((2, 2)), [0, 1], [1]), r"caption_text_id \(1,\)"),
        ((np.full((2, 2), np.nan), [0, 1]), "4 of 4 are NaN"),
        ((np.zeros((2, 0)), []), "At least one caption"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recalls(*arguments)


def test_ties_below_or_beyond_the_best_right_item_do_not_matter():
    scores = np.array([[5.0, 4.0, 4.0, 1.0, 1.0]])
    right = np.array([[False, True, False, True, False]])
    assert expected_hits(scores, right)[:, 0].tolist() == [0.0, 1.0, 1.0]


def test_unique_captions():
    captions, caption_image, text_ids = keep_unique_captions([["a b .", " a b .", "c ."], [], ["c .", "d ."]])
    assert captions == ["a b .", "c .", "c .", "d ."]
    assert caption_image.tolist() == [0, 0, 2, 2]
    assert text_ids.tolist() == [0, 1, 1, 2]


def test_a_string_in_place_of_a_list_is_not_taken_letter_by_letter():
    with pytest.raises(ValueError, match="image 1 has a string: 'a river .'"):
        keep_unique_captions([["a field ."], "a river ."])
