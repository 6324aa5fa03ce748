"""Location and acquisition time of images, and their outlines as GeoJSON.

Places are longitude and latitude in degrees (WGS84, EPSG:4326) whatever the raster's own coordinate reference system
is. Outlines follow RFC 7946: counter-clockwise, cut at the antimeridian, longitudes from -180 to 180.
"""

import json
import logging
import math
import re
from datetime import datetime, timezone

import numpy as np
from PIL import ExifTags

from processing_ieft import open_lazily

logger = logging.getLogger(__name__)

SIDES = ("west", "south", "east", "north")  # of the bounding box in degrees; west > east across the antimeridian
OWN_SIDES = ("left", "bottom", "right", "top")  # of the envelope in the raster's own coordinates
PLACE_COLUMNS = (*SIDES, *OWN_SIDES, "crs", "geometry")
EDGE_POINTS = 21  # points per edge: it is straight in the raster's coordinates but may be curved in degrees
SIMPLIFIED = 1e-4  # how far an outline may be from those points, as a part of its size
OUT_OF_RANGE = 1  # degrees beyond a pole or a full turn: grids of pixel centres reach half a pixel beyond
LONGEST_REASON = 160  # characters of GDAL's messages, some of which quote whole definitions
# Metadata names of the acquisition time, in any GDAL domain, the most reliable first.
TIME_TAGS = (
    "ACQUISITIONDATETIME", "ACQUISITION_DATETIME", "ACQUIRED", "ACQUISITION_TIME", "ACQUISITION_DATE", "SENSING_TIME",
    "DATATAKE_1_DATATAKE_SENSING_START", "PRODUCT_START_TIME", "DATE_ACQUIRED", "EXIF_DATETIMEORIGINAL",
    "DATETIMEORIGINAL", "DATETIME", "EXIF_DATETIME", "TIFFTAG_DATETIME",
)  # fmt: skip
TIME = re.compile(
    r"\s*(\d{4})([:/-]?)(\d\d)\2(\d\d)(?:[T _]+(\d\d):?(\d\d)(?::?(\d\d)(?:[.,]\d*)?)?\s*(Z|UTC|[+-]\d\d:?\d\d)?)?\s*"
)


def locate(dataset, window, file=None):
    """The location of a window of an open raster, as columns of the index.

    Args:
        dataset: an open rasterio dataset.
        window: with `col`, `row`, `width` and `height` in pixels.
        file: to be named in a warning; None for no warning.

    Returns:
        dict: `west`, `south`, `east`, `north` in degrees, `geometry`, GeoJSON as text; `left`, `bottom`, `right`,
        `top` in the raster's own `crs`. Empty for a raster without georeference. Where its coordinates have no place
        on the Earth, only the raster's own are there, and a warning says so.
    """
    try:
        crs, to_own = _georeference(dataset)
        if crs is None:
            if dataset.crs is not None:
                _warn(file, "it names coordinates, but not which pixels have them")
            return {}
        right, bottom = window.col + window.width, window.row + window.height
        xs, ys = to_own(*_points_around(window.col, window.row, right, bottom))
        sides = [min(xs), min(ys), max(xs), max(ys)]
        own = {side: float(value) for side, value in zip(OWN_SIDES, sides, strict=True) if math.isfinite(value)}
    except Exception as error:  # GDAL's errors are of a private kind
        _warn(file, f"its georeference cannot be read: {error}")
        return {}
    return own | {"crs": crs.to_string()} | _place_of(crs, xs, ys, file)


def place_of_bounds(crs, left, bottom, right, top, file=None):
    """The location of a box in coordinates of `crs`, as from `locate`, for rows without further georeference."""
    from rasterio.crs import CRS

    try:
        return _place_of(CRS.from_string(crs), *_points_around(left, top, right, bottom), file)
    except Exception as error:
        _warn(file, error)
        return {}


def _warn(file, why):
    if file:
        logger.warning("%s gets no place on the Earth: %s", file, str(why)[:LONGEST_REASON])


def _points_around(left, top, right, bottom):
    """Points along the edges of a box, including its corners: xs and ys."""
    corners = np.array([(left, top), (left, bottom), (right, bottom), (right, top), (left, top)], dtype=float)
    steps = np.linspace(0, 1, EDGE_POINTS, endpoint=False)[:, None]
    edges = [start + steps * (stop - start) for start, stop in zip(corners, corners[1:], strict=False)]
    return np.concatenate(edges).T


