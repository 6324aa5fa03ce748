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
from typing import NamedTuple
from urllib.request import url2pathname

import numpy as np
import torch
from torch.utils.data import Dataset

from ieft.data.images import describe_image, parse_bands, read_image
from ieft.data.rasters import Raster, has_raster_driver, open_binary, open_lazily
from ieft.data.storage import (
    RemoteFile,
    check_state,
    find_missing,
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
    metadata_of,
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
        self._squares = {}
        if any(is_address(hit["file"]) for hit in hits):  # storage answers several requests at once
            self._squares = dict(enumerate(in_parallel(self._read_square, hits)))

    def __len__(self):
        return len(self.hits)

    def __getitem__(self, row):
        square = self._squares[row] if self._squares else self._read_square(self.hits[row])
        return torch.from_numpy(self.image_processor.scale_pixels(np.asarray(square)))

    def _read_square(self, hit):
        try:
            return self.image_processor.fit_square(read_hit(hit))
        except (OSError, ValueError) as error:
            raise UnreadableHit(hit["file"], str(error)) from error


def read_hit(hit):
    """Read the image of a hit as PIL RGB: the whole image, or its tile, read by window.

    Raises:
        OSError, ValueError: if the file is gone, cannot be reached or cannot be decoded.
    """
    file, bands = open_file(hit["file"]), parse_bands(hit.get("bands") or None)
    if not hit["tiling"] or not isinstance(file, RemoteFile) and not Path(file).exists():
        return read_image(file, bands=bands)
    with Scene(file, hit["limits"], bands=bands) as scene:
        return scene.read(Window(hit["col"], hit["row"], hit["tile_width"], hit["tile_height"]))


def read_hits(hits):
    """Pairs of hit and image; hits that cannot be read are skipped, with a warning for each."""
    is_remote = any(is_address(hit["file"]) for hit in hits)
    images = in_parallel(_read_or_warn, hits) if is_remote else map(_read_or_warn, hits)
    return [(hit, image) for hit, image in zip(hits, images, strict=True) if image is not None]


def _read_or_warn(hit):
    try:
        return read_hit(hit)
    except (OSError, ValueError) as error:
        logger.warning("A hit is skipped: %s", error)


def open_file(file, *, ahead=0):
    """What the image reader takes: a `RemoteFile` for an address, with `ahead` as there; a path as it is."""
    return RemoteFile(file, ahead=ahead) if is_address(file) else file


def check_was_read(file):
    """Raise the error of a remote file of which something could not be read, which its decoder may have swallowed."""
    if isinstance(file, RemoteFile) and file.error is not None:
        raise file.error


def is_gone(file):
    """Whether a file certainly does not exist. A file that is inaccessible (permissions, network) is not gone.

    A link to a file that is gone counts as gone, and so does a file in whose place there is a folder.
    """
    if is_address(file):
        try:
            return is_missing(file)
        except ConnectionError:
            return False
    try:
        return stat.S_ISDIR(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False


def find_gone(files, *, root=""):
    """The set of those files that are gone, as `is_gone`.

    Args:
        root: the folder or address of the archive, which is listed if it is in other storage.

    Raises:
        ConnectionError: if other storage cannot be reached.
    """
    remote = [file for file in files if is_address(file)]
    return {file for file in files if not is_address(file) and is_gone(file)} | find_missing(remote, below=root)


def size_of(file):
    """The size of a file in bytes; None if it cannot be told."""
    try:
        return check_state(file).size if is_address(file) else os.stat(file).st_size
    except ConnectionError:
        raise
    except (OSError, ValueError):
        return None


def sizes_of(files):
    """`size_of` of each file, in order; several requests at once to other storage."""
    return in_parallel(size_of, files) if any(map(is_address, files)) else [size_of(file) for file in files]


def normalize_root(folder):
    """A folder or an address in the form in which an index stores it."""
    return folder.rstrip("/") if is_address(str(folder)) else os.path.realpath(_without_scheme(folder))


def is_outside(name):
    """Whether a file's name in an index is a whole path or address, and not relative to the root."""
    return is_address(name) or os.path.isabs(name)


def root_of(archive):
    """The archive if it is a folder, which can be the root of an index; None for a single file or a list of files."""
    if is_address(archive := _without_scheme(archive)):
        return archive if suffix_of(archive) not in IMAGE_SUFFIXES else None
    return archive if Path(archive).is_dir() else None


def is_there(root):
    """Whether the root of an archive exists; assumed of other storage, where folders do not exist by themselves."""
    return is_address(root) or os.path.isdir(root)


def _without_scheme(place):
    """A path without `file://` before it; any other place as a string."""
    place = os.fspath(place)
    return url2pathname(place[len("file://") :]) if place.lower().startswith("file://") else place


def find_images(archive, unreadable=None):
    """Sorted image files below a folder, following links to files and folders; or the single given file.

    An address of other storage is searched as a folder, or taken as a file if it ends like an image. A text file
    (.txt) holds a path or an address in each line. A linked file is listed under the name of the link. Each folder is
    searched once, however many links lead to it.

    Args:
        unreadable: a dict; folders that cannot be searched, and links that lead nowhere, are added with the reason.

    Raises:
        FileNotFoundError: if there are none.
        OSError: if other storage cannot be reached; without `unreadable`, if a folder cannot be searched.
    """
    archive = _without_scheme(archive)
    if is_address(archive):
        return _find_remote(archive, unreadable)
    archive = Path(archive)
    if archive.suffix.lower() == ".txt" and archive.is_file():
        return _read_list(archive)
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


def _find_remote(archive, unreadable):
    if suffix_of(archive) in IMAGE_SUFFIXES:
        check_state(archive)
        return [archive]
    files = list_files(archive, unreadable)
    found = [file for file in files if suffix_of(file) in IMAGE_SUFFIXES and not _is_no_image(file)]
    if not found:
        raise FileNotFoundError(
            f"Images ({', '.join(IMAGE_SUFFIXES)}) expected at {archive}; among its {len(files):,} files are none."
        )
    return found


def _is_no_image(address):
    *folders, name = address.split("/")
    return name.startswith(NO_IMAGES) or NO_FOLDER in folders


def _read_list(file):
    """The files that a text file lists, one in a line; relative paths are relative to it."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    found = [line if is_address(line) else file.parent / _without_scheme(line) for line in lines if line]
    if not found:
        raise FileNotFoundError(f"Paths or addresses of images expected in {file}, one in each line; it has none.")
    return list(dict.fromkeys(found))


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
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself
                if unreadable is None:
                    raise
                unreadable[entry.path] = f"this link cannot be followed: {error.strerror}"
                continue
            if is_folder:
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not entry.name.startswith(NO_IMAGES) and NO_FOLDER not in Path(folder).parts:
                yield Path(entry.path)


class TilePlan(NamedTuple):
    """How an image is cut.

    Attributes:
        windows: of its tiles; none if it is kept whole.
        by_window: whether a part can be read without decoding the rest.
    """

    windows: list
    by_window: bool = False


def plan_tiles(file, tile, overlap, *, bands=None):
    """The `TilePlan` of an image; without `tile` it is kept whole."""
    if not tile:
        return TilePlan([])
    with Scene(open_file(file), bands=bands) as scene:
        windows = cut_windows(scene.width, scene.height, tile=tile, overlap=overlap)
        return TilePlan(windows, scene.by_window) if len(windows) > 1 else TilePlan([])


def find_limits(file, *, bands=None):
    """The stretch range of all tiles of a scene, as `Scene` takes it."""
    with Scene(open_file(file), bands=bands) as scene:
        return scene.limits


def read_whole(file, *, bands=None):
    """The index row of a whole image, and the image."""
    file, found = open_file(file, ahead=AHEAD), []

    def describe(width, height, image):
        if not has_raster_driver(file, windows=True):  # those may have a georeference
            found.append((width, height, metadata_of(image)))

    picture = read_image(file, bands=bands, describe=describe)
    # As stored; the image read may be smaller.
    width, height, place = found[0] if found else (*describe_image(file)[:2], next(read_place_and_time(file)))
    check_was_read(file)
    return _describe_file(file, width, height, Window(0, 0, width, height)) | place, picture


def read_tiles(file, windows, *, bands=None, limits=None, warn=True):
    """The index row and the image of each window, read one at a time.

    Args:
        limits: the stretch range, as from `find_limits`, which None finds here.
        warn: whether to warn of a scene without a place, as for the first of its tiles.
    """
    file = open_file(file, ahead=AHEAD)
    if windows:
        with Scene(file, limits, bands=bands) as scene:
            for window, place in zip(windows, read_place_and_time(file, windows, warn=warn), strict=True):
                row = _describe_file(file, scene.width, scene.height, window) | {"limits": scene.limits}
                yield row | place, scene.read(window)


def read_place_and_time(file, windows=(), *, warn=True):
    """Yield the columns of place and time of each window of an image, or of the whole; empty if nothing is known.

    An image that GDAL cannot open has no place, which is warned of once.

    Args:
        file: a path, an address, or a `RemoteFile`.
    """
    file = open_file(file)
    raster = _open_raster(file, warn)
    check_was_read(file)
    if raster is None:
        metadata = read_metadata(file)
        check_was_read(file)
        yield from [metadata] * max(1, len(windows))
        return
    with raster:
        of_scene = read_metadata(file, raster.dataset)
        check_was_read(file)
        warned = file if warn else None  # once a scene
        for number, window in enumerate(windows or [Window(0, 0, raster.width, raster.height)]):
            stored = Window(*raster.as_stored(*window))
            yield of_scene | locate(raster.dataset, stored, None if number else warned)


def _open_raster(file, warn):
    """A `Raster` for a file of a format that may have a georeference, or None."""
    try:
        return Raster(file) if has_raster_driver(file, windows=True) else None
    except ImportError:
        _warn_without_rasterio(file)
    except Exception as error:  # GDAL's errors are of a private kind; the pixels are read elsewhere
        warn_unplaced(file if warn else None, error)
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
        with Raster(open_file(row["file"])) as raster:
            stored = Window(*raster.as_stored(*window))
            place |= locate(raster.dataset, stored) or place_of_bounds(row["crs"], *sides)
    except Exception:  # GDAL's errors are of a private kind
        place |= place_of_bounds(row["crs"], *sides)
    return {name: row[name] for name in ("file", "col", "row")} | place


def _describe_file(file, width, height, window):
    if isinstance(file, RemoteFile):
        size, changed, _ = file.state
    else:
        state = Path(file).stat()
        size, changed = state.st_size, datetime.fromtimestamp(state.st_mtime, timezone.utc)
    return {
        "file": str(file), "bytes": size, "time": changed, "width": width, "height": height, "col": window.col,
        "row": window.row, "tile_width": window.width, "tile_height": window.height,
    }  # fmt: skip


def digest_file(file):
    """SHA-256 of a file's bytes, in hexadecimal digits; of what its storage tells of its version for an address.

    Only a remote file of a storage that tells nothing is read.
    """
    file = open_file(file, ahead=AHEAD)
    if isinstance(file, RemoteFile) and file.state.version:
        return file.state.version
    digest = hashlib.sha256()
    with open_binary(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
