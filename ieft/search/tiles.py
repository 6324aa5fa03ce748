"""Overlapping tiles of a large scene."""

from ieft.data.images import Scene, Window


def cut_windows(width, height, *, tile, overlap):
    """Windows of `tile` x `tile` pixels that cover a scene, row by row; the last ones are moved back to the edge.

    Args:
        overlap: the fraction of a tile that it shares with the next one, at least 0 and below 1.

    Raises:
        ValueError: if `tile` is below one pixel, or `overlap` is out of range.
    """
    if tile < 1 or not 0 <= overlap < 1:
        raise ValueError(f"tile from 1 pixel and overlap from 0 to below 1 expected; got {tile} and {overlap}.")
    step = max(1, round(tile * (1 - overlap)))
    cols, rows = (
        [*range(0, length - tile, step), length - tile] if length > tile else [0] for length in (width, height)
    )
    return [Window(col, row, min(tile, width), min(tile, height)) for row in rows for col in cols]


__all__ = ["Scene", "Window", "cut_windows"]