def _georeference(dataset):
    """The coordinate reference system of a raster and a function from pixel columns and rows to coordinates."""
    from rasterio.crs import CRS
    from rasterio.transform import GCPTransformer, RPCTransformer

    points, of_points = dataset.gcps
    if dataset.crs is not None and not dataset.transform.is_identity:
        a, b, c, d, e, f, *_ = dataset.transform
        return dataset.crs, lambda cols, rows: (a * cols + b * rows + c, d * cols + e * rows + f)
    if points and of_points is not None:
        return of_points, _pixel_transform(GCPTransformer(points))
    if dataset.rpcs is not None:
        return CRS.from_epsg(4326), _pixel_transform(RPCTransformer(dataset.rpcs), zs=dataset.rpcs.height_off)
    return None, None


def _pixel_transform(transformer, zs=None):
    def to_own(cols, rows):
        heights = None if zs is None else [zs] * len(cols)
        with transformer:
            xs, ys = transformer.xy(list(rows), list(cols), zs=heights, offset="ul")
        return np.array(xs), np.array(ys)

    return to_own


def _place_of(crs, xs, ys, file):
    """Bounds in degrees and outline of an open ring of points; empty, with a warning, if it has no location."""
    from rasterio.warp import transform

    try:
        lons, lats = np.array(transform(crs, "EPSG:4326", list(xs), list(ys)))
        outline = _outline(lons, lats)
        if not crs.is_geographic:
            inside = np.abs(np.abs(lons) - 180) > 1e-6  # there, a projection has two places for one
            back = np.array(transform("EPSG:4326", crs, lons[inside], lats[inside]))
            if np.abs(back - np.array([xs, ys])[:, inside]).max(initial=0) > 1e-3 * np.ptp([xs, ys], axis=1).max():
                raise ValueError("its corners lie outside of the map of the Earth")
    except Exception as error:  # GDAL's errors are of a private kind
        _warn(file, error)
        return {}
    west, south, east, north = outline.bounds
    if east - west >= 360:
        west, east = -180.0, 180.0
    else:
        west = west if -180 <= west < 180 else (west + 180) % 360 - 180
        east = east if -180 < east <= 180 else 180 - (180 - east) % 360
    geometry = json.dumps(_cut(outline))
    return dict(zip(SIDES, (west, south, east, north), strict=True)) | {"geometry": geometry}


def _outline(lons, lats):
    """A ring as a polygon of continuous longitudes, which may lie beyond 180 degrees.

    Raises:
        ValueError: if coordinates are not on the Earth, or enclose no area.
    """
    import shapely

    if not (np.isfinite(lons).all() and np.isfinite(lats).all()):
        raise ValueError("its corners cannot be expressed in longitude and latitude")
    if np.abs(lats).max() > 90 + OUT_OF_RANGE or np.abs(lons).max() > 360 + OUT_OF_RANGE:
        reached = f"longitudes {lons.min():g} to {lons.max():g} and latitudes {lats.min():g} to {lats.max():g}"
        raise ValueError(f"{reached} are not on the Earth")
    lats = lats.clip(-90, 90)
    at_pole = np.abs(lats) > 90 - 1e-9
    if at_pole.sum() == 1:  # a corner at the pole has no longitude: it takes those of its neighbours
        lons, lats = _open_pole(lons, lats, at_pole)
    lons = np.unwrap([*lons, lons[0]], period=360).round(9)  # without slivers beyond 180 degrees
    lats = np.append(lats, lats[0])
    if abs(lons[-1] - lons[0]) > 180:  # around a pole
        pole = math.copysign(90, lats.mean())
        lons, lats = [*lons, lons[-1], lons[0]], [*lats, pole, pole]
    polygon = shapely.make_valid(shapely.Polygon(np.column_stack([lons, lats])))
    size = max(polygon.bounds[2] - polygon.bounds[0], polygon.bounds[3] - polygon.bounds[1])
    polygon = polygon.simplify(SIMPLIFIED * size)
    if not polygon.area > 0:
        raise ValueError("its outline encloses no area")
    return polygon


def _open_pole(lons, lats, at_pole):
    """A ring with a pole as one corner: the pole, which has no longitude, gets those of its neighbours."""
    corner = int(at_pole.argmax())
    beside = lons[[corner - 1, (corner + 1) % len(lons)]]
    return (np.concatenate([lons[:corner], beside, lons[corner + 1 :]]), np.insert(lats, corner, lats[corner]))


