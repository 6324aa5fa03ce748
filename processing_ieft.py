"""Images and captions as tensors.

In: images of any PIL mode, arrays, paths or URLs; captions as sentences. Out: `pixel_values` (I, 3, image_size,
image_size) in [-1, 1], `input_ids` and `attention_mask` (C, L). It knows nothing of pairs, datasets or networks.
"""

import base64
import io
import os

import httpx
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
MAX_SIDE = 2**14
MAX_CAPTION_TOKENS = 2**16
# PIL knows some forty more, and starts a program to read one of them (EPS).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
URL_TIMEOUT = 20  # seconds without an answer


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


def open_lazily(file):
    """An image file, a path or its bytes, as PIL opens it, if it is of `FORMATS`; its pixels are not read yet."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)


def open_picture(file):
    """An image file, a path or its bytes, as `to_rgb` gives it.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file in none of `FORMATS`, damaged, or of more pixels than PIL's `MAX_IMAGE_PIXELS` allows.
    """
    try:
        with open_lazily(file) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # of garbage, PIL's readers raise anything
        shown = "image" if isinstance(file, bytes) else file
        reason = str(error) or type(error).__name__
        raise ValueError(reason if "cannot identify" in reason else f"{shown} cannot be read: {reason}") from error


def _fetch(source):
    """The bytes of a URL, of a `data:` URL or of base64, or the path of a file."""
    if source.startswith(("http://", "https://")):
        try:
            return httpx.get(source, follow_redirects=True, timeout=URL_TIMEOUT).raise_for_status().content
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise OSError(f"{source[:200]} cannot be downloaded: {error}") from error
    if _is_file(source):
        return source
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        raise ValueError(
            f"The path of an image file, its URL or its bytes in base64 expected; got {source[:200]!r}."
        ) from error


def _is_file(source):
    try:
        return os.path.isfile(source)
    except ValueError:  # a zero byte
        return False


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
        shadowed = [name for name in kwargs if name.startswith("__") or callable(getattr(type(self), name, None))]
        if shadowed:
            raise ValueError(f"{shadowed[0]!r} cannot be set: it is a part of IeftImageProcessor.")
        super().__init__(**kwargs)
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}; got {fit!r}.")
        if type(image_size) is not int or not 0 < image_size <= MAX_SIDE:
            raise ValueError(f"image_size must be a whole number from 1 to {MAX_SIDE:,}; got {image_size!r}.")
        self.image_size = image_size
        self.fit = fit

    @classmethod
    def from_pretrained(cls, source, *args, **kwargs):
        """As transformers'; a file that holds no processor is a ValueError."""
        try:
            return super().from_pretrained(source, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:  # for content of a wrong shape, transformers raises anything
            raise ValueError(f"{source} holds no image processor that can be read: {error}") from error

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

    def fetch_images(self, images):
        """Paths, URLs and base64 as PIL RGB by `open_picture`; anything else as it is."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        return open_picture(_fetch(images)) if isinstance(images, str) else super().fetch_images(images)

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


def check_text(captions):
    """That captions are sentences that can be written as UTF-8, which the tokenizer works on.

    Raises:
        ValueError: that names the first one that is not.
    """
    if not captions:
        raise ValueError("At least one caption expected; got an empty list.")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"Captions must be strings; caption {number} is a {type(caption).__name__}.")
        if any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise ValueError(
                f"Captions must be text; caption {number} holds half a character: {ascii(caption)[:200]}."
            )


class IeftProcessor(ProcessorMixin):
    """A BERT tokenizer and an `IeftImageProcessor`.

    Args:
        max_caption_tokens: captions are cut at this many tokens, [CLS] and [SEP] included; a warning says so once.
    """

    def __init__(self, image_processor=None, tokenizer=None, max_caption_tokens=40, **kwargs):
        if type(max_caption_tokens) is not int or not 3 <= max_caption_tokens <= MAX_CAPTION_TOKENS:
            raise ValueError(
                f"max_caption_tokens must be a whole number from 3 to {MAX_CAPTION_TOKENS:,}; got "
                f"{max_caption_tokens!r}."
            )
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
            check_text(text)
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

__all__ = [
    "IeftImageProcessor",
    "IeftProcessor",
    "array_to_rgb",
    "open_lazily",
    "open_picture",
    "stretch_to_bytes",
    "to_rgb",
]
