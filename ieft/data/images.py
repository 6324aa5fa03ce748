"""The one place where image files become RGB pictures.

In: an image file, or its bytes. Out: a PIL RGB picture, or one error that names the file and says why there is none.
It knows nothing of datasets, and changes nothing on disk.

Pillow reads what it reads faithfully. What it refuses, or would spoil without a word, goes to rasterio (the extra
`geo`): several bands deeper than 8 bits, of which Pillow keeps the upper byte and so nearly black; no-data values,
which would take part in the stretch; more bands than Pillow knows. Bands deeper than 8 bits are each stretched from
their 2nd to their 98th percentile (`processing_ieft.stretch_to_bytes`), bands of 8 bits are taken as they are.

Memory is bounded: a picture has at most `MAX_PIXELS`, and larger files are decoded at a smaller scale. Pillow refuses
files of more than 179 million pixels as decompression bombs; a TIFF may have more, if its blocks can be read singly.
"""

import logging
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from processing_ieft import open_lazily, stretch_to_bytes, to_rgb

logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # what it cannot read, rasterio can

MAX_PIXELS = 2048 * 2048  # the network looks at 384 x 384
MAX_SCENE_PIXELS = 2**32
MAX_BLOCK_BYTES = 2**28  # what a TIFF keeps as one piece has to be decoded as one
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# How files begin -> GDAL's name of the kind. It knows others, some of which read further files that a file names.
DRIVERS = dict.fromkeys(TIFF_STARTS, "GTiff") | {
    b"\x89PNG": "PNG",
    b"\0\0\0\x0cjP": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, SAMPLE_FORMAT, NO_DATA = 258, 277, 339, 42113  # tags of TIFF and of GDAL
UNSIGNED = 1


def read_picture(file, *, bands=None):
    """An image file as PIL RGB, upright, of at most `MAX_PIXELS`.

    Args:
        file: a path, or the file's bytes.
        bands: numbers, from 1, of the three bands that become red, green and blue, or of one that becomes grey. None
            takes those that the file says are red, green and blue, or all where there are one or three.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be decoded, or bands have to be chosen first; `__cause__` is the reason alone.
    """
    try:
        return _read(file, bands)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is no file: it was moved or deleted.") from error
    except Exception as error:  # decoders raise errors of all kinds at damaged files
        raise ValueError(f"{_name(file)} cannot be read as an image: {error or type(error).__name__}") from error


def is_plain(file, *, bands=None):
    """Whether Pillow and `processing_ieft.to_rgb` alone give the very picture of `read_picture`.

    Such files can be stored as they are; others as the picture that was read.
    """
    if bands:
        return False
    try:
        with open_lazily(file) as image:
            plain = _pillow_is_faithful(image) and image.width * image.height <= MAX_PIXELS
            if plain and image.format == "TIFF":
                image.load()  # Pillow knows compressions by name that it cannot undo
            return plain
    except Exception:
        return False


def describe_picture(file):
    """Width, height and mode of an image file as stored: Pillow's name, or such as "13 x uint16"."""
    try:
        with open_lazily(file) as image:
            if _pillow_is_faithful(image):
                return (*image.size, image.mode)
    except Exception:
        if not _is_tiff(file):
            raise
    with _open_scene(file) as scene:
        return scene.width, scene.height, f"{scene.count} x {scene.dtypes[0]}"


def parse_bands(text):
    """ "3,2,1" -> (3, 2, 1); None stays None."""
    if text is None:
        return None
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*,\s*[1-9]\d*\s*)?", str(text)):
        raise ValueError(f"Bands are one number or three, counted from 1, such as 3,2,1; got {text!r}.")
    return tuple(int(number) for number in str(text).split(","))


def _read(file, bands):
    try:
        with open_lazily(file) as image:
            if image.format == "TIFF":
                if not bands and _pillow_is_faithful(image) and image.width * image.height <= MAX_PIXELS:
                    return to_rgb(image)
            elif _pillow_is_faithful(image):
                return _shrink(_pick_bands(image, bands))
            elif image.format == "PNG":
                image.load()  # GDAL fills up what is truncated, and says nothing
    except Exception:
        if not _is_tiff(file):
            raise
    return _read_scene(file, bands)


