"""The image reader of the project: any file as RGB, whole or by windows, with the same pixels in every code path.

Files that Pillow reads faithfully (`processing_ieft.is_faithful`) are read by Pillow. Others go to
`ieft.data.rasters` (extra `geo`): several bands deeper than 8 bits, nodata values, more bands than Pillow supports.
Images of at most `MAX_PIXELS` are read whole, and their windows are cut out of that; larger ones are read at a smaller
scale as a whole, and at full scale by window.

Pillow refuses files of more than 179 million pixels as decompression bombs; a TIFF may have more if its blocks can be
read one at a time.

A file is given as a path, as its bytes, or as a `RemoteFile`; a string is always a path, so that no address in a data
set or sent by a visitor is ever opened.
"""

import logging
import re
from typing import NamedTuple

from PIL import Image, ImageOps

from ieft.data.rasters import Raster, has_raster_driver, is_tiff, open_lazily
from ieft.data.storage import RemoteFile
from processing_ieft import ORIENTATION, check_bands, is_faithful, to_rgb

logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # files that it cannot read are read by rasterio

MAX_PIXELS = 2048 * 2048  # the network's input is 384 x 384


class Window(NamedTuple):
    """A part of an image, in pixels from its upper left corner."""

    col: int
    row: int
    width: int
    height: int


def read_image(file, *, bands=None, describe=None):
    """Read an image file as upright PIL RGB of at most `MAX_PIXELS`.

    Args:
        file: a path, the file's bytes, or a `RemoteFile`.
        bands: numbers, from 1, of the three bands used as red, green and blue, or of a single grey band. With None,
            the bands that the file declares as red, green and blue, or all bands if there are one or three.
        describe: where Pillow reads the file, called with width and height as stored, and with the opened image once
            its pixels are read, so that the file need not be opened again for what else is in it.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if a remote file cannot be reached.
        ValueError: if it cannot be decoded, or bands must be chosen first; `__cause__` is the reason alone.
    """
    with _errors_named(file):
        image = _read_by_pillow(file, bands, most_pixels=MAX_PIXELS, describe=describe)
        if image is not None:
            return image
        with Raster(file, bands) as raster:
            return raster.read(share=min(1.0, (MAX_PIXELS / (raster.width * raster.height)) ** 0.5))


def is_plain(file, *, bands=None):
    """Whether Pillow with `processing_ieft.to_rgb` gives exactly the pixels of `read_image`.

    Such files can be stored unchanged; others must be stored as the image that was read.
    """
    if bands:
        return False
    try:
        with open_lazily(file) as image:
            plain = is_faithful(image) and image.width * image.height <= MAX_PIXELS
            if image.format == "TIFF" and image.tag_v2.get(ORIENTATION, 1) != 1:
                return False  # Pillow mixes up the rows of some, which `to_rgb` alone prevents
            ImageOps.exif_transpose(image)  # as the datasets library does; it fails for the EXIF of some cameras
            if plain and image.format == "TIFF":
                image.load()  # Pillow opens some compressions that it cannot decode
            return plain
    except Exception:
        return False


def describe_image(file):
    """Width, height and mode of an image file as stored: Pillow's mode, or bands and type as "13 x uint16"."""
    try:
        with open_lazily(file) as image:
            if is_faithful(image):
                return (*image.size, image.mode)
    except Exception:
        if not is_tiff(file):
            raise
    with Raster(file, None) as raster:
        return raster.width, raster.height, f"{raster.dataset.count} x {raster.dataset.dtypes[0]}"


def parse_bands(text):
    """ "3,2,1" -> (3, 2, 1); None stays None."""
    if text is None:
        return None
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*,\s*[1-9]\d*\s*)?", str(text)):
        raise ValueError(f"Bands are one number or three, counted from 1, such as 3,2,1; got {text!r}.")
    return tuple(int(number) for number in str(text).split(","))


