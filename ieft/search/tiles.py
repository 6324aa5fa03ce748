"""A large scene as overlapping tiles, each read by its window: the whole picture never lies in memory.

In: an image file of any format that GDAL reads (`pip install 'ieft[geo]'`). Out: windows, tiles as PIL RGB, their
bounds. It knows nothing of networks or indexes.

GeoTIFF, cloud-optimised or tiled ones above all, is read by window; JPEG and PNG are decoded row by row. Bands that
are not bytes are stretched between the same limits in every tile of a scene, percentiles of a reduced reading of it.
"""

import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from processing_ieft import STRETCH_PERCENTILES

GDAL_CACHE = 64  # megabytes
REDUCED = 1024  # longest side of the reading that percentiles are taken from


class Window(NamedTuple):
    """A part of a scene, in pixels from its upper left corner."""

    col: int
    row: int
    width: int
    height: int


def cut_windows(width, height, *, tile, overlap):
    """Windows of `tile` by `tile` that cover a scene, row by row; the last ones are moved back to end at its edge.

    Args:
        overlap: the part of a tile that its neighbour shows too, from 0 to below 1.

    Raises:
        ValueError: for a tile below one pixel, and an overlap that leaves no step.
    """
    if tile < 1 or not 0 <= overlap < 1:
        raise ValueError(f"tile from 1 pixel and overlap from 0 to below 1 expected; got {tile} and {overlap}.")
    step = max(1, round(tile * (1 - overlap)))
    cols, rows = (
        [*range(0, length - tile, step), length - tile] if length > tile else [0] for length in (width, height)
    )
    return [Window(col, row, min(tile, width), min(tile, height)) for row in rows for col in cols]


class Scene:
    """An open image file, for `with`; `width` and `height` in pixels."""

    def __init__(self, file, limits=None):
        """`limits` from an earlier opening spare the reduced reading.

        Raises:
            ImportError: without rasterio.
            ValueError: for a file that GDAL cannot read.
        """
        rasterio = import_rasterio()
        self.environment = rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE)
        self.file = file
        with self.environment, warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            try:
                self.dataset = rasterio.open(file)
            except rasterio.errors.RasterioIOError as error:
                raise ValueError(f"{file} cannot be read as an image: {error}") from error
        self.width, self.height = self.dataset.width, self.dataset.height
        self.bands = [1, 2, 3] if self.dataset.count >= 3 else [1]
        self._limits = limits

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.dataset.close()

    @property
    def limits(self):
        """Low and high of each band that is shown, one after the other; None where they are bytes."""
        if self._limits is None and self.dataset.dtypes[0] != "uint8":
            self._limits = self._find_limits()
        return self._limits

    def read(self, window):
        """A window as PIL RGB; what is marked as no data, transparent or not finite is black.

        Raises:
            ValueError: for pixels that are damaged.
        """
        rows, cols = (window.row, window.row + window.height), (window.col, window.col + window.width)
        pixels, is_data = self._read_bands(window=(rows, cols))
        if self.limits is not None:
            pixels = np.stack([stretch(band, *self.limits[2 * row : 2 * row + 2]) for row, band in enumerate(pixels)])
        elif self.dataset.colorinterp[0].name == "palette":
            palette = self.dataset.colormap(1)
            colours = np.array([palette.get(level, (0, 0, 0))[:3] for level in range(256)], np.uint8)
            pixels = colours[pixels[0]].transpose(2, 0, 1)
        pixels = np.where(is_data, pixels, 0)  # (1 or 3, H, W)
        return Image.fromarray(np.broadcast_to(pixels, (3, *is_data.shape)).transpose(1, 2, 0).copy())

    def bounds(self, window):
        """`west`, `south`, `east`, `north` in the scene's own coordinates, and `crs`; nothing without any."""
        if self.dataset.crs is None:
            return {}
        corners = [(window.col + right * window.width, window.row + down * window.height)
                   for right in (0, 1) for down in (0, 1)]  # fmt: skip
        a, b, c, d, e, f, *_ = self.dataset.transform
        xs, ys = ([x * col + y * row + start for col, row in corners] for x, y, start in ((a, b, c), (d, e, f)))
        return {
            "west": min(xs), "south": min(ys), "east": max(xs), "north": max(ys), "crs": self.dataset.crs.to_string()
        }  # fmt: skip

    def _read_bands(self, **where):
        """Bands (1 or 3, H, W), and where they hold data (H, W)."""
        from rasterio.errors import RasterioIOError

        try:
            with self.environment:
                pixels = self.dataset.read(self.bands, **where)
                return pixels, self.dataset.dataset_mask(**where) > 0
        except RasterioIOError as error:
            raise ValueError(f"{self.file} cannot be read as an image: {error}") from error

    def _find_limits(self):
        shrink = max(1, max(self.width, self.height) / REDUCED)
        shape = (max(1, int(self.height / shrink)), max(1, int(self.width / shrink)))
        pixels, is_data = self._read_bands(out_shape=shape)
        return [float(limit) for band in pixels for limit in find_limits(band, is_data)]


def find_limits(band, is_data):
    """The 2nd and 98th percentile of a band's finite pixels that hold data; (0, 0) where there are none."""
    known = band[is_data & np.isfinite(band)]
    if not known.size:
        return 0, 0
    low, high = np.percentile(known, STRETCH_PERCENTILES)
    return (low, high) if high > low else (known.min(), known.max())


def stretch(band, low, high):
    """A band between its limits as uint8; mid-grey where they are equal, black where it is not finite."""
    finite = np.isfinite(band)
    if high <= low:
        return np.where(finite, 128, 0).astype(np.uint8)
    scaled = (np.where(finite, band, low).astype(np.float64) - low) / (high - low)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def import_rasterio():
    try:
        import rasterio
        import rasterio.errors
    except ImportError as error:
        raise ImportError("Tiles and GeoTIFF need rasterio: pip install 'ieft[geo]'.") from error
    return rasterio


__all__ = ["Scene", "Window", "cut_windows", "find_limits", "import_rasterio", "stretch"]
