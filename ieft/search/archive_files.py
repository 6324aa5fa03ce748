"""Image files of an archive: finding them, describing them as index rows, and reading them again for a hit."""

import hashlib
import logging
import os
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ieft.data.images import describe_picture, parse_bands, read_picture
from ieft.search.geography import OWN_SIDES, PLACE_COLUMNS, locate, place_of_bounds, read_metadata
from ieft.search.tiles import Scene, Window, cut_windows

logger = logging.getLogger(__name__)

RASTER_SUFFIXES = (".jp2", ".tif", ".tiff")  # of formats that may have a georeference
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp", *RASTER_SUFFIXES)
# Metadata of macOS beside images: names like those of images, but no images.
NO_IMAGES, NO_FOLDER = "._", "__MACOSX"


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
        return read_picture(hit["file"], bands=bands)
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

    A link to a file that is gone counts as gone.
    """
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def find_images(archive):
    """Sorted image files below a folder, following links to files and folders; or the single given file.

    A linked file is listed under the name of the link. Each folder is searched once, however many links lead to it.

    Raises:
        FileNotFoundError: if there are none.
    """
    archive = Path(archive)
    paths = sorted(_walk(archive.resolve())) if archive.is_dir() else [archive]
    found = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not found:
        raise FileNotFoundError(f"Images ({', '.join(IMAGE_SUFFIXES)}) expected at {archive}; there are none.")
    return found


def _walk(archive):
    """All files below a folder; linked files under the names of their links."""
    folders, links, visited = [str(archive)], [], set()
    while folders or links:  # links last, so that a folder of the archive keeps its own name
        folder = (folders or links).pop()
        if os.path.realpath(folder) in visited:
            continue
        visited.add(os.path.realpath(folder))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
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
    picture = read_picture(file, bands=bands)
    width, height, _ = describe_picture(file)  # as stored; the image read may be smaller
    row = _describe_file(file, width, height, Window(0, 0, width, height))
    if not str(file).lower().endswith(RASTER_SUFFIXES):
        return row | read_metadata(file), picture
    with Scene(file, bands=bands) as scene:
        raster = scene.dataset
        place = _locate(scene, Window(0, 0, scene.width, scene.height), file)
        return row | read_metadata(file, raster) | place, picture


def read_tiles(file, windows, *, bands=None):
    """The index row and the image of each window, read one at a time."""
    if windows:
        with Scene(file, bands=bands) as scene:
            of_scene = read_metadata(file, scene.dataset) | {"limits": scene.limits}
            for window in windows:
                row = _describe_file(file, scene.width, scene.height, window)
                named = file if window is windows[0] else None  # one warning a scene
                yield row | of_scene | _locate(scene, window, named), scene.read(window)


def _locate(scene, window, file=None):
    return locate(scene.dataset, scene.as_stored(window), file) if scene.dataset is not None else {}


def place_again(row):
    """The columns of a row's place, for rows of earlier versions, which kept the raster's own coordinates in them.

    Of a file that is there the true outline is read; of others the envelope is known.
    """
    sides = [row[side] for side in ("west", "south", "east", "north")]
    place = dict.fromkeys(PLACE_COLUMNS) | {"crs": row["crs"]} | dict(zip(OWN_SIDES, sides, strict=True))
    window = Window(row["col"], row["row"], row["tile_width"], row["tile_height"])
    try:
        with Scene(row["file"]) as scene:
            place |= _locate(scene, window) or place_of_bounds(row["crs"], *sides)
    except (ImportError, OSError, ValueError):
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
