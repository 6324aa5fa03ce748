"""Image files of an archive: finding them, describing them as index rows, and reading them again for a hit."""

import hashlib
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ieft.data.images import describe_picture, read_picture
from ieft.search.tiles import Scene, Window, cut_windows

GEOTIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp", *GEOTIFF_SUFFIXES)


class HitImages(Dataset):
    """The pictures of hits by row as the network reads them: (3, image_size, image_size) in [-1, 1]."""

    def __init__(self, hits, processor):
        self.hits, self.image_processor = hits, processor.image_processor

    def __len__(self):
        return len(self.hits)

    def __getitem__(self, row):
        square = self.image_processor.fit_square(read_hit(self.hits[row]))
        return torch.from_numpy(self.image_processor.scale_pixels(np.asarray(square)))


def read_hit(hit):
    """What a hit shows, PIL RGB: the whole image, or its tile, read by its window.

    Raises:
        FileNotFoundError, ValueError: for a file that is gone, or cannot be decoded.
    """
    bands = tuple(hit.get("bands") or ()) or None
    if not hit["tiling"] or not Path(hit["file"]).exists():
        return read_picture(hit["file"], bands=bands)
    with Scene(hit["file"], hit["limits"], bands=bands) as scene:
        return scene.read(Window(hit["col"], hit["row"], hit["tile_width"], hit["tile_height"]))


def find_images(archive):
    """Image files under a folder, in order; or the one file given.

    Raises:
        FileNotFoundError: where there is none.
    """
    archive = Path(archive)
    paths = sorted(archive.rglob("*")) if archive.is_dir() else [archive]
    found = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not found:
        raise FileNotFoundError(f"Images ({', '.join(IMAGE_SUFFIXES)}) expected at {archive}; there are none.")
    return found


def plan_tiles(file, tile, overlap):
    """The windows of an image that is to be cut; none where it stays whole."""
    if tile is None:
        return []
    with Scene(file) as scene:
        windows = cut_windows(scene.width, scene.height, tile=tile, overlap=overlap)
    return windows if len(windows) > 1 else []


def read_whole(file):
    """A row of the index for an image, and the image."""
    picture = read_picture(file)
    width, height, _ = describe_picture(file)  # as stored; the picture may be smaller
    row = _describe_file(file, width, height, Window(0, 0, width, height))
    if file.lower().endswith(GEOTIFF_SUFFIXES):
        with Scene(file) as scene:
            row |= scene.bounds(Window(0, 0, scene.width, scene.height))
    return row, picture


def read_tiles(file, windows):
    """A row of the index and the picture for each of some windows, read one at a time."""
    if windows:
        with Scene(file) as scene:
            for window in windows:
                row = _describe_file(file, scene.width, scene.height, window)
                yield row | scene.bounds(window) | {"limits": scene.limits}, scene.read(window)


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
