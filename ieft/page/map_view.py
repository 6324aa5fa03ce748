"""What the map of the search page shows: outlines of hits, and the part of the world around them.

Longitudes go on beyond 180 degrees where the view crosses the antimeridian, so that what lies together is drawn
together: an outline that is stored as two parts, cut there, is one again.
"""

import json
import math

import numpy as np

from ieft.search.geography import SIDES

MAP_EDGE = 85.05  # degrees north and south, where a map in Mercator's projection ends


def view_around(boxes):
    """The narrowest view of the world that holds all boxes.

    Args:
        boxes: (N, 4) west, south, east, north in degrees, west above east across the antimeridian; N may be 0.

    Returns:
        list: west, south, east, north, of which east is above 180 where the view crosses the antimeridian; None
        without a box.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    if not len(boxes):
        return None
    west, south, east, north = boxes.T
    across = west > east
    starts = np.concatenate([west, np.full(across.sum(), -180.0)])
    ends = np.concatenate([np.where(across, 180.0, east), east[across]])
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    gaps = np.append(starts[1:] - ends[:-1], starts[0] + 360 - ends[-1])  # the last one crosses the antimeridian
    widest = len(gaps) - 1 if gaps[-1] >= gaps.max() else int(gaps.argmax())
    if widest == len(gaps) - 1:
        return [float(starts[0]), float(south.min()), float(ends[-1]), float(north.max())]
    return [float(starts[widest + 1]), float(south.min()), float(ends[widest]) + 360, float(north.max())]


def map_of(hits, names):
    """Hits as what the page's map draws.

    Args:
        hits: with `geometry`, GeoJSON as text or None, and `west` to `north`.
        names: a text for each hit.

    Returns:
        dict: `features` of GeoJSON, each with the index of its hit and its text as properties, and `view`, of
        `view_around`. Hits without a known place have no feature, nor have those where the map has ended.
    """
    placed = [(index, hit) for index, hit in enumerate(hits) if hit["geometry"] and _is_on_map(hit)]
    view = view_around([[hit[side] for side in SIDES] for _, hit in placed])
    features = [
        {
            "type": "Feature",
            "geometry": turn_towards(json.loads(hit["geometry"]), (view[0] + view[2]) / 2),
            "properties": {"index": index, "label": names[index]},
        }
        for index, hit in placed
    ]
    return {"features": features, "view": view}


def _is_on_map(hit):
    sides = [hit[side] for side in SIDES]
    known = None not in sides and all(map(math.isfinite, sides))
    return known and hit["south"] < MAP_EDGE and hit["north"] > -MAP_EDGE


def turn_towards(geometry, longitude):
    """A geometry of GeoJSON whose parts are turned around the Earth to where they are nearest to a longitude."""
    from shapely import affinity, ops
    from shapely import geometry as shapes

    parts = getattr(shapes.shape(geometry), "geoms", [shapes.shape(geometry)])
    turned = []
    for part in parts:
        middle = (part.bounds[0] + part.bounds[2]) / 2
        turned.append(affinity.translate(part, xoff=360 * round((longitude - middle) / 360)))
    return shapes.mapping(turned[0] if len(turned) == 1 else ops.unary_union(turned))
