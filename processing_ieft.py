"""Image processor and processor of IEFT: images and captions as tensors.

Images that Pillow reads faithfully are read here. Others (16-bit colour, nodata values, more than four bands) are read
by `ieft.data.images`, which `import ieft` registers; without it they are refused with an error that names them.
"""

import base64
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs
from transformers.utils import logging

try:
    from .configuration_ieft import IeftConfig, check_spelling
except ImportError:  # imported from the clone or the wheel, where these files are top-level modules
    from configuration_ieft import IeftConfig, check_spelling

logger = logging.get_logger(__name__)

STRETCH_PERCENTILES = (2, 98)
MOST_PARTLY_TRANSPARENT = 0.01  # share of partly transparent pixels in an alpha band; image data has more
FITS = ("crop", "squash")
IMAGE_OPTIONS = (
    "size", "fit", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
MAX_SIDE = 2**14
MAX_CAPTION_TOKENS = 2**16
# PIL supports about forty more, and runs an external program to read one of them (EPS).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
URL_TIMEOUT = 20  # seconds without a response
URL_SECONDS = 120  # for one image in total
MAX_IMAGE_BYTES = 2**28  # of a URL or in base64
# Tags of TIFF and of GDAL.
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, COLOR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 277, 320, 338, 339
GDAL_METADATA, GDAL_NO_DATA = 42112, 42113
UNSIGNED = 1
KIND_OF_PAGE, MASK, MOST_PAGES = 254, 4, 32
ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
FULL_READER: Callable[..., Image.Image] | None = (
    None  # reads files that Pillow would distort: path or bytes -> PIL RGB
)


def stretch_to_bytes(band: Any) -> np.ndarray:
    """Stretch a band (H, W) of any number type to uint8: its 2nd to 98th percentile of finite pixels become 0 to 255.

    A band without contrast becomes black where it is 0 and mid-grey elsewhere; non-finite pixels become black.
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


def open_lazily(file: str | os.PathLike | bytes) -> Image.Image:
    """Open an image file (path or bytes) with PIL if its format is one of `FORMATS`, without reading its pixels."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)


def is_faithful(image: Any) -> bool:
    """Whether Pillow reads an opened file without losing or distorting what the network could see."""
    if getattr(image, "format", None) != "TIFF":
        return getattr(image, "format", None) != "JPEG2000" and not _keeps_upper_byte(image)
    tags = image.tag_v2
    bits, kinds = max(tags.get(BITS_PER_SAMPLE, (1,))), set(tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
    if GDAL_NO_DATA in tags or "colorinterp" in str(tags.get(GDAL_METADATA, "")).lower():
        return False
    if EXTRA_SAMPLES in tags or (COLOR_MAP in tags and image.mode != "P") or _has_mask(image):
        return False  # an extra band that may not be alpha; a palette or mask that Pillow does not apply
    if bits <= 8:
        return kinds == {UNSIGNED}
    return tags.get(SAMPLES_PER_PIXEL, 1) == 1 and (bits == 16 or image.mode == "F")


def _keeps_upper_byte(image):
    """Whether Pillow makes bytes of an image of several bands of 16 bits (PNG, SGI, PPM)."""
    deep = any(
        ";16" in str(tile) or "SGI16" in str(tile) or (str(tile[0]).startswith("ppm") and tile[3][-1] > 255)
        for tile in getattr(image, "tile", ())
    )
    return deep and not image.mode.startswith("I")


def _has_mask(image):
    """Whether one of the first pages of a TIFF is a transparency mask."""
    found, page = False, image.tell()
    try:
        for number in range(min(image.n_frames, MOST_PAGES)):
            image.seek(number)
            found = found or bool(image.tag_v2.get(KIND_OF_PAGE, 0) & MASK)
        image.seek(page)
    except Exception:  # a page that Pillow cannot read, such as a 1-bit mask
        return True
    return found


def check_bands(bands: Sequence[int], count: int) -> None:
    """Raise a ValueError if an image of `count` bands lacks a requested one."""
    if max(bands) > count:
        raise ValueError(f"it has bands 1 to {count}; band {max(bands)} was asked for")


def open_image(file: str | os.PathLike | bytes) -> Image.Image:
    """Read an image file (path or bytes) as PIL RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is in none of `FORMATS`, is damaged, or has more pixels than PIL's `MAX_IMAGE_PIXELS`;
            or if Pillow would distort it and `ieft` has not registered its reader.
    """
    try:
        with open_lazily(file) as image:
            if is_faithful(image):
                return to_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # for damaged files, PIL raises any kind of error
        if FULL_READER is None:
            shown = "image" if isinstance(file, bytes) else file
            reason = str(error) or type(error).__name__
            raise ValueError(reason if "cannot identify" in reason else f"{shown} cannot be read: {reason}") from error
    if FULL_READER is None:
        raise _beyond_pillow("This image" if isinstance(file, bytes) else file)
    return FULL_READER(file)


def _beyond_pillow(name):
    return ValueError(
        f"{name} has 16-bit colour, nodata values, several bands or an alpha band, which Pillow alone would "
        "distort. Pass its path after `import ieft` (pip install 'ieft[geo]'), or convert it to 8-bit RGB first."
    )


def _fetch(source):
    """The bytes of an http(s) URL, a `data:` URL or a base64 string; the path of a file is returned unchanged."""
    if source.startswith(("http://", "https://")):
        return _download(source)
    if _is_file(source):
        return source
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    if len(encoded) > 4 * MAX_IMAGE_BYTES // 3:
        raise ValueError(f"An image of up to {MAX_IMAGE_BYTES:,} bytes expected; this base64 holds more.")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        raise ValueError(
            f"The path of an image file, its URL or its bytes in base64 expected; got {source[:200]!r}."
        ) from error


def _download(url):
    """Download the bytes of a URL, with limits on size and time."""
    chunks, size, started = [], 0, time.monotonic()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=URL_TIMEOUT) as answer:
            for chunk in answer.raise_for_status().iter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_IMAGE_BYTES or time.monotonic() - started > URL_SECONDS:
                    raise ValueError(f"it is larger than {MAX_IMAGE_BYTES:,} bytes, or takes over {URL_SECONDS} s")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise OSError(f"{url[:200]} cannot be downloaded: {error}") from error
    return b"".join(chunks)


def _is_file(source):
    try:
        return os.path.isfile(source)
    except ValueError:  # a null byte
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to 8-bit RGB, with its EXIF orientation applied.

    16-bit, 32-bit and float images are stretched by percentiles (`stretch_to_bytes`), since PIL's conversion would
    clip them; transparent pixels become black, like nodata areas of a scene.
    """
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(stretch_to_bytes(np.array(image))).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image):
    """Apply the EXIF orientation. PIL's `exif_transpose` also rewrites EXIF, which fails for some cameras."""
    name = getattr(image, "filename", None)
    if name and getattr(image, "format", None) == "TIFF":
        image.filename = ""  # or Pillow maps the file into memory, and mixes up the rows of one that it turns
    image.load()  # this applies the orientation of a TIFF
    if name:
        image.filename = name
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # for damaged EXIF, PIL raises any kind of error, but the pixels are valid
        orientation = None
    if orientation not in UPRIGHT:
        return image
    turned = image.transpose(UPRIGHT[orientation])
    turned.info = {name: value for name, value in image.info.items() if name == "transparency"}  # no EXIF
    return turned


def is_unit_float(array: Any) -> bool:
    """Whether an array is of floats in [0, 1], as torchvision's ToTensor and most networks have them; NaN may be
    among them."""
    array = np.ma.getdata(array)
    if array.dtype.kind != "f" or array.size == 0:
        return False
    array = array[~np.isnan(array)]
    return array.size > 0 and float(array.min()) >= 0 and float(array.max()) <= 1


def array_to_rgb(array: Any) -> Image.Image:
    """An array (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 bands -> PIL RGB.

    Bytes are taken as they are, floats in [0, 1] as bytes divided by 255; any others are stretched band by band. What
    is masked, not a number, or transparent by a fourth band is black.

    Raises:
        ValueError: for another number of dimensions or bands, and for a fourth band that holds a picture.
    """
    array = array if isinstance(array, np.ma.MaskedArray) else np.asarray(array)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape or array.dtype.kind not in "buifc":
        raise ValueError(
            f"An image array of numbers of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 bands expected; got "
            f"{array.shape} of {array.dtype}. Choose three bands first."
        )
    is_data, array = np.logical_not(np.ma.getmaskarray(array).all(axis=2)), np.ma.getdata(array)
    if array.shape[2] == 4:
        alpha = array[:, :, 3]
        if ((alpha != 0) & (alpha != alpha.max())).mean() > MOST_PARTLY_TRANSPARENT:
            raise ValueError(
                "The fourth band of this array could be an alpha band or a picture, such as near infrared: choose "
                "three bands first."
            )
        is_data, array = is_data & (alpha != 0), array[:, :, :3]
    if is_unit_float(array):
        array = (np.nan_to_num(array.astype(np.float64)) * 255).round().astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        array = np.abs(array) if array.dtype.kind == "c" else array
        array = np.where(is_data[:, :, None], array, np.nan)
        array = np.stack([stretch_to_bytes(array[:, :, band]) for band in range(array.shape[2])], axis=2)
    array = np.where(is_data[:, :, None], array, 0).astype(np.uint8)
    return to_rgb(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array))


