"""Tests of the sampler that orders captions by lexical similarity."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from ieft.data.hard_scenes import draw_twin
from ieft.training.hard_negatives import HardNegativeSampler


class Items(SimpleNamespace):
    def __len__(self):
        return len(self.caption_tokens)


@pytest.fixture(scope="module")
def items():
    """Forty hard scenes like `TrainingItems`, with words as tokens."""
    captions = [caption for index in range(40) for caption in draw_twin(0, index).captions]
    text_id = np.unique(captions, return_inverse=True)[1]
    return Items(
        caption_tokens=[caption.split() for caption in captions],
        caption_image=np.arange(len(captions)) // 5,
        caption_text_id=text_id,
        image_text_ids=np.split(text_id, 40),
        seed=0,
        epoch=0,
    )


@pytest.fixture
def sampler(items):
    return HardNegativeSampler(items)


def slow_similarity(captions, one, other):
    """Cosine similarity of two bags of words with IDF weights."""
    weights = {
        word: math.log(len(captions) / sum(word in caption for caption in captions))
        for word in {word for caption in captions for word in caption}
    }
    bags = [set(captions[one]), set(captions[other])]
    norms = [math.sqrt(sum(weights[word] ** 2 for word in bag)) for bag in bags]
    return sum(weights[word] ** 2 for word in bags[0] & bags[1]) / (norms[0] * norms[1])


@pytest.mark.parametrize("anchor", [0, 77, 199])
def test_neighbours_are_the_nearest_by_a_plain_comparison(sampler, anchor):
    items = sampler.items
    free = np.ones(len(items), dtype=bool)
    free[[anchor, 3, 120]] = False
    found = sampler.find_neighbours(anchor, free).tolist()
    allowed = [
        row for row in range(len(items))
        if free[row] and items.caption_text_id[row] not in items.image_text_ids[items.caption_image[anchor]]
    ]  # fmt: skip
    similarity = {row: slow_similarity(items.caption_tokens, anchor, row) for row in allowed}
    expected = sorted(similarity.values(), reverse=True)[: sampler.group - 1]
    np.testing.assert_allclose([similarity[row] for row in found], expected, rtol=1e-5)


def test_an_epoch_has_every_caption_once_and_hangs_on_seed_and_epoch(sampler):
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        sampler.items.seed, sampler.items.epoch = seed, epoch
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(len(sampler))) for order in orders)
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]


def test_twins_come_together(sampler):
    order = np.array(list(sampler))
    family = sampler.items.caption_image[order] // 4
    together = (family[:-1] == family[1:]).mean()
    shuffled = np.random.default_rng(0).permutation(family)
    assert together > 0.25 > 2 * (shuffled[:-1] == shuffled[1:]).mean()


def test_few_captions_are_no_trouble():
    items = Items(
        caption_tokens=[["a"], ["a", "b"]], caption_image=np.array([0, 1]), caption_text_id=np.array([0, 1]),
        image_text_ids=[np.array([0]), np.array([1])], seed=0, epoch=0,
    )  # fmt: skip
    assert sorted(HardNegativeSampler(items)) == [0, 1]
