"""Tests of the processors: images of every kind and captions of every length become tensors, or a clear error."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer
from transformers.utils import logging as transformers_logging

from processing_ieft import IeftImageProcessor, IeftProcessor, array_to_rgb, stretch_to_bytes, to_rgb

CAPTIONS = ["a red house beside a river .", "two ships in a harbour ."]


@pytest.fixture
def processor():
    tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=100)
    return IeftProcessor(IeftImageProcessor(image_size=32), tokenizer)


def gradient(width=48, height=48):
    """RGB: red rises to the right, green rises downwards, blue is 200."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    pixels[..., 2] = 200
    return Image.fromarray(pixels)


MODES = ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]


def in_mode(mode):
    if mode == "I;16":
        return Image.fromarray(np.linspace(0, 4000, 48 * 48).reshape(48, 48).astype(np.uint16))
    if mode in ("I", "F", "1"):
        return gradient().convert("L").convert(mode)
    if mode == "PA":
        return gradient().convert("L").convert("LA").convert("PA")
    return gradient().convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_a_square_tensor_that_still_shows_the_image(mode):
    image = in_mode(mode)
    assert image.mode == mode
    pixels = IeftImageProcessor(image_size=32)(image)["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert pixels.std() > 0.1  # neither black nor white


def test_values_are_bytes_scaled_to_minus_one_to_one():
    image = Image.new("RGB", (32, 32), (0, 255, 51))
    pixels = IeftImageProcessor(image_size=32)(image)["pixel_values"][0]
    assert pixels[:, 3, 5].tolist() == pytest.approx([-1.0, 1.0, 51 / 127.5 - 1])


def test_sixteen_bits_are_stretched_not_clipped():
    values = np.linspace(1000, 9000, 64 * 64).reshape(64, 64).astype(np.uint16)
    ours = np.asarray(to_rgb(Image.fromarray(values)))
    assert ours[0, 0, 0] == 0 and ours[-1, -1, 0] == 255
    assert abs(int(ours[32, 0, 0]) - 128) <= 2
    low, high = np.percentile(values, (2, 98))
    row, column = 40, 17
    assert ours[row, column, 1] == round((values[row, column] - low) / (high - low) * 255)


def test_stretch_ignores_what_is_not_finite_and_survives_flat_bands():
    band = np.linspace(0, 1, 100).reshape(10, 10)
    band[0, :3] = [np.nan, np.inf, -np.inf]
    assert stretch_to_bytes(band)[0, :3].tolist() == [0, 0, 0]
    assert stretch_to_bytes(np.full((4, 4), 7)).tolist() == np.full((4, 4), 128).tolist()
    assert stretch_to_bytes(np.zeros((4, 4))).max() == 0
    assert stretch_to_bytes(np.full((2, 2), np.nan)).max() == 0
    lone = np.zeros((100, 100))
    lone[5, 5] = 3
    assert stretch_to_bytes(lone)[5, 5] == 255  # outside the percentiles, still seen


def test_transparent_is_black_and_exif_is_obeyed():
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert np.asarray(to_rgb(clear)).max() == 0
    image = gradient(20, 10)
    image.getexif()[0x0112] = 6  # turned by 90 degrees
    assert to_rgb(image).size == (10, 20)


def test_fit_keeps_the_centre_or_squashes():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    crop = IeftImageProcessor(image_size=30)(wide)["pixel_values"][0]
    assert (crop[2] == 1).all() and (crop[0] == -1).all()
    squash = IeftImageProcessor(image_size=30, fit="squash")(wide)["pixel_values"][0]
    assert squash[0, 15, 2] == 1 and squash[2, 15, 15] == 1 and squash[0, 15, 27] == 1
    with pytest.raises(ValueError, match="crop, squash"):
        IeftImageProcessor(fit="pad")


def test_resize_is_pils_bicubic():
    image = gradient(64, 64)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    ours = IeftImageProcessor(image_size=32)(image)["pixel_values"][0].permute(1, 2, 0)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_arrays_and_paths(tmp_path):
    image = gradient(32, 32)
    image.save(tmp_path / "scene.png")
    processor = IeftImageProcessor(image_size=32)
    expected = processor(image)["pixel_values"]
    for same in (np.asarray(image), np.asarray(image).transpose(2, 0, 1), str(tmp_path / "scene.png")):
        assert torch.equal(processor(same)["pixel_values"], expected)
    assert torch.equal(processor([image, np.asarray(image)])["pixel_values"][1:], expected)
    with pytest.raises(ValueError, match="1, 3 or 4 bands"):
        array_to_rgb(np.zeros((13, 8, 8)))
    with pytest.raises(ValueError, match="empty list"):
        processor([])


def test_captions_are_cut_with_one_warning(processor, caplog):
    transformers_logging.warning_once.cache_clear()  # another test may have heard it
    with caplog.at_level(logging.WARNING, logger="processing_ieft"):
        encoding = processor(text=["a river " * 40, "a house ."])
        processor(text="a river " * 40)
    assert encoding["input_ids"].shape == (2, 40)
    assert encoding["input_ids"][0, -1] == processor.tokenizer.sep_token_id
    assert encoding["attention_mask"].sum(1).tolist() == [40, 5]
    assert sum("truncated" in record.message for record in caplog.records) == 1
    assert processor(text=CAPTIONS)["input_ids"].shape[1] < 40  # padded to the longest only
    assert processor(text=CAPTIONS, padding="max_length")["input_ids"].shape == (2, 40)


def test_both_together_and_neither(processor):
    both = processor(images=[gradient(), gradient()], text=CAPTIONS)
    assert set(both) == {"pixel_values", "input_ids", "attention_mask"}
    assert processor(text=CAPTIONS[0])["input_ids"].dim() == 2  # one caption is a batch of one
    with pytest.raises(ValueError, match="got neither"):
        processor()


def test_saved_processor_loads_the_same(processor, tmp_path):
    processor.image_processor.fit = "squash"
    processor.max_caption_tokens = 12
    processor.save_pretrained(tmp_path)
    loaded = IeftProcessor.from_pretrained(tmp_path)
    assert (loaded.image_processor.image_size, loaded.image_processor.fit, loaded.max_caption_tokens) == (
        32,
        "squash",
        12,
    )
    image = gradient(60, 40)
    for name, tensor in processor(images=image, text=CAPTIONS).items():
        assert torch.equal(tensor, loaded(images=image, text=CAPTIONS)[name])


def test_the_usual_options_of_a_processor_mean_what_they_mean_in_transformers(processor):
    captions = ["two white storage tanks near a river .", "a river ."]
    cut = processor(text=captions, truncation=True, max_length=4)
    assert cut["input_ids"].shape == (2, 4)
    assert processor(text=captions, padding="max_length")["input_ids"].shape == (2, processor.max_caption_tokens)
    whole = processor(text=captions, text_kwargs={"add_special_tokens": False, "padding": False}, return_tensors=None)
    assert whole["input_ids"] == processor.tokenizer(captions, add_special_tokens=False)["input_ids"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    plain = processor(images=image, do_resize=False, do_normalize=False)["pixel_values"][0]
    assert torch.allclose(plain, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    means = processor(images=image, image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3, size={"height": 8, "width": 8})
    resized = np.array(image.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    expected = (resized - np.array([0.5, 0.4, 0.3])[:, None, None]) / 0.2
    assert np.allclose(means["pixel_values"][0], expected, atol=1e-5)
    nearly = processor(images=image, rescale_factor=1 / 255.0001)["pixel_values"]  # by the general way
    assert torch.allclose(nearly, processor(images=image)["pixel_values"], atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_lenght": 4}, "no option max_lenght"),
        ({"text_kwargs": {"truncate": True}}, "no option truncate"),
        ({"images": Image.new("RGB", (4, 4)), "size": {"shortest_edge": 9}}, "size a square"),
        ({"images": Image.new("RGB", (4, 4)), "fit": "pad"}, "fit must be one of"),
        ({"images": Image.new("RGB", (4, 4)), "image_std": [0.0, 0.0, 0.0]}, "must not hold 0"),
        ({"images": Image.new("RGB", (4, 4)), "image_mean": "half"}, "option of the processor cannot be used"),
    ],
)
def test_options_that_a_processor_does_not_have_are_refused(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(text="a river .", **options)


def test_settings_are_saved_under_the_usual_names_and_old_files_load(tmp_path):
    IeftImageProcessor(48, "squash", image_std=[0.2] * 3).save_pretrained(tmp_path)
    loaded = IeftImageProcessor.from_pretrained(tmp_path)
    assert (loaded.size, loaded.image_size, loaded.fit) == ({"height": 48, "width": 48}, 48, "squash")
    assert loaded.image_std == [0.2] * 3
    path = next(tmp_path.glob("*.json"))
    path.write_text(json.dumps({"image_processor_type": "IeftImageProcessor", "image_size": 40, "fit": "crop"}))
    assert IeftImageProcessor.from_pretrained(tmp_path).image_size == 40
    with pytest.raises(ValueError, match="must agree"):
        IeftImageProcessor(40, size=48)