def image_to_rgb(image: Any) -> Image.Image:
    """Convert a PIL image or array to PIL RGB. A file that Pillow opened but would distort is read again by path.

    Raises:
        ValueError: if that is not possible.
    """
    if not isinstance(image, Image.Image):
        return array_to_rgb(image)
    name = getattr(image, "filename", "")
    has_file = bool(name) and _is_file(name)
    if is_faithful(image):
        try:
            return to_rgb(image)
        except Exception as error:  # closed, truncated, or of a compression that Pillow knows by name alone
            if not has_file:
                raise ValueError(f"This image cannot be read: {error or type(error).__name__}") from error
    elif not has_file:
        raise _beyond_pillow("This image")
    return open_image(name)


class IeftImageProcessor(BaseImageProcessor):
    """Converts images to square tensors, by default resized by bicubic interpolation and normalized to [-1, 1].

    Args:
        image_size: side of the output in pixels; the same as `size={"height": image_size, "width": image_size}`.
        fit: how an image that is not square is resized. "crop" resizes its shorter side to `image_size` and crops the
            centre; "squash" resizes both sides without keeping the aspect ratio.
        do_resize, do_rescale, rescale_factor, do_normalize, image_mean, image_std: as in transformers' image
            processors: resize; multiply pixel values by the factor; subtract the mean and divide by the standard
            deviation.

    Each can also be passed to a single call.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self, image_size=None, fit="crop", *, size=None, do_resize=True, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), **kwargs,
    ):  # fmt: skip
        shadowed = [name for name in kwargs if name.startswith("__") or callable(getattr(type(self), name, None))]
        if shadowed:
            raise ValueError(f"{shadowed[0]!r} cannot be set: it is an attribute of IeftImageProcessor.")
        check_spelling(kwargs, ("image_size", *IMAGE_OPTIONS))
        self._check(fit=fit, image_mean=image_mean, image_std=image_std)
        super().__init__(**kwargs)
        sides = {_side(each) for each in (image_size, size) if each is not None} or {384}
        if len(sides) > 1:
            raise ValueError(f"image_size and size must agree; got {image_size!r} and {size!r}.")
        side = sides.pop()
        self.size = {"height": side, "width": side}
        self.do_resize, self.do_rescale, self.do_normalize = do_resize, do_rescale, do_normalize
        self.rescale_factor, self.image_mean, self.image_std = rescale_factor, list(image_mean), list(image_std)
        self.fit = fit

    @property
    def image_size(self) -> int:
        """Side length of the output in pixels."""
        return self.size["height"]

    @image_size.setter
    def image_size(self, side: int) -> None:
        side = _side(side)
        self.size = {"height": side, "width": side}

    @staticmethod
    def _check(*, fit, image_mean, image_std, **_):
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}; got {fit!r}.")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if (
                not hasattr(values, "__len__")
                or len(values) != 3
                or not all(isinstance(value, int | float) for value in values)
            ):
                raise ValueError(f"{name} must be three numbers; got {values!r}.")
        if 0 in image_std:
            raise ValueError(f"image_std must not hold 0; got {image_std!r}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with a ValueError if the file holds no valid processor."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:  # for malformed content, transformers raises any kind of error
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no image processor that can be read: {error}"
            ) from error

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a misspelt option is a ValueError."""
        check_spelling(kwargs, ("image_size", *IMAGE_OPTIONS))
        return super().from_dict(image_processor_dict, **kwargs)

    def __call__(self, images, **kwargs):
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """One image or a list: PIL, arrays, tensors, paths or URLs.

        Args:
            kwargs: any of the settings above, for this call only.

        Returns:
            BatchFeature: `pixel_values` (I, 3, image_size, image_size) float32, in [-1, 1] by default.
        """
        unknown = sorted(kwargs.keys() - set(IMAGE_OPTIONS))
        if unknown:
            raise ValueError(f"There is no option {', '.join(unknown)}; there are {', '.join(IMAGE_OPTIONS)}.")
        given = {name: value for name, value in kwargs.items() if value is not None}
        settings = {name: getattr(self, name) for name in IMAGE_OPTIONS} | given
        self._check(**settings)
        if isinstance(images, list | tuple) and not images:
            raise ValueError("At least one image expected; got an empty list.")
        images = make_flat_list_of_images(self.fetch_images(images))
        pixels = [self._to_array(image, settings) for image in images]
        if len({each.shape for each in pixels}) > 1:
            raise ValueError("Images of different sizes cannot be stacked into one tensor: keep do_resize=True.")
        return BatchFeature({"pixel_values": np.stack(pixels)}, return_tensors)

    def fetch_images(self, images: Any) -> Any:
        """Read paths, URLs, base64, bytes and open files with `open_image`; PIL images and arrays stay as they are.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, str):
            return open_image(_fetch(images))
        if isinstance(images, os.PathLike):
            return open_image(os.fspath(images))
        if isinstance(images, bytes | bytearray):
            return open_image(bytes(images))
        if isinstance(images, Image.Image):
            return images
        if hasattr(images, "read"):
            return open_image(images.read(MAX_IMAGE_BYTES))
        if hasattr(images, "detach"):  # of torch; numpy has no bfloat16
            images = images.detach().cpu()
            images = (images.float() if images.is_floating_point() else images).numpy()
        if not hasattr(images, "__array__"):
            raise ValueError(
                "An image is a path, a URL, a PIL image, an array, a tensor, or a file's bytes; got "
                f"{type(images).__name__}."
            )
        images = images if isinstance(images, np.ndarray) else np.asarray(images)
        return images[:, :, None] if images.ndim == 2 else images

    def _to_array(self, image, settings):
        rgb = image_to_rgb(image)
        if not isinstance(image, Image.Image) and is_unit_float(image):
            settings = settings | {"do_rescale": True}  # it was in [0, 1] and has been converted to bytes here
        if settings["do_resize"]:
            rgb = fit_square(rgb, _side(settings["size"]), settings["fit"])
        return scale_pixels(np.asarray(rgb), settings)

    def scale_pixels(self, square: np.ndarray) -> np.ndarray:
        """uint8 (image_size, image_size, 3) -> float32 (3, image_size, image_size), in [-1, 1] by default."""
        return scale_pixels(square, vars(self))

    def fit_square(self, image: Image.Image) -> Image.Image:
        """Resize a PIL RGB image to `image_size` x `image_size`, by the processor's `fit`."""
        return fit_square(image, self.image_size, self.fit)