def _pillow_is_faithful(image):
    """Whether what Pillow makes of an opened file has all that the network could see."""
    if image.format != "TIFF":
        keeps_upper_byte = ";16" in str(image.tile) and not image.mode.startswith("I")
        return not keeps_upper_byte and image.format != "JPEG2000"
    tags = image.tag_v2
    bits, kinds = max(tags.get(BITS_PER_SAMPLE, (1,))), set(tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
    if bits <= 8:
        return kinds == {UNSIGNED}
    return tags.get(SAMPLES_PER_PIXEL, 1) == 1 and (bits == 16 or image.mode == "F") and NO_DATA not in tags


def _pick_bands(image, bands):
    if not bands:
        return image
    _check_bands(bands, len(image.getbands()))
    channels = [image.getchannel(band - 1) for band in bands]
    return Image.merge("RGB", channels) if len(channels) == 3 else channels[0]


def _shrink(image):
    """An image as RGB; a large JPEG is decoded at half, a quarter or an eighth of its size."""
    share = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if share < 1 and image.format == "JPEG":
        image.draft(None, (int(image.width * share), int(image.height * share)))
    rgb = to_rgb(image)
    share = (MAX_PIXELS / (rgb.width * rgb.height)) ** 0.5
    if share < 1:
        rgb.thumbnail((max(1, int(rgb.width * share)), max(1, int(rgb.height * share))), reducing_gap=2.0)
    return rgb


# Scenes: what rasterio reads ---------------------------------------------------------------------------------------


@contextmanager
def _open_scene(file):
    """A file opened by rasterio, alone: no neighbour of the file is looked at."""
    try:
        import rasterio
        from rasterio.io import MemoryFile
    except ImportError as error:
        raise ValueError("images of this kind are read by rasterio: pip install 'ieft[geo]'") from error
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what is wrong is raised, not printed too
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    options = {"driver": _driver(file), "sharing": False}
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_CACHEMAX=64, GDAL_PAM_ENABLED="NO"):
        if isinstance(file, bytes):
            with MemoryFile(file) as held, rasterio.open(held.name, **options) as scene:
                yield scene
        else:
            with rasterio.open(Path(file).resolve(), **options) as scene:
                yield scene


def _read_scene(file, bands):
    with _open_scene(file) as scene:
        _check_size(scene)
        pixels, palette = _read_bands(scene, _choose_bands(scene, bands))  # (N, H, W), N 1 or 3
    if palette is not None:
        return Image.fromarray(palette[pixels[0].filled(0)])
    if pixels.dtype == np.uint8:
        pixels = pixels.filled(0)  # no-data is black
    else:
        pixels = np.stack([stretch_to_bytes(band.astype(np.float64).filled(np.nan)) for band in pixels])
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")


def _read_bands(scene, chosen):
    """The chosen bands as a masked array, averaged where the scene is large; and its colours (V, 3) or None."""
    from rasterio.enums import ColorInterp, Resampling

    share = min(1.0, (MAX_PIXELS / (scene.width * scene.height)) ** 0.5)
    shape = (len(chosen), max(1, int(scene.height * share)), max(1, int(scene.width * share)))
    palette, how = None, Resampling.average
    if len(chosen) == 1 and scene.colorinterp[chosen[0] - 1] == ColorInterp.palette:
        colours = scene.colormap(chosen[0])
        palette = np.array([colours.get(value, (0, 0, 0))[:3] for value in range(max(colours) + 1)], dtype=np.uint8)
        how = Resampling.nearest
    pixels = scene.read(chosen, out_shape=shape, resampling=how, masked=True)
    return (np.ma.abs(pixels) if pixels.dtype.kind == "c" else pixels), palette


def _choose_bands(scene, bands):
    """Band numbers, from 1: those asked for, those said to be red, green and blue, or the only one or three.

    Raises:
        ValueError: where there is no such band, or a choice has to be made.
    """
    if bands:
        _check_bands(bands, scene.count)
        return list(bands)
    kinds = [kind.name for kind in scene.colorinterp]
    if {"red", "green", "blue"} <= set(kinds):
        return [kinds.index(name) + 1 for name in ("red", "green", "blue")]
    seen = [number for number, kind in enumerate(kinds, start=1) if kind != "alpha"]
    if len(seen) not in (1, 3):
        raise ValueError(f"it has {scene.count} bands: choose three, such as --bands 3,2,1, counted from 1")
    return seen


def _check_bands(bands, count):
    if max(bands) > count:
        raise ValueError(f"it has bands 1 to {count}; band {max(bands)} was asked for")


def _check_size(scene):
    """Refuse what cannot be read in bounded memory and time."""
    height, width = scene.block_shapes[0]
    block = height * width * scene.count * np.dtype(scene.dtypes[0]).itemsize
    if scene.width * scene.height > MAX_SCENE_PIXELS or block > MAX_BLOCK_BYTES:
        raise ValueError(
            f"{scene.width} x {scene.height} pixels in blocks of {width} x {height}, too large to be read safely, "
            "could be a decompression bomb: save it as a TIFF of tiles, or cut it"
        )


def _is_tiff(file):
    return _start(file).startswith(TIFF_STARTS)


def _driver(file):
    start = _start(file)
    driver = next((driver for magic, driver in DRIVERS.items() if start.startswith(magic)), None)
    if driver is None:
        raise ValueError("it is no image of a kind that is known")
    return driver


def _start(file):
    if isinstance(file, bytes):
        return file[:8]
    with open(file, "rb") as opened:
        return opened.read(8)


def _name(file):
    return f"An image of {len(file):,} bytes" if isinstance(file, bytes) else file