def _cut(outline):
    """A polygon of continuous longitudes as a GeoJSON geometry by RFC 7946."""
    import shapely
    from shapely.affinity import translate
    from shapely.geometry.polygon import orient

    west, _, east, _ = outline.bounds
    pieces = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        band = shapely.box(-180 + 360 * turn, -90, 180 + 360 * turn, 90)
        pieces.append(translate(outline.intersection(band), -360 * turn))
    whole = shapely.union_all(pieces, grid_size=1e-7)  # around the Earth, pieces meet
    polygons = [orient(each) for each in getattr(whole, "geoms", [whole]) if each.geom_type == "Polygon"]
    rings = [[_ring(ring) for ring in (each.exterior, *each.interiors)] for each in polygons]
    if len(rings) == 1:
        return {"type": "Polygon", "coordinates": rings[0]}
    return {"type": "MultiPolygon", "coordinates": rings}


def _ring(ring):
    return [[round(x, 7) + 0.0, round(y, 7) + 0.0] for x, y in ring.coords]  # about a centimetre, as RFC 7946 advises


def read_metadata(file, dataset=None):
    """Metadata of a file, as columns of the index.

    Returns:
        dict: `acquired`, the acquisition time if the file has one (as UTC if it has no time zone); and for a photo
        with a GPS position its point, in the columns of `locate`.
    """
    tags, columns = {}, {}
    try:
        with open_lazily(file) as image:
            exif = image.getexif()
            taken = exif.get_ifd(ExifTags.IFD.Exif)
            tags["TIFFTAG_DATETIME"] = exif.get(ExifTags.Base.DateTime)
            zone = str(taken.get(ExifTags.Base.OffsetTimeOriginal) or "").strip("\0 ")
            tags["DATETIMEORIGINAL"] = f"{taken.get(ExifTags.Base.DateTimeOriginal) or ''}".strip("\0 ") + zone
            columns = _point(exif.get_ifd(ExifTags.IFD.GPSInfo))
    except Exception:  # of damaged EXIF, and of kinds that Pillow does not open; the pixels are read elsewhere
        pass
    if dataset is not None:
        for domain in (None, *dataset.tag_namespaces()):
            if not (domain or "").startswith("xml:"):
                tags |= {name.upper(): value for name, value in dataset.tags(ns=domain).items()}
    acquired = next((time for name in TIME_TAGS if (time := parse_time(tags.get(name)))), None)
    return columns | ({"acquired": acquired} if acquired else {})


def parse_time(text):
    """Parse a time of EXIF, TIFF or ISO 8601 as a datetime in UTC; None for anything else."""
    found = TIME.fullmatch(text) if isinstance(text, str) else None
    if not found:
        return None
    year, _, month, day, *clock, zone = found.groups()
    zone = (zone or "Z").replace("Z", "+00:00").replace("UTC", "+00:00").replace(":", "")
    numbers = " ".join(part or "00" for part in (year, month, day, *clock))
    try:
        return datetime.strptime(f"{numbers} {zone}", "%Y %m %d %H %M %S %z").astimezone(timezone.utc)
    except (ValueError, OverflowError):  # such as 0000:00:00, which cameras write that have no clock
        return None


def _point(gps):
    """The position of a camera from its GPS tags; empty if they have none."""
    tag = ExifTags.GPS
    try:
        (lat, north), (lon, east) = (
            (sum(float(part) / 60**place for place, part in enumerate(gps[value])), gps[ref].strip("\0 ").upper())
            for value, ref in ((tag.GPSLatitude, tag.GPSLatitudeRef), (tag.GPSLongitude, tag.GPSLongitudeRef))
        )
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}
    lat, lon = (-lat if north == "S" else lat), (-lon if east == "W" else lon)
    if not (abs(lat) <= 90 and abs(lon) <= 180) or lat == lon == 0:  # written by cameras that know no position
        return {}
    geometry = json.dumps({"type": "Point", "coordinates": [round(lon, 7), round(lat, 7)]})
    return dict(zip(SIDES, (lon, lat, lon, lat), strict=True)) | {"geometry": geometry}


def to_geojson(hits):
    """Rows or hits of the index as a FeatureCollection (RFC 7946); without a location, geometry is null."""
    features = []
    for hit in hits:
        feature = {"type": "Feature", "geometry": json.loads(hit["geometry"]) if hit["geometry"] else None}
        if feature["geometry"]:
            feature["bbox"] = [hit[side] for side in SIDES]
        feature["properties"] = {name: value for name, value in hit.items() if name not in (*SIDES, "geometry")}
        features.append(feature)
    return {"type": "FeatureCollection", "features": features}