def _side(size):
    """The side length from `image_size` or `size`: an integer, or a square {"height": 384, "width": 384}."""
    if isinstance(size, dict) and size.keys() == {"height", "width"} and size["height"] == size["width"]:
        side = size["height"]
    else:
        side = size
    if type(side) is not int or not 0 < side <= MAX_SIDE:
        raise ValueError(
            f"image_size must be a whole number from 1 to {MAX_SIDE:,}, or size a square such as "
            f'{{"height": 384, "width": 384}}; got {size!r}.'
        )
    return side


def fit_square(image: Image.Image, side: int, fit: str) -> Image.Image:
    """Resize a PIL RGB image to `side` x `side`: cropped ("crop") or with another aspect ratio ("squash")."""
    if image.size == (side, side):
        return image
    if fit == "squash":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def scale_pixels(pixels: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W), rescaled and normalized by an image processor's settings."""
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    if [settings[name] for name in names] == [True, 1 / 255, True, [0.5] * 3, [0.5] * 3]:
        return pixels / 127.5 - 1.0  # as in ViLT; the same as below except for rounding
    if settings["do_rescale"]:
        pixels = pixels * np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        mean, std = (np.array(settings[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
    return pixels


def check_text(captions: Sequence[str]) -> None:
    """Check that captions are strings that can be encoded as UTF-8, as the tokenizer needs.

    Raises:
        ValueError: names the first caption that is not.
    """
    if not captions:
        raise ValueError("At least one caption expected; got an empty list.")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"Captions must be strings; caption {number} is a {type(caption).__name__}.")
        if any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise ValueError(
                f"Captions must be text; caption {number} holds an unpaired surrogate: {ascii(caption)[:200]}."
            )


class IeftImagesKwargs(ImagesKwargs, total=False):
    fit: str


class IeftProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: IeftImagesKwargs  # type: ignore[misc]  # as the processors of transformers
    _defaults = {  # type: ignore[misc]
        "text_kwargs": {"padding": True, "truncation": True, "return_token_type_ids": False}
    }


class IeftProcessor(ProcessorMixin):
    """A BERT tokenizer and an `IeftImageProcessor`.

    Args:
        max_caption_tokens: captions are truncated to this many tokens, including [CLS] and [SEP], with one warning.
    """

    def __init__(self, image_processor=None, tokenizer=None, max_caption_tokens=40, **kwargs):
        if type(max_caption_tokens) is not int or not 3 <= max_caption_tokens <= MAX_CAPTION_TOKENS:
            raise ValueError(
                f"max_caption_tokens must be a whole number from 3 to {MAX_CAPTION_TOKENS:,}; got "
                f"{max_caption_tokens!r}."
            )
        self.max_caption_tokens = max_caption_tokens
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self, images: Any = None, text: Any = None, *, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Convert images, captions, or both.

        Args:
            images: one image or a list, as `IeftImageProcessor.preprocess` takes them.
            text: one caption or a list.
            kwargs: options of the tokenizer (`padding`, by default to the longest caption given; `truncation`, by
                default on; `max_length`, by default `max_caption_tokens`; ...) and of the image processor, as
                in transformers' processors: directly, or in `text_kwargs` and `images_kwargs`.

        Returns:
            BatchFeature: `pixel_values` (I, 3, image_size, image_size), `input_ids` and `attention_mask` (C, L).
        """
        if images is None and text is None:
            raise ValueError("Images, captions (`text`) or both expected; got neither.")
        options = self._options(kwargs)
        data = {}
        if text is not None:
            if not isinstance(text, str) and (isinstance(text, Image.Image) or not hasattr(text, "__iter__")):
                raise ValueError(f"A caption or a list of captions expected as text; got a {type(text).__name__}.")
            text = [text] if isinstance(text, str) else list(text)
            check_text(text)
            encoding = self.tokenizer(text, **{"max_length": self.max_caption_tokens} | options["text_kwargs"])
            if any(caption.overflowing for caption in encoding.encodings or ()):
                logger.warning_once(f"Captions longer than {self.max_caption_tokens} tokens are truncated.")
            data.update(encoding)
        if images is not None:
            data.update(self.image_processor(images, return_tensors="np", **options["images_kwargs"]))
        return BatchFeature(data, return_tensors)

    def _options(self, kwargs):
        """Sort a call's keyword arguments into options of the tokenizer and of the image processor.

        Raises:
            ValueError: for an unknown option.
        """
        groups = {"text_kwargs": TextKwargs, "images_kwargs": IeftImagesKwargs}
        known = {*TextKwargs.__annotations__, *IMAGE_OPTIONS} - {"return_tensors"}
        nested = {name for group in groups for name in kwargs.get(group) or ()}
        unknown = sorted((kwargs.keys() - groups.keys() | nested) - known)
        if unknown:
            raise ValueError(f"There is no option {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
        try:
            merged = self._merge_kwargs(IeftProcessorKwargs, **kwargs)
        except Exception as error:  # for values of a wrong type, transformers raises errors of its own
            raise ValueError(f"An option of the processor cannot be used: {error}") from error
        return {
            group: {name: value for name, value in merged[group].items() if name != "return_tensors"}
            for group in groups
        }


# A processor finds the class of its image processor through this table; it is the same for every backend.
BACKENDS: dict[str, type] = dict.fromkeys(("pil", "torchvision"), IeftImageProcessor)
AutoImageProcessor.register(IeftConfig, image_processor_classes=BACKENDS, exist_ok=True)
IeftImageProcessor.register_for_auto_class()
IeftProcessor.register_for_auto_class()

__all__ = [
    "IeftImageProcessor",
    "IeftProcessor",
    "array_to_rgb",
    "image_to_rgb",
    "is_faithful",
    "open_lazily",
    "open_image",
    "stretch_to_bytes",
    "to_rgb",
]
