"""Tests of training items, their negatives and augmentations, and of evaluation sets."""

import io
import os
import random
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BertTokenizer

from ieft.training.items import (
    EvaluationSet,
    SplitImages,
    TrainingItems,
    learn_tokenizer,
    randomly_augmented,
    randomly_cropped,
    turn,
)
from processing_ieft import IeftImageProcessor, IeftProcessor

ROOT = Path(__file__).parent.parent
CAPTIONS = [
    ["a red house .", "a red house .", "one house beside a river ."],
    ["two ships .", "many boats in a harbour .", "a red house ."],
    ["a green field .", "a field .", "a wide green field near a road ."],
    ["a stadium .", "a big stadium beside a road .", "two ships ."],
]


@pytest.fixture
def processor():
    tokenizer = learn_tokenizer(text for row in CAPTIONS for text in row)
    return IeftProcessor(IeftImageProcessor(image_size=16), tokenizer)


@pytest.fixture
def split():
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in CAPTIONS]
    return Dataset.from_dict({"image": images, "captions": CAPTIONS})


def items_of(split, processor, **options):
    return TrainingItems(split, processor, **({"num_negatives": 4, "augmentation": "none"} | options))


NUMBER_TOKENS = """
from ieft.training.items import learn_tokenizer
words = "red house beside river two ships many boats harbour green field wide near road stadium big".split()
captions = [f"{one} {other} ." for one in words for other in words]  # every word is as frequent as the next
print(sorted(learn_tokenizer(captions).get_vocab().items()))
"""


def test_a_learned_tokenizer_numbers_its_tokens_alike_in_every_process():
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another one than here
    command = [sys.executable, "-c", NUMBER_TOKENS]
    other = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
    )
    with redirect_stdout(io.StringIO()) as printed:
        exec(NUMBER_TOKENS, {})
    assert other.stdout.decode() == printed.getvalue() and b"harbour" in other.stdout


def test_a_learned_tokenizer_knows_its_words_and_spells_the_others(tmp_path):
    tokenizer = learn_tokenizer(["A red house.", "a red roof, two ships ."])
    assert tokenizer.pad_token_id == 0
    assert tokenizer.tokenize("A RED house") == ["a", "red", "house"]
    assert tokenizer.tokenize("reds") == ["r", "##e", "##d", "##s"] or tokenizer.tokenize("reds") == ["red", "##s"]
    assert tokenizer.unk_token in tokenizer.tokenize("xylophone")
    tokenizer.save_pretrained(tmp_path)
    assert BertTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert len(learn_tokenizer(["a b c d e"], largest=8)) == 8


def test_each_caption_is_one_item_and_repeats_on_one_image_count_once(split, processor):
    items = items_of(split, processor)
    assert len(items) == 11  # twelve captions, one of them twice on the same image
    assert [items[row]["image"] for row in range(len(items))] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_negatives_are_never_a_sentence_of_the_image(split, processor):
    items = items_of(split, processor, num_negatives=6)
    for epoch in range(20):
        items.set_epoch(epoch)
        for row in range(len(items)):
            item = items[row]
            own_ids = items.image_text_ids[item["image"]]
            drawn = item["captions"][1:]
            assert len(set(drawn.tolist())) == 6
            assert not np.isin(items.caption_text_id[drawn], own_ids).any()


def test_uniform_negatives_include_the_false_ones_of_the_published_draw(split, processor):
    items = items_of(split, processor, negatives="uniform", num_negatives=9)
    item = items[0]
    assert np.isin(items.caption_text_id[item["captions"][1:]], items.image_text_ids[0]).any()
    assert 0 not in item["captions"][1:]


def test_negatives_are_drawn_evenly(split, processor):
    items = items_of(split, processor, num_negatives=2)
    counts = np.zeros(len(items))
    for epoch in range(600):
        items.set_epoch(epoch)
        counts[items[5]["captions"][1:]] += 1
    eligible = np.flatnonzero(counts)
    assert eligible.tolist() == [0, 1, 2, 3, 4, 8, 9, 10]
    assert counts[eligible].min() > 100 and counts[eligible].max() < 200  # 150 expected


def test_too_few_captions_to_draw_from_is_an_error(split, processor):
    with pytest.raises(ValueError, match="At least 15 captions .* has 6.*--num_negatives"):
        items_of(split, processor, num_negatives=15, negatives="distinct")
    with pytest.raises(ValueError, match="distinct, uniform"):
        items_of(split, processor, negatives="hard")


