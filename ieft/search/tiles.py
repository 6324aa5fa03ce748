"""Overlapping tiles of a large scene."""

from ieft.data.images import Scene, Window


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


__all__ = ["Scene", "Window", "cut_windows"]
