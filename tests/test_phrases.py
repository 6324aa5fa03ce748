"""Tests of phrases of captions, and of training items that some captions are replaced by."""

import numpy as np
import pytest
from test_batches import items_of, processor, split  # noqa: F401

from ieft.training.phrases import Phrases, find_phrases


@pytest.mark.parametrize(
    "caption, phrases",
    [
        ("There are many white storage tanks beside a river .",
         {"white storage tanks", "white storage", "storage tanks", "white", "storage", "tanks", "river"}),
        ("A parking lot, a church", {"parking lot", "parking", "lot", "church"}),
        ("It's on the Y-shaped pier", {"it's", "y-shaped pier", "y-shaped", "pier"}),
        ("it is on both of them .", set()), ("", set()),
        ("one two three four five", {"one two three four", "two three four five", "one two three", "two three four",
         "three four five", "one two", "two three", "three four", "four five", "one", "two", "three", "four", "five"}),
    ],
)  # fmt: skip
def test_phrases_stand_between_function_words_and_punctuation(caption, phrases):
    assert set(find_phrases(caption)) == phrases and len(find_phrases(caption)) == len(phrases)


def test_an_image_carries_the_phrases_of_all_of_its_captions():
    phrases = Phrases.from_captions(["red roofs .", "a big red house .", "roofs", "red roofs"], [0, 0, 1, 2], 3)
    of_image = [{phrases.texts[row] for row in rows} for rows in phrases.of_image]
    assert of_image == [{"red roofs", "red", "roofs", "big red house", "big red", "red house", "big", "house"},
                        {"roofs"}, {"red roofs", "red", "roofs"}]  # fmt: skip
    assert len(phrases.texts) == len(set(phrases.texts)) == 8


def test_an_own_caption_becomes_a_phrase_of_it_as_often_as_asked(split, processor):  # noqa: F811
    items = items_of(split, processor, num_negatives=0, phrase_probability=0.3)
    plain = items_of(split, processor, num_negatives=0)
    short = 0
    for epoch in range(200):
        items.set_epoch(epoch)
        for row in range(len(items)):
            (own,) = items[row]["captions"]
            assert own == row or items.texts[own] in find_phrases(items.captions[row])
            short += own != row
    assert 0.27 < short / (200 * len(items)) < 0.33
    assert [plain[row]["captions"].tolist() for row in range(len(plain))] == [[row] for row in range(len(plain))]


def test_an_image_whose_captions_hold_a_phrase_is_no_negative_for_it(split, processor):  # noqa: F811
    items = items_of(split, processor, num_negatives=0, phrase_probability=1.0)
    field, wide = 5, 7  # "a green field ." and "a wide green field near a road .", both of image 2
    road = next(epoch for epoch in range(100) if _own_text(items, wide, epoch) == "road")
    beside = items.captions.index("a big stadium beside a road .")
    batch = items.collate([items[wide], items[beside], items[0]])
    assert batch["is_match"][:, batch["candidates"][0, 0]].tolist() == [True, True, False]  # "road" of image 2
    assert batch["items"].tolist() == [wide, beside, 0]
    for row, carried in enumerate(batch["image_text_ids"]):  # what processes exchange says the same
        columns = np.isin(batch["text_ids"], carried)
        assert columns.tolist() == batch["is_match"][row, batch["candidates"][:, 0]].tolist()
    assert items.epoch == road and items.describe([field])[0]["caption"] == "a green field ."


def _own_text(items, row, epoch):
    items.set_epoch(epoch)
    return items.texts[items[row]["captions"][0]]


def test_negative_phrases_are_none_that_the_image_carries(split, processor):  # noqa: F811
    items = items_of(split, processor, num_negatives=4, phrase_probability=0.8)
    short = set()
    for epoch in range(40):
        items.set_epoch(epoch)
        for row in range(len(items)):
            item = items[row]
            rows = item["captions"]
            assert len(set(rows.tolist())) == 5
            assert not np.isin(items.text_ids[rows[1:]], items.image_text_ids[item["image"]]).any()
            short |= {items.texts[each] for each in rows[1:] if each >= len(items)}
    assert {"road", "stadium", "river", "ships"} <= short


def test_a_phrase_that_is_a_caption_as_a_whole_is_the_same_text(split, processor):  # noqa: F811
    captions = [["Parking lot", "cars ."], ["a big parking lot .", "a road ."], ["river"], ["trees"]]
    split = split.remove_columns("captions").add_column("captions", captions)
    items = items_of(split, processor, num_negatives=1, phrase_probability=1.0)
    ids = {items.texts[row].lower(): set() for row in range(len(items.texts))}
    for row, text in enumerate(items.texts):
        ids[text.lower()].add(int(items.text_ids[row]))
    assert all(len(each) == 1 for each in ids.values())
    assert ids["parking lot"] <= set(items.image_text_ids[1].tolist())


def test_the_draw_hangs_on_seed_epoch_and_item_and_leaves_the_image_alone(split, processor):  # noqa: F811
    options = {"augmentation": "turns", "phrase_probability": 0.5, "seed": 3}
    first, second = (items_of(split, processor, **options) for _ in range(2))
    plain = items_of(split, processor, augmentation="turns", seed=3)
    backward = [second[row] for row in reversed(range(len(second)))][::-1]
    for row in range(len(first)):
        assert first[row]["captions"].tolist() == backward[row]["captions"].tolist()
        assert np.array_equal(first[row]["pixel_values"], plain[row]["pixel_values"])


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_a_probability_is_from_0_to_1(split, processor, probability):  # noqa: F811
    with pytest.raises(ValueError, match="phrase_probability must be from 0 to 1"):
        items_of(split, processor, phrase_probability=probability)
