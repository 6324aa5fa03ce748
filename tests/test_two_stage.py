"""Tests of the evaluation of two-stage retrieval against one query at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_modeling import tiny_config

from ieft.evaluation.metrics import retrieval_recalls
from ieft.evaluation.report import two_stage_table
from ieft.evaluation.two_stage import (
    SIMILARITY_WEIGHTS,
    Shortlists,
    choose_similarity_weight,
    compare_stages,
    make_shortlists,
    nearest,
    shortlist_ceiling,
    two_stage_recalls,
)
from modeling_ieft import IeftForImageTextRetrieval

TOP_K = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return IeftForImageTextRetrieval(tiny_config(hidden_dropout_prob=0.0)).eval()


@pytest.fixture(scope="module")
def evaluation_set():
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(12, 3, 32, 32, generator=generator) * 2 - 1
    lengths = torch.randint(2, 8, (20,), generator=generator).tolist()
    tokens = [torch.randint(1, 50, (length,), generator=generator).tolist() for length in lengths]
    owners = np.r_[np.arange(11), np.arange(9)]  # the last image has no caption
    text_id = np.arange(20)
    text_id[15] = 2
    tokens[15] = tokens[2]
    return SimpleNamespace(images=images, caption_tokens=tokens, caption_image=owners, caption_text_id=text_id)


@pytest.fixture(scope="module")
def shortlists(model, evaluation_set):
    return make_shortlists(model, evaluation_set, TOP_K, progress=False)


@torch.no_grad()
def slow_scores(model, evaluation_set):
    """Similarity and matching score of every pair, computed one at a time: two (I, C)."""
    similarity, scores = np.empty((2, 12, 20), dtype=np.float32)
    for column, tokens in enumerate(evaluation_set.caption_tokens):
        ids = torch.tensor([tokens])
        text = model.get_text_features(ids)[0]
        for row, image in enumerate(evaluation_set.images):
            similarity[row, column] = model.similarity_scale() * (model.get_image_features(image[None])[0] @ text)
            scores[row, column] = model(ids, pixel_values=image[None]).logits.item()
    return similarity, scores


def slow_recalls(similarity, scores, owners, weight):
    """Strict recalls from each query's list, its shortlist sorted first: text to image, then image to text."""
    fused = scores + weight * similarity

    def list_of(similar, final):
        first = sorted(range(len(similar)), key=lambda item: -similar[item])
        return sorted(first[:TOP_K], key=lambda item: -final[item]) + first[TOP_K:]

    by_captions = [list_of(similarity[:, c], fused[:, c]).index(owners[c]) for c in range(len(owners))]
    by_images = [
        min(list_of(similarity[i], fused[i]).index(c) for c in np.flatnonzero(owners == i)) for i in np.unique(owners)
    ]
    return [100 * np.mean(np.array(ranks) < k) for ranks in (by_captions, by_images) for k in (1, 5, 10)]


def test_every_query_ranks_its_shortlist_first(model, evaluation_set, shortlists):
    similarity, scores = slow_scores(model, evaluation_set)
    np.testing.assert_allclose(shortlists.similarity, similarity, atol=1e-4)
    for weight in (0.0, 0.5, 3.0):
        recalls = two_stage_recalls(shortlists, evaluation_set, similarity_weight=weight)
        expected = slow_recalls(similarity, scores, evaluation_set.caption_image, weight)
        names = [f"{way}_r{k}" for way in ("ir", "tr") for k in (1, 5, 10)]
        assert [recalls[name] for name in names] == pytest.approx(expected)
        assert recalls["mean_recall"] == pytest.approx(np.mean(expected))


def test_only_shortlisted_pairs_are_scored_and_each_once(model, evaluation_set, shortlists):
    _, scores = slow_scores(model, evaluation_set)
    asked = shortlists.of_captions | shortlists.of_images
    assert shortlists.pairs == asked.sum() < scores.size
    assert (shortlists.of_captions.sum(axis=0) == TOP_K).all() and (shortlists.of_images.sum(axis=1) == TOP_K).all()
    np.testing.assert_allclose(shortlists.scores[asked], scores[asked], atol=1e-5)
    assert not shortlists.scores[~asked].any()


def test_a_shortlist_of_all_is_the_exhaustive_matrix(model, evaluation_set):
    everything = make_shortlists(model, evaluation_set, 100, progress=False)
    _, scores = slow_scores(model, evaluation_set)
    owners = (evaluation_set.caption_image, evaluation_set.caption_text_id)
    assert two_stage_recalls(everything, evaluation_set) == pytest.approx(retrieval_recalls(scores, *owners))
    assert shortlist_ceiling(everything, evaluation_set) == {"ceiling_ir": 100, "ceiling_tr": 100}


def test_no_re_ranking_beats_the_ceiling(evaluation_set, shortlists):
    right = np.zeros_like(shortlists.scores)
    right[evaluation_set.caption_image, np.arange(20)] = 1e6
    best = Shortlists(**(vars(shortlists) | {"scores": right}))
    recalls, ceiling = two_stage_recalls(best, evaluation_set), shortlist_ceiling(shortlists, evaluation_set)
    assert recalls["ir_r1"] == pytest.approx(ceiling["ceiling_ir"]) and ceiling["ceiling_ir"] < 100
    assert recalls["tr_r1"] == pytest.approx(ceiling["ceiling_tr"])


def test_the_weight_is_the_best_of_those_tried(evaluation_set, shortlists):
    own = np.zeros_like(shortlists.scores)
    own[evaluation_set.caption_image, np.arange(20)] = 1.0
    right_embedding = Shortlists(**(vars(shortlists) | {"similarity": own}))
    right_network = Shortlists(**(vars(shortlists) | {"scores": 100 * own}))
    recalls = {
        weight: two_stage_recalls(right_embedding, evaluation_set, similarity_weight=weight)["dedup_mean_recall"]
        for weight in SIMILARITY_WEIGHTS
    }
    chosen = choose_similarity_weight(right_embedding, evaluation_set)
    assert recalls[chosen] == max(recalls.values()) > recalls[0.0] and chosen == max(recalls, key=recalls.get)
    assert choose_similarity_weight(right_network, evaluation_set) == 0.0


def test_nearest_takes_the_first_of_equal_ones():
    chosen = nearest(np.array([[1.0, 2.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]]), 2)
    assert chosen.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_the_model_is_left_as_it_was(model, evaluation_set):
    model.train()
    make_shortlists(model, evaluation_set, 2, progress=False)
    assert model.training
    model.eval()


def test_the_table_says_all_of_it(evaluation_set, shortlists):
    judged = compare_stages(shortlists, evaluation_set, similarity_weight=0.5)
    table = two_stage_table(judged | {"rerank_top_k": TOP_K, "exhaustive": judged["shortlist"]})
    assert max(map(len, table.splitlines())) < 80
    for title in ("shortlist", "re-ranked", "fused, weight 0.5", "exhaustive", "shortlist ceiling"):
        assert any(line.startswith(title) for line in table.splitlines())
    for name in ("shortlist", "re_ranked", "fused"):
        assert f"{judged[name]['mean_recall']:.1f}" in table
        assert f"{judged[name]['dedup_mean_recall']:.1f}" in table
    assert f"{judged['pairs']:,} of 240 pairs scored" in table
