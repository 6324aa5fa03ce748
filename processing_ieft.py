"""Images and captions as tensors.

In: images of any PIL mode, arrays, paths or URLs; captions as sentences. Out: `pixel_values` (I, 3, image_size,
image_size) in [-1, 1], `input_ids` and `attention_mask` (C, L). It knows nothing of pairs, datasets or networks.
"""

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.utils import logging

try:
    from .configuration_ieft import IeftConfig
except ImportError:  # imported from the clone or the wheel, where these files are top-level modules
    from configuration_ieft import IeftConfig

logger = logging.get_logger(__name__)

STRETCH_PERCENTILES = (2, 98)
FITS = ("crop", "squash")


def stretch_to_bytes(band):
    """One band of any number type (H, W) -> uint8, its 2nd to 98th percentile over finite pixels stretched to 0..255.

    A band without contrast becomes black where it is 0 and mid-grey elsewhere; pixels not finite become black.
    """
    band = np.asarray(band, dtype=np.float64)
    finite = np.isfinite(band)
    if not finite.any():
        return np.zeros(band.shape, dtype=np.uint8)
    low, high = np.percentile(band[finite], STRETCH_PERCENTILES)
    if high == low:  # nearly all pixels are equal: use whatever range is left
        low, high = band[finite].min(), band[finite].max()
    if high == low:
        return np.where(finite & (band != 0), 128, 0).astype(np.uint8)
    scaled = (np.where(finite, band, low) - low) / (high - low)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def to_rgb(image):
    """A PIL image of any mode as 8-bit RGB, turned upright as its EXIF says.

    16-bit, 32-bit and float images are stretched by percentiles (`stretch_to_bytes`), where PIL's own conversion would
    clip them; transparent pixels become black, as the no-data areas of a scene.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(stretch_to_bytes(np.array(image))).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


def array_to_rgb(array):
    """An array (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 bands -> PIL RGB; other than uint8 is stretched per band.

    Raises:
        ValueError: for another number of dimensions or bands.
    """
    array = np.asarray(array)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"An image array of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 bands expected; got "
            f"{array.shape}. Choose three bands first."
        )
    if array.dtype != np.uint8:
        array = np.stack([stretch_to_bytes(array[:, :, band]) for band in range(array.shape[2])], axis=2)
    return to_rgb(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array))


class IeftImageProcessor(BaseImageProcessor):
    """Any image as a square tensor in [-1, 1], resized by bicubic interpolation.

    Args:
        image_size: side of the output, in pixels.
        fit: what becomes of an image that is not square. "crop" resizes its shorter side to `image_size` and keeps the
            centre; "squash" resizes both sides and keeps everything, out of proportion.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size=384, fit="crop", **kwargs):
        super().__init__(**kwargs)
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}; got {fit!r}.")
        self.image_size = image_size
        self.fit = fit

    def __call__(self, images, **kwargs):
        return self.preprocess(images, **kwargs)

    def preprocess(self, images, return_tensors="pt", **kwargs):
        """One image or a list: PIL, arrays, tensors, paths or URLs.

        Returns:
            BatchFeature: `pixel_values` (I, 3, image_size, image_size) float32 in [-1, 1].
        """
        if kwargs:
            raise ValueError(f"Unknown options {sorted(kwargs)}: image_size and fit are set at creation.")
        if isinstance(images, list | tuple) and not images:
            raise ValueError("At least one image expected; got an empty list.")
        images = make_flat_list_of_images(self.fetch_images(images))
        return BatchFeature({"pixel_values": np.stack([self._to_array(image) for image in images])}, return_tensors)

    def _to_array(self, image):
        rgb = to_rgb(image) if isinstance(image, Image.Image) else array_to_rgb(image)
        return self.scale_pixels(np.asarray(self.fit_square(rgb)))

    def scale_pixels(self, square):
        """uint8 (image_size, image_size, 3) -> float32 (3, image_size, image_size) in [-1, 1]."""
        return np.ascontiguousarray(square.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1.0

    def fit_square(self, image):
        """A PIL RGB image at `image_size` by `image_size`, by the processor's policy."""
        square = (self.image_size, self.image_size)
        if image.size == square:
            return image
        if self.fit == "squash":
            return image.resize(square, Image.Resampling.BICUBIC)
        return ImageOps.fit(image, square, Image.Resampling.BICUBIC)


class IeftProcessor(ProcessorMixin):
    """A BERT tokenizer and an `IeftImageProcessor`.

    Args:
        max_caption_tokens: captions are cut at this many tokens, [CLS] and [SEP] included; a warning says so once.
    """

    def __init__(self, image_processor=None, tokenizer=None, max_caption_tokens=40, **kwargs):
        self.max_caption_tokens = max_caption_tokens
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text=None, *, padding=True, return_tensors="pt", **kwargs):
        """Images, captions, or both.

        Args:
            images: one image or a list, as `IeftImageProcessor.preprocess` takes them.
            text: one caption or a list.
            padding: True pads to the longest caption given; "max_length" to `max_caption_tokens`.

        Returns:
            BatchFeature: `pixel_values` (I, 3, image_size, image_size), `input_ids` and `attention_mask` (C, L).
        """
        if images is None and text is None:
            raise ValueError("Images, captions (`text`) or both expected; got neither.")
        data = {}
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            encoding = self.tokenizer(
                text, padding=padding, truncation=True, max_length=self.max_caption_tokens,
                return_token_type_ids=False, **kwargs,
            )  # fmt: skip
            if any(caption.overflowing for caption in encoding.encodings or ()):
                logger.warning_once(f"Captions longer than {self.max_caption_tokens} tokens are cut there.")
            data.update(encoding)
        if images is not None:
            data.update(self.image_processor(images, return_tensors="np"))
        return BatchFeature(data, return_tensors)


# A processor finds the class of its image processor through this table. Whatever backend is asked for, PIL works.
BACKENDS = dict.fromkeys(("pil", "torchvision"), IeftImageProcessor)
AutoImageProcessor.register(IeftConfig, image_processor_classes=BACKENDS, exist_ok=True)
IeftImageProcessor.register_for_auto_class()
IeftProcessor.register_for_auto_class()

__all__ = ["IeftImageProcessor", "IeftProcessor", "array_to_rgb", "stretch_to_bytes", "to_rgb"]
