"""Image files of an archive: finding them, describing them as index rows, and reading them again for a hit.

A file is named by its path, or by its address in other storage, such as `s3://bucket/key` (see `ieft.data.storage`).
"""

import hashlib
import logging
import os
import stat
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ieft.data.images import describe_image, parse_bands, read_image
from ieft.data.rasters import Raster, has_raster_driver, open_lazily
from ieft.data.storage import (
    RemoteFile,
    are_missing,
    check_state,
    in_parallel,
    is_address,
    is_missing,
    list_files,
    suffix_of,
)
from ieft.search.geography import (
    OWN_SIDES,
    PLACE_COLUMNS,
    locate,
    place_of_bounds,
    read_metadata,
    warn_unplaced,
)
from ieft.search.tiles import Scene, Window, cut_windows

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp", ".jp2", ".tif", ".tiff")
GEO_TAGS = {33550, 33922, 34264}  # of TIFF: pixel scale, control points, matrix
# Metadata of macOS beside images: names like those of images, but no images.
NO_IMAGES, NO_FOLDER = "._", "__MACOSX"
AHEAD = 2**22  # bytes of a remote file that are read further at once, where all of it is going to be read


class UnreadableHit(ValueError):
    """The file of a hit is gone or damaged.

    Attributes:
        file: its path.
    """

    def __init__(self, file, why):
        super().__init__(why)
        self.file = file


class HitImages(Dataset):
    """The images of hits as input of the network, by row: (3, image_size, image_size) in [-1, 1]."""

    def __init__(self, hits, processor):
        self.hits, self.image_processor = hits, processor.image_processor

    def __len__(self):
        return len(self.hits)

    def __getitem__(self, row):
        try:
            picture = read_hit(self.hits[row])
        except (OSError, ValueError) as error:
            raise UnreadableHit(self.hits[row]["file"], str(error)) from error
        square = self.image_processor.fit_square(picture)
        return torch.from_numpy(self.image_processor.scale_pixels(np.asarray(square)))


def read_hit(hit):
    """Read the image of a hit as PIL RGB: the whole image, or its tile, read by window.

    Raises:
        FileNotFoundError, ValueError: if the file is gone or cannot be decoded.
    """
    bands = parse_bands(hit.get("bands") or None)
    if not hit["tiling"] or not Path(hit["file"]).exists():
        return read_image(hit["file"], bands=bands)
    with Scene(hit["file"], hit["limits"], bands=bands) as scene:
        return scene.read(Window(hit["col"], hit["row"], hit["tile_width"], hit["tile_height"]))


def read_hits(hits):
    """Pairs of hit and image; hits that cannot be read are skipped, with a warning for each."""
    pairs = []
    for hit in hits:
        try:
            pairs.append((hit, read_hit(hit)))
        except (OSError, ValueError) as error:
            logger.warning("A hit is skipped: %s", error)
    return pairs


