"""Reads images with GDAL for `ieft.data.images`: any bands, any bit depth, by window.

The format is recognised by the file's content, only the driver of that format may open it, and no other file is read:
some GDAL formats refer to other files, and GDAL would also read files beside the image as parts of it.
"""

import io
import logging
import warnings
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

import processing_ieft
from ieft.data.storage import RemoteFile
from processing_ieft import MOST_PARTLY_TRANSPARENT, ORIENTATION, STRETCH_PERCENTILES, UPRIGHT, check_bands

MAX_SCENE_PIXELS = 2**32
MAX_BLOCK_BYTES = 2**28  # a block of a TIFF has to be decoded as a whole
CACHE_MEGABYTES = 64
REDUCED = 1024  # longest side of the reduced image from which the stretch and the kind of an alpha band are derived
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# First bytes of a file -> GDAL driver.
DRIVERS = dict.fromkeys(TIFF_STARTS, "GTiff") | {
    b"\x89PNG": "PNG",
    b"\0\0\0\x0cjP": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
BY_WINDOW = ("GTiff", "JP2OpenJPEG")  # a PNG is always decoded whole
_numbers = count()


def open_lazily(file):
    """As `processing_ieft.open_lazily`, for a path, the bytes of a file, or a `RemoteFile`."""
    return processing_ieft.open_lazily(file.open() if isinstance(file, RemoteFile) else file)


def open_binary(file):
    """A file object of a path, the bytes of a file, or a `RemoteFile`."""
    if isinstance(file, RemoteFile):
        return file.open()
    return io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")


def is_tiff(file):
    """Whether a path, the bytes of a file, or a `RemoteFile`, is a TIFF by its first bytes."""
    return _start(file).startswith(TIFF_STARTS)


def has_raster_driver(file, *, windows=False):
    """Whether `Raster` can open a file, or with `windows` read it by window."""
    return _driver(file) in (BY_WINDOW if windows else DRIVERS.values())


class Raster:
    """A file opened by rasterio without any other files, as a context manager.

    Attributes:
        width, height: in pixels, of the upright image.
        dataset: the opened rasterio dataset, in the orientation of the file.
        orientation: as numbered by EXIF and TIFF; 1 is upright.
    """

    def __init__(self, file, bands=None, limits=None):
        """Open a path, the bytes of a file, or a `RemoteFile`.

        Args:
            bands: numbers, from 1, of three bands or one; with None, the bands that the file declares as red,
                green and blue, or all if there are one or three. They are chosen when pixels are read.
            limits: the stretch range, as in the property `limits`.

        Raises:
            ImportError: without rasterio.
            ValueError: if the file is of another kind, or cannot be read in bounded memory.
        """
        self.rasterio = _import_rasterio()
        driver = _driver(file)
        if driver is None:
            raise ValueError("it is not an image in a supported format and bit depth")
        self._memory = self.rasterio.io.MemoryFile(file) if isinstance(file, bytes) else None
        place, opener = self._memory.name if self._memory else file, None
        if isinstance(file, RemoteFile):
            place, opener = _opener_of(file)
        elif not self._memory:
            place = Path(file).resolve()
        with self._environment():
            self.dataset = self.rasterio.open(place, driver=driver, sharing=False, opener=opener)
        self.width, self.height = self.dataset.width, self.dataset.height
        self.orientation = _find_orientation(file)
        if self.orientation in SIDEWAYS:
            self.width, self.height = self.height, self.width
        self._bands, self._limits, self._chosen = bands, limits, None
        try:
            _check_size(self.dataset)
        except ValueError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.dataset.close()
        if self._memory:
            self._memory.close()

    def _environment(self):
        warnings.filterwarnings("ignore", category=self.rasterio.errors.NotGeoreferencedWarning)
        return self.rasterio.Env(
            GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_CACHEMAX=CACHE_MEGABYTES, GDAL_PAM_ENABLED="NO"
        )

    @property
    def bands(self):
        """Numbers, from 1, of the shown bands.

        Raises:
            ValueError: if there is no such band, or bands must be chosen by the user.
        """
        if self._chosen is None:
            self._chosen = self._choose_bands()
        return self._chosen

    @property
    def limits(self):
        """The stretch range: low and high of each shown band in turn, percentiles of the image at a smaller scale.
        None for bytes."""
        if self._limits is None and self.dataset.dtypes[self.bands[0] - 1] != "uint8":
            pixels, is_data = self._read(shape=self._reduced_shape(), how="nearest")
            self._limits = [float(limit) for band in pixels for limit in find_limits(band, is_data)]
        return self._limits

    def read(self, window=None, *, share=1.0):
        """Read the image, or a window of it, as PIL RGB; nodata, transparent and non-finite pixels are black.

        Args:
            window: (col, row, width, height) in pixels.
            share: scale factor of width and height, at most 1.
        """
        col, row, width, height = self.as_stored(*(window or (0, 0, self.width, self.height)))
        part = ((row, row + height), (col, col + width))
        shape = (max(1, int(height * share)), max(1, int(width * share)))
        palette = self._palette()
        pixels, is_data = self._read(part, shape, how="nearest" if palette is not None else "average")
        if palette is not None:
            pixels = palette[pixels[0].clip(0, len(palette) - 1)].transpose(2, 0, 1)
        elif self.limits is not None:
            limits = zip(self.limits[::2], self.limits[1::2], strict=True)
            pixels = np.stack([stretch(band, *each) for band, each in zip(pixels, limits, strict=True)])
        else:
            pixels = self._full_range(pixels)
        pixels = np.where(is_data, pixels, 0).astype(np.uint8)  # (1 or 3, H, W)
        image = Image.fromarray(np.broadcast_to(pixels, (3, *is_data.shape)).transpose(1, 2, 0).copy())
        return image.transpose(UPRIGHT[self.orientation]) if self.orientation in UPRIGHT else image

    def as_stored(self, col, row, width, height):
        """A window of the upright image in the file's own columns and rows."""
        if self.orientation in SIDEWAYS:
            col, row, width, height = row, col, height, width
        if self.orientation in (2, 3, 7, 8):
            col = self.dataset.width - col - width
        if self.orientation in (3, 4, 6, 7):
            row = self.dataset.height - row - height
        return col, row, width, height

    def _read(self, part=None, shape=None, how="average"):
        """Bands (1 or 3, h, w), and a mask of pixels with data (h, w)."""
        resampling = self.rasterio.enums.Resampling
        with self._environment():
            options = {"window": part, "out_shape": shape}
            pixels = self.dataset.read(self.bands, resampling=resampling[how], masked=True, **options)
            pixels = np.ma.abs(pixels) if pixels.dtype.kind == "c" else pixels
            is_data = (
                ~np.ma.getmaskarray(pixels).all(axis=0) if self._has_no_data() else np.ones(pixels.shape[1:], bool)
            )
            if self._mask_band() is not None:
                mask = self.dataset.read(self._mask_band(), resampling=resampling.nearest, **options)
                is_data = is_data & (mask > 0)
            elif self._has_mask():
                is_data = is_data & (self.dataset.read_masks(self.bands[0], **options) > 0)
        return pixels.data, is_data

    def _has_no_data(self):
        return any(self.dataset.nodatavals[band - 1] is not None for band in self.bands)

    def _has_mask(self):
        flags = self.dataset.mask_flag_enums[self.bands[0] - 1]
        mask_flags = self.rasterio.enums.MaskFlags
        return mask_flags.per_dataset in flags and mask_flags.alpha not in flags

    def _mask_band(self):
        """The number of the alpha band, if there is one that is a transparency mask."""
        kinds = [kind.name for kind in self.dataset.colorinterp]
        return kinds.index("alpha") + 1 if "alpha" in kinds and self._alpha_is_mask(kinds.index("alpha") + 1) else None

    def _alpha_is_mask(self, band):
        """Whether an alpha band is a mask. By default, writers declare any fourth band as alpha."""
        if not hasattr(self, "_is_mask"):
            with self._environment():
                levels = self.dataset.read(band, out_shape=self._reduced_shape())
            partly = (levels != 0) & (levels != levels.max())
            self._is_mask = bool(partly.mean() <= MOST_PARTLY_TRANSPARENT)
        return self._is_mask

    def _choose_bands(self):
        if self._bands:
            check_bands(self._bands, self.dataset.count)
            return list(self._bands)
        kinds = [kind.name for kind in self.dataset.colorinterp]
        if "alpha" in kinds and not self._alpha_is_mask(kinds.index("alpha") + 1):
            raise ValueError(
                f"band {kinds.index('alpha') + 1} of {len(kinds)} is declared as alpha but holds image data, such as "
                "near infrared: choose three bands, such as --bands 1,2,3, counted from 1"
            )
        if {"red", "green", "blue"} <= set(kinds):
            return [kinds.index(name) + 1 for name in ("red", "green", "blue")]
        seen = [number for number, kind in enumerate(kinds, start=1) if kind != "alpha"]
        if len(seen) not in (1, 3):
            raise ValueError(f"it has {self.dataset.count} bands: choose three, such as --bands 3,2,1, counted from 1")
        return seen

    def _palette(self):
        """Colours by level (V, 3), or None."""
        if len(self.bands) != 1 or self.dataset.colorinterp[self.bands[0] - 1].name != "palette":
            return None
        colours = self.dataset.colormap(self.bands[0])
        return np.array([colours.get(level, (0, 0, 0))[:3] for level in range(max(colours) + 1)], np.uint8)

    def _full_range(self, pixels):
        """Scale values of fewer than 8 bits to bytes, and invert those with white as 0."""
        tags = self.dataset.tags(self.bands[0], ns="IMAGE_STRUCTURE") | self.dataset.tags(ns="IMAGE_STRUCTURE")
        bits = int(tags.get("NBITS", 8))
        if bits < 8:
            pixels = (pixels.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
        return 255 - pixels if tags.get("MINISWHITE") == "YES" else pixels

    def _reduced_shape(self):
        width, height = self.dataset.width, self.dataset.height
        shrink = max(1, max(width, height) / REDUCED)
        return max(1, int(height / shrink)), max(1, int(width / shrink))


def find_limits(band, is_data):
    """The 2nd and 98th percentile of a band's finite pixels with data; (0, 0) if there are none."""
    known = band[is_data & np.isfinite(band)]
    if not known.size:
        return 0, 0
    low, high = np.percentile(known.astype(np.float64), STRETCH_PERCENTILES)
    return (low, high) if high > low else (known.min(), known.max())


def stretch(band, low, high):
    """Stretch a band from [low, high] to uint8. If equal, non-zero finite pixels are mid-grey, others black."""
    finite = np.isfinite(band)
    if high <= low:
        return np.where(finite & (band != 0), 128, 0).astype(np.uint8)
    scaled = (np.where(finite, band, low).astype(np.float64) - low) / (high - low)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def _check_size(dataset):
    """Raise a ValueError for images that cannot be read in bounded memory and time."""
    height, width = dataset.block_shapes[0]
    kind = dataset.dtypes[0].replace("complex_int16", "int32")  # two numbers of 16 bits, a type that numpy lacks
    block = height * width * dataset.count * np.dtype(kind).itemsize
    if dataset.width * dataset.height > MAX_SCENE_PIXELS or block > MAX_BLOCK_BYTES:
        raise ValueError(
            f"{dataset.width} x {dataset.height} pixels in blocks of {width} x {height}, too large to be read safely, "
            "could be a decompression bomb: save it as a TIFF of tiles, or cut it"
        )


def _import_rasterio():
    try:
        import rasterio
        import rasterio.enums
        import rasterio.errors
        import rasterio.io
    except ImportError as error:
        raise ImportError("images of this kind need rasterio: pip install 'ieft[geo]'") from error
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # errors are raised; they need not be printed too
    return rasterio


def _find_orientation(file):
    """How the file says that it has to be turned, which GDAL leaves to others; Pillow opens fewer TIFFs than it."""
    try:
        if not is_tiff(file):
            with open_lazily(file) as image:
                return image.getexif().get(ORIENTATION, 1)
        with open_binary(file) as opened:
            start = opened.read(8)
            tags = ImageFileDirectory_v2(start + opened.read(8) if 43 in start[2:4] else start)
            opened.seek(tags.next)
            tags.load(opened)
            return tags.get(ORIENTATION, 1)
    except Exception:  # of damaged tags, Pillow raises anything: the pixels are good all the same
        return 1


def _driver(file):
    start = _start(file)
    return next((driver for magic, driver in DRIVERS.items() if start.startswith(magic)), None)


def _start(file):
    with open_binary(file) as opened:
        return opened.read(8)


def _opener_of(file):
    """A name for a remote file, which is no address that GDAL would open itself, and what opens only that one."""
    name = f"remote-{next(_numbers)}"

    def open_named(path, mode="rb", **options):
        if Path(path).name != name or mode not in ("r", "rb"):  # such as of files beside it
            raise FileNotFoundError(path)
        return file.open(quiet=True)  # GDAL cannot pass errors on

    return name, open_named
