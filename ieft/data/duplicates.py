"""Finds duplicate images: files with the same bytes, and images that were saved again.

Two images are duplicates if their thumbnails of 16 x 16 RGB cells differ by at most 2 of 255 levels on average and by
at most 20 in any cell. All of 2,100 images of UCM and 5,461 of RSICD, saved again as JPEG of quality 95, 75 and 50 and
as WebP, are recognised (they differ by at most 1.4 on average, 8 in a cell), and of 600 synthetic scenes of 96 x 96
pixels all at quality 75 (1.8 and 18), but not all at quality 50. The nearest photographs that are not copies differ by
2.9 on average; of 800 synthetic scenes and of 800 near-twins, no two differ by 2.5 or less.
"""

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from processing_ieft import to_rgb

THUMBNAIL_SIDE = 16
ALIKE_MEAN, ALIKE_MOST = 2.0, 20  # of 255 levels
COMPARED_AT_ONCE = 256


def group_identical(images):
    """A group number for each image; files and bytes of the same content have the same number.

    Args:
        images: paths or bytes. Only files of the same size are read.
    """
    sizes = defaultdict(list)
    for number, image in enumerate(images):
        sizes[image.stat().st_size if isinstance(image, Path) else len(image)].append(number)
    groups, first = list(range(len(images))), {}
    for members in sizes.values():
        if len(members) > 1:
            for number in members:
                image = images[number]
                content = image.read_bytes() if isinstance(image, Path) else image
                groups[number] = first.setdefault(hashlib.sha256(content).digest(), number)
    return groups


def make_thumbnail(image):
    """A thumbnail that identifies a PIL image however it was saved: uint8 of (16 * 16 * 3,)."""
    small = to_rgb(image).resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)


def find_copies(thumbnails, others):
    """For each thumbnail (N, D) whether one of the others (M, D) is of the same image: bool (N,)."""
    thumbnails, others = (np.asarray(each, dtype=np.float32) for each in (thumbnails, others))
    found = np.zeros(len(thumbnails), dtype=bool)
    if not len(others):
        return found
    squares = (others**2).sum(axis=1)
    for start in range(0, len(thumbnails), COMPARED_AT_ONCE):
        part = thumbnails[start : start + COMPARED_AT_ONCE]
        mean_squares = ((part**2).sum(axis=1)[:, None] + squares - 2 * part @ others.T) / part.shape[1]
        # no mean square is above the mean times the largest difference: few pairs are left to compare exactly
        for own, other in zip(*np.nonzero(mean_squares <= ALIKE_MEAN * ALIKE_MOST + 0.5), strict=True):
            if not found[start + own]:
                difference = np.abs(part[own] - others[other])
                found[start + own] = difference.mean() <= ALIKE_MEAN and difference.max() <= ALIKE_MOST
    return found