def is_gone(file):
    """Whether a file certainly does not exist. A file that is inaccessible (permissions, network) is not gone.

    A link to a file that is gone counts as gone, and so does a file in whose place there is a folder.
    """
    try:
        return stat.S_ISDIR(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False


def find_images(archive, unreadable=None):
    """Sorted image files below a folder, following links to files and folders; or the single given file.

    A linked file is listed under the name of the link. Each folder is searched once, however many links lead to it.

    Args:
        unreadable: a dict; folders that cannot be searched, and links that lead nowhere, are added with the reason.

    Raises:
        FileNotFoundError: if there are none.
        OSError: without `unreadable`, if a folder cannot be searched.
    """
    archive = Path(archive)
    if not archive.exists():
        raise FileNotFoundError(f"A folder of images or an image expected; there is no {archive}.")
    paths = sorted(_walk(archive.resolve(), unreadable)) if archive.is_dir() else [archive]
    found = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in found if unreadable is not None else ():
        if path.is_symlink() and not path.exists():
            unreadable[str(path)] = "it is a link to a file that is not there"
    found = [path for path in found if path.is_file()]
    if not found:
        what = "".join(f" Left out: {place}: {why}." for place, why in list((unreadable or {}).items())[:1])
        raise FileNotFoundError(f"Images ({', '.join(IMAGE_SUFFIXES)}) expected at {archive}; there are none.{what}")
    return found


def _walk(archive, unreadable):
    """All files below a folder; linked files under the names of their links."""
    folders, links, visited = [str(archive)], [], set()
    while folders or links:  # links last, so that a folder of the archive keeps its own name
        folder = (folders or links).pop()
        if os.path.realpath(folder) in visited:
            continue
        visited.add(os.path.realpath(folder))
        try:
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if unreadable is None:
                raise
            unreadable[folder] = f"this folder cannot be searched: {error.strerror}"
            continue
        for entry in entries:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not entry.name.startswith(NO_IMAGES) and NO_FOLDER not in Path(folder).parts:
                yield Path(entry.path)


def plan_tiles(file, tile, overlap, *, bands=None):
    """The windows of the tiles of an image; none if it is kept whole, as without `tile`."""
    if not tile:
        return []
    with Scene(file, bands=bands) as scene:
        windows = cut_windows(scene.width, scene.height, tile=tile, overlap=overlap)
    return windows if len(windows) > 1 else []


def read_whole(file, *, bands=None):
    """The index row of a whole image, and the image."""
    picture = read_image(file, bands=bands)
    width, height, _ = describe_image(file)  # as stored; the image read may be smaller
    row = _describe_file(file, width, height, Window(0, 0, width, height))
    return row | next(read_place_and_time(file)), picture


def read_tiles(file, windows, *, bands=None):
    """The index row and the image of each window, read one at a time."""
    if windows:
        with Scene(file, bands=bands) as scene:
            for window, place in zip(windows, read_place_and_time(file, windows), strict=True):
                row = _describe_file(file, scene.width, scene.height, window) | {"limits": scene.limits}
                yield row | place, scene.read(window)


def read_place_and_time(file, windows=()):
    """Yield the columns of place and time of each window of an image, or of the whole; empty if nothing is known.

    An image that GDAL cannot open has no place, which is warned of once.
    """
    raster = _open_raster(file)
    if raster is None:
        yield from [read_metadata(file)] * max(1, len(windows))
        return
    with raster:
        of_scene = read_metadata(file, raster.dataset)
        for number, window in enumerate(windows or [Window(0, 0, raster.width, raster.height)]):
            stored = Window(*raster.as_stored(*window))
            yield of_scene | locate(raster.dataset, stored, None if number else file)  # one warning a scene


def _open_raster(file):
    """A `Raster` for a file of a format that may have a georeference, or None."""
    try:
        return Raster(file) if has_raster_driver(file, windows=True) else None
    except ImportError:
        _warn_without_rasterio(file)
    except Exception as error:  # GDAL's errors are of a private kind; the pixels are read elsewhere
        warn_unplaced(file, error)
    return None


@cache
def _warn_once(message):
    logger.warning(message)


def _warn_without_rasterio(file):
    try:
        with open_lazily(file) as image:
            is_placed = not GEO_TAGS.isdisjoint(image.tag_v2)
    except (AttributeError, OSError, ValueError):
        return
    if is_placed:
        _warn_once(
            "Places of GeoTIFFs cannot be read without rasterio: pip install 'ieft[geo]', and index again to add them."
        )


def place_again(row):
    """The columns of a row's place, for rows of earlier versions, which kept the raster's own coordinates in them.

    Of a file that is there the true outline is read; of others the envelope is known.
    """
    sides = [row[side] for side in ("west", "south", "east", "north")]
    place = dict.fromkeys(PLACE_COLUMNS) | {"crs": row["crs"]} | dict(zip(OWN_SIDES, sides, strict=True))
    window = Window(row["col"], row["row"], row["tile_width"], row["tile_height"])
    try:
        with Raster(row["file"]) as raster:
            stored = Window(*raster.as_stored(*window))
            place |= locate(raster.dataset, stored) or place_of_bounds(row["crs"], *sides)
    except Exception:  # GDAL's errors are of a private kind
        place |= place_of_bounds(row["crs"], *sides)
    return {name: row[name] for name in ("file", "col", "row")} | place


def _describe_file(file, width, height, window):
    state = Path(file).stat()
    changed = datetime.fromtimestamp(state.st_mtime, timezone.utc)
    return {
        "file": file, "bytes": state.st_size, "time": changed, "width": width, "height": height, "col": window.col,
        "row": window.row, "tile_width": window.width, "tile_height": window.height,
    }  # fmt: skip


def digest_file(file):
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