class Scene:
    """An image file to read windows from, as a context manager.

    Attributes:
        width, height: in pixels, of the upright image.
    """

    def __init__(self, file, limits=None, *, bands=None):
        """Open a file.

        Args:
            file: a path, or a `RemoteFile`.
            limits: the stretch range from an earlier opening; it avoids reading the image at a smaller scale.
            bands: as in `read_image`.

        Raises:
            OSError, ValueError: as `read_image`.
        """
        self.file, self._raster, self._image = file, None, None
        with _errors_named(file):
            width, height, _ = describe_image(file)
            if width * height <= MAX_PIXELS or not has_raster_driver(file, windows=True):
                self._image = _read_by_pillow(file, bands)
            if self._image is None:
                self._raster = Raster(file, bands, limits)
            if self._image is None and width * height <= MAX_PIXELS:
                self._image = self._raster.read()
            self.width, self.height = self._image.size if self._image else (self._raster.width, self._raster.height)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._raster is not None:
            self._raster.close()

    @property
    def by_window(self):
        """Whether a window is read from the file without the rest of it."""
        return self._image is None

    @property
    def limits(self):
        """The stretch range: low and high of each shown band in turn; None for bytes."""
        return self._raster.limits if self._image is None else None

    def read(self, window):
        """Read a window as PIL RGB; nodata, transparent and non-finite pixels are black.

        Raises:
            ValueError: if the pixels are damaged.
        """
        if self._image is not None:
            col, row, width, height = window
            return self._image.crop((col, row, col + width, row + height))
        with _errors_named(self.file):
            return self._raster.read(window=window)


class _errors_named:
    """Context manager that turns any error of a decoder into one that names the file."""

    def __init__(self, file):
        self.file = file
        self.name = f"An image of {len(file):,} bytes" if isinstance(file, bytes) else file

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        lost = self.file.error if isinstance(self.file, RemoteFile) else None
        if lost is not None and (error is None or isinstance(error, Exception)):
            # Decoders turn it into errors of their own, or go on without what could not be read.
            raise (lost if isinstance(lost, OSError) else ValueError(f"{self.name} cannot be read: {lost}")) from error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{self.name} is no file: it was moved or deleted.") from error
        if isinstance(error, Exception):
            raise ValueError(f"{self.name} cannot be read as an image: {error or kind.__name__}") from error


def _read_by_pillow(file, bands, *, most_pixels=None, describe=None):
    """An image as RGB of at most `most_pixels` if Pillow reads it faithfully; None if a `Raster` must read it."""
    try:
        with open_lazily(file) as image:
            size = image.size  # which changes with the scale that it is decoded at
            small = most_pixels is None or image.width * image.height <= most_pixels
            if image.format == "TIFF":
                return to_rgb(image) if small and not bands and is_faithful(image) else None
            deep = image.mode == "F" or image.mode.startswith("I")
            if deep and not small and has_raster_driver(file):
                return None  # stretched whole, it would take gigabytes
            if is_faithful(image):
                rgb = _shrink(_pick_bands(image, bands), most_pixels)
                if describe is not None:
                    describe(*size, image)
                return rgb
            if image.format == "PNG":
                image.load()  # GDAL silently fills the missing part of truncated files
    except Exception:
        if not is_tiff(file):
            raise
    return None


def _pick_bands(image, bands):
    if not bands:
        return image
    check_bands(bands, len(image.getbands()))
    channels = [image.getchannel(band - 1) for band in bands]
    return Image.merge("RGB", channels) if len(channels) == 3 else channels[0]


def _shrink(image, most_pixels):
    """An image as RGB, reduced if needed; a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size."""
    if most_pixels is None:
        return to_rgb(image)
    share = (most_pixels / (image.width * image.height)) ** 0.5
    if share < 1 and image.format == "JPEG":
        image.draft(None, (int(image.width * share), int(image.height * share)))
    rgb = to_rgb(image)
    share = (most_pixels / (rgb.width * rgb.height)) ** 0.5
    if share < 1:
        rgb.thumbnail((max(1, int(rgb.width * share)), max(1, int(rgb.height * share))), reducing_gap=2.0)
    return rgb