def test_a_batch_holds_each_caption_once_and_says_what_matches(split, processor):
    items = items_of(split, processor)
    batch = items.collate([items[2], items[5], items[0]])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    captions = np.concatenate([items[row]["captions"] for row in (2, 5, 0)])
    assert len(batch["input_ids"]) == len(np.unique(captions))
    longest = batch["attention_mask"].sum(1).max()
    assert batch["input_ids"].shape[1] == longest
    for row, item in enumerate((2, 5, 0)):
        ids = items[item]["captions"]
        for candidate, caption in zip(batch["candidates"][row], ids, strict=True):
            length = batch["attention_mask"][candidate].sum()
            assert batch["input_ids"][candidate, :length].tolist() == items.caption_tokens[caption]
        own = batch["is_match"][row, batch["candidates"][row]]
        assert own[0] and not own[1:].any()


def test_matches_cross_images_that_share_a_sentence(split, processor):
    items = items_of(split, processor, num_negatives=0)
    batch = items.collate([items[0], items[4], items[8]])  # house, boats' "a red house .", stadium
    columns = batch["candidates"][:, 0]
    assert batch["is_match"][:, columns].tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize("augmentation", ["randaugment", "turns", "crops"])
def test_draws_hang_on_seed_epoch_and_item_alone(split, processor, augmentation):
    first, second = (items_of(split, processor, augmentation=augmentation, seed=3) for _ in range(2))
    first.set_epoch(2)
    second.set_epoch(2)
    forward = [first[row] for row in range(len(first))]
    np.random.seed(1)
    random.seed(1)
    backward = [second[row] for row in reversed(range(len(second)))][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert one["captions"].tolist() == other["captions"].tolist()
    second.set_epoch(3)
    assert any(not torch.equal(forward[row]["pixel_values"], second[row]["pixel_values"]) for row in range(len(first)))


def test_workers_that_outlive_an_epoch_see_the_next_one(split, processor):
    items = items_of(split, processor, augmentation="turns")
    loader = DataLoader(items, batch_size=11, collate_fn=items.collate, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        items.set_epoch(epoch)
        (batch,) = list(loader)
        expected = items.collate([items[row] for row in range(len(items))])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["candidates"], expected["candidates"])


def test_randaugment_leaves_the_global_generators_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    states = random.getstate(), np.random.get_state()[1].tolist()
    changed = [np.asarray(randomly_augmented(image, seed)) for seed in (5, 5, 6)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert np.array_equal(changed[0], changed[1]) and not np.array_equal(changed[0], changed[2])


def test_the_eight_turns_are_all_different():
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert len({turn(square, which).tobytes() for which in range(8)}) == 8


def test_a_crop_of_everything_is_a_turn(monkeypatch):
    monkeypatch.setattr("ieft.training.items.MIN_CROP_AREA", 1.0)
    monkeypatch.setattr("ieft.training.items.MAX_COLOUR_CHANGE", 0.0)
    square = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    views = {randomly_cropped(square, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    assert views == {turn(square, which).tobytes() for which in range(8)}


def test_crops_have_at_least_half_of_the_area(monkeypatch):
    monkeypatch.setattr("ieft.training.items.MAX_COLOUR_CHANGE", 0.0)
    across, down = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 64))
    square = np.stack([across, down, np.zeros((64, 64))], axis=2).astype(np.uint8)
    areas = []
    for seed in range(200):
        view = randomly_cropped(square, np.random.default_rng(seed)).astype(int)
        areas.append(np.prod([np.ptp(view[..., channel]) / 255 for channel in (0, 1)]))
    assert 0.45 < min(areas) < 0.6 and 0.9 < max(areas) <= 1.0


def test_colours_change_by_no_more_than_stated():
    square = np.full((8, 8, 3), (100, 130, 150), dtype=np.uint8)
    means = [randomly_cropped(square, np.random.default_rng(seed)).mean() for seed in range(200)]
    assert np.std(means) > 5
    assert 0.7 * 100 * 0.9 < min(means) and max(means) < 1.3 * 160


def test_evaluation_set_keeps_repeated_sentences_once_per_image(split, processor):
    evaluation_set = EvaluationSet.from_split(split, processor)
    assert len(evaluation_set.captions) == 11
    assert evaluation_set.caption_image.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    shared = [column for column, caption in enumerate(evaluation_set.captions) if caption == "a red house ."]
    assert len(shared) == 2 and len(set(evaluation_set.caption_text_id[shared])) == 1
    expected = processor(images=split[1]["image"])["pixel_values"][0]
    torch.testing.assert_close(evaluation_set.images[1], expected)


def test_large_collections_are_not_kept_in_memory(split, processor, monkeypatch):
    kept = SplitImages(split, processor)
    monkeypatch.setattr("ieft.training.items.MAX_CACHED_BYTES", 10)
    streamed = SplitImages(split, processor)
    assert torch.equal(kept[2], streamed[2]) and torch.equal(kept[2], kept[2])
    assert streamed._squares is None and len(kept._squares) == 1
