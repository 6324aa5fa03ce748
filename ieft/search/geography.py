"""Location and acquisition time of images, and their outlines as GeoJSON.

Places are longitude and latitude in degrees (WGS84, EPSG:4326) whatever the raster's own coordinate reference system
is. Outlines follow RFC 7946: counter-clockwise, cut at the antimeridian, longitudes from -180 to 180.
"""

import json
import logging
import math
import os
import re
from contextlib import suppress
from datetime import datetime, timezone

import numpy as np
from PIL import ExifTags, Image

from ieft.data.rasters import open_lazily

logger = logging.getLogger(__name__)

SIDES = ("west", "south", "east", "north")  # of the bounding box in degrees; west > east across the antimeridian
OWN_SIDES = ("left", "bottom", "right", "top")  # of the envelope in the raster's own coordinates
PLACE_COLUMNS = (*SIDES, *OWN_SIDES, "crs", "geometry")
EDGE_POINTS = 21  # points per edge: it is straight in the raster's coordinates but may be curved in degrees
SIMPLIFIED = 1e-4  # how far an outline may be from those points, as a part of its size
OUT_OF_RANGE = 1  # degrees beyond a pole: grids of pixel centres reach half a pixel beyond
MOST_LONGITUDE = 541  # of scenes that begin below 360 degrees and go on beyond it
LONGEST_REASON = 160  # characters of GDAL's messages, some of which quote whole definitions
# Metadata names of the acquisition time, in any GDAL domain, the most reliable first.
TIME_TAGS = (
    "ACQUISITIONDATETIME", "ACQUISITION_DATETIME", "ACQUIRED", "ACQUISITION_START_TIME", "ACQUISITION_TIME",
    "FIRSTLINETIME", "SENSING_START", "SENSING_TIME", "DATATAKE_1_DATATAKE_SENSING_START", "PRODUCT_START_TIME",
    "TIME_COVERAGE_START", "NITF_IDATIM", "ACQUISITION_DATE", "ACQUISITIONDATE", "DATE_ACQUIRED",
    "EXIF_DATETIMEORIGINAL", "DATETIMEORIGINAL", "DATETIME", "EXIF_DATETIME", "TIFFTAG_DATETIME",
)  # fmt: skip
ZONE = r"(?:Z|UTC|[+-]\d\d(?::?\d\d)?)"
TIME = re.compile(
    rf"\s*(\d{{4}})([:/-]?)(\d\d)\2(\d\d)(?:[T _]*(\d\d):?(\d\d)(?::?(\d\d)(?:[.,]\d*)?)?\s*({ZONE})?)?\s*"
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
    import rasterio

    try:
        with rasterio.Env():  # so that GDAL prints no errors itself
            crs, to_own = _georeference(dataset)
            if to_own is None:
                if dataset.crs is not None:
                    warn_unplaced(file, "it names coordinates, but not which pixels have them")
                return {}
            right, bottom = window.col + window.width, window.row + window.height
            xs, ys = to_own(*_points_around(window.col, window.row, right, bottom))
        sides = [min(xs), min(ys), max(xs), max(ys)]
        own = {side: float(value) for side, value in zip(OWN_SIDES, sides, strict=True) if math.isfinite(value)}
    except Exception as error:  # GDAL's errors are of a private kind
        warn_unplaced(file, f"its georeference cannot be read: {error}")
        return {}
    if crs is None:
        warn_unplaced(file, "its pixels have coordinates, but it does not say in which coordinate reference system")
        return own
    return own | {"crs": crs.to_string()} | _place_of(crs, xs, ys, file)


def place_of_bounds(crs, left, bottom, right, top, file=None):
    """The location of a box in coordinates of `crs`, as from `locate`, for rows without further georeference."""
    from rasterio.crs import CRS

    try:
        return _place_of(CRS.from_string(crs), *_points_around(left, top, right, bottom), file)
    except Exception as error:
        warn_unplaced(file, error)
        return {}


def warn_unplaced(file, why):
    """Warn that an image gets no location; nothing for None as the file."""
    if file:
        logger.warning("%s gets no place on the Earth: %s", file, str(why)[:LONGEST_REASON])


def _points_around(left, top, right, bottom):
    """Points along the edges of a box, including its corners: xs and ys."""
    corners = np.array([(left, top), (left, bottom), (right, bottom), (right, top), (left, top)], dtype=float)
    steps = np.linspace(0, 1, EDGE_POINTS, endpoint=False)[:, None]
    edges = [start + steps * (stop - start) for start, stop in zip(corners, corners[1:], strict=False)]
    return np.concatenate(edges).T


def _georeference(dataset):
    """The coordinate reference system of a raster and a function from pixel columns and rows to coordinates.

    Either is None if the raster has none.
    """
    from rasterio.crs import CRS
    from rasterio.transform import GCPTransformer, RPCTransformer

    points, of_points = dataset.gcps
    if not dataset.transform.is_identity:
        a, b, c, d, e, f, *_ = dataset.transform
        return dataset.crs, lambda cols, rows: (a * cols + b * rows + c, d * cols + e * rows + f)
    if points and of_points is not None:
        points = _unwrapped(points) if of_points.is_geographic else points
        return of_points, _pixel_transform(GCPTransformer(points))
    if dataset.rpcs is not None:
        return CRS.from_epsg(4326), _pixel_transform(RPCTransformer(dataset.rpcs), zs=dataset.rpcs.height_off)
    return None, None


def _unwrapped(points):
    """Ground control points whose longitudes do not jump where a scene crosses the antimeridian."""
    from rasterio.control import GroundControlPoint

    lons = [point.x for point in points]
    if max(lons) - min(lons) <= 180:
        return points
    return [GroundControlPoint(point.row, point.col, point.x % 360, point.y, point.z) for point in points]


def _pixel_transform(transformer, zs=None):
    def to_own(cols, rows):
        heights = None if zs is None else [zs] * len(cols)
        with transformer:
            xs, ys = transformer.xy(list(rows), list(cols), zs=heights, offset="ul")
        return np.array(xs), np.array(ys)

    return to_own


def _place_of(crs, xs, ys, file):
    """Bounds in degrees and outline of an open ring of points; empty, with a warning, if it has no location."""
    try:
        points = np.array([xs, ys]) if crs.is_geographic else _with_pole(crs, np.array([xs, ys]))
        lons, lats = _transform(crs, "EPSG:4326", points)
        outline = _outline(lons, lats)
        if not crs.is_geographic:
            _check_on_map(crs, points, lons, lats)
    except Exception as error:
        warn_unplaced(file, error)
        return {}
    west, south, east, north = outline.bounds
    if east - west >= 360:
        west, east = -180.0, 180.0
    else:
        west = west if -180 <= west < 180 else (west + 180) % 360 - 180
        east = east if -180 < east <= 180 else 180 - (180 - east) % 360
    geometry = json.dumps(_cut(outline))
    return dict(zip(SIDES, (west, south, east, north), strict=True)) | {"geometry": geometry}


def _transform(crs, to, points):
    """Points (2, N) in another coordinate reference system.

    Raises:
        ValueError: if some have no place in it.
    """
    from rasterio.warp import transform

    try:
        return np.array(transform(crs, to, *map(list, points)))
    except Exception as error:  # GDAL's errors are of a private kind
        raise ValueError("its corners cannot be expressed in longitude and latitude") from error


def _with_pole(crs, ring):
    """A ring of points (2, N) of a map, with the pole as one of them if it lies on an edge: longitudes jump there."""
    for latitude in (90, -90):
        try:
            pole = _transform("EPSG:4326", crs, np.array([[0.0, 120.0], [latitude, latitude]]))
        except ValueError:
            continue
        size = np.ptp(ring, axis=1).max()
        if not (np.isfinite(pole).all() and size > 0 and np.abs(pole[:, 0] - pole[:, 1]).max() < 1e-6 * size):
            continue  # the pole is no point of this map
        pole = pole[:, :1]
        along = np.roll(ring, -1, axis=1) - ring
        lengths = np.maximum((along**2).sum(axis=0), 1e-300)
        share = ((pole - ring) * along).sum(axis=0) / lengths
        away = np.linalg.norm(ring + share.clip(0, 1) * along - pole, axis=0)
        edge = int(away.argmin())
        if away[edge] < 1e-9 * size and 1e-6 < share[edge] < 1 - 1e-6:
            return np.insert(ring, edge + 1, pole[:, 0], axis=1)
    return ring


def _check_on_map(crs, points, lons, lats):
    """Check that points of a map are places on the Earth, and not beyond the map's edge.

    A cylindrical map, such as Web Mercator, goes on beyond its edge: all its parallels are straight and as long as the
    equator.

    Raises:
        ValueError: if some lie outside of the map.
    """
    inside = np.abs(np.abs(lons) - 180) > 1e-6  # there, a projection has two places for one
    back = _transform("EPSG:4326", crs, np.array([lons[inside], lats[inside]]))
    differences = np.abs(back - points[:, inside])
    tolerance = 1e-3 * np.ptp(points, axis=1).max()
    if (differences > tolerance).any():
        turns = np.arange(-175.0, 180, 10)
        parallels = [_transform("EPSG:4326", crs, np.array([turns, np.full(36, lat)]))[0] for lat in (0.0, 60.0)]
        steps = np.median(np.diff(parallels), axis=1)
        if abs(steps[0] - steps[1]) > 1e-6 * abs(steps[0]) or (differences[1] > tolerance).any():
            raise ValueError("its corners lie outside of the map of the Earth")
        around = 36 * abs(steps[0])
        if np.minimum(differences[0], np.abs(differences[0] - around)).max() > tolerance:
            raise ValueError("its corners lie outside of the map of the Earth")


def _outline(lons, lats):
    """A ring as a polygon of continuous longitudes, which may lie beyond 180 degrees.

    Raises:
        ValueError: if coordinates are not on the Earth, or enclose no area.
    """
    import shapely

    if not (np.isfinite(lons).all() and np.isfinite(lats).all()):
        raise ValueError("its corners cannot be expressed in longitude and latitude")
    if np.abs(lats).max() > 90 + OUT_OF_RANGE or np.abs(lons).max() > MOST_LONGITUDE:
        reached = f"longitudes {lons.min():g} to {lons.max():g} and latitudes {lats.min():g} to {lats.max():g}"
        raise ValueError(f"{reached} are not on the Earth")
    lats = lats.clip(-90, 90)
    at_pole = np.abs(lats) > 90 - 1e-9
    if at_pole.sum() == 1:  # a pole has no longitude: it takes those of its neighbours
        others = [np.roll(of_ring, -int(at_pole.argmax()))[1:] for of_ring in (lons, lats)]
        lons = np.unwrap(others[0], period=360)
        lons, lats = [lons[0], *lons, lons[-1]], [lats[at_pole][0], *others[1], lats[at_pole][0]]
    else:
        lons, lats = np.unwrap([*lons, lons[0]], period=360), np.append(lats, lats[0])
        if abs(lons[-1] - lons[0]) > 180:  # around a pole
            pole = math.copysign(90, lats.mean())
            lons, lats = [*lons, lons[-1], lons[0]], [*lats, pole, pole]
    lons = np.round(lons, 9)  # without slivers beyond 180 degrees
    polygon = shapely.make_valid(shapely.Polygon(np.column_stack([lons, lats])))
    size = max(polygon.bounds[2] - polygon.bounds[0], polygon.bounds[3] - polygon.bounds[1])
    polygon = polygon.simplify(SIMPLIFIED * size)
    if not polygon.area > 1e-9 * size**2:
        raise ValueError("its outline encloses no area")
    return polygon


def _cut(outline):
    """A polygon of continuous longitudes as a GeoJSON geometry by RFC 7946."""
    import shapely
    from shapely.affinity import translate
    from shapely.geometry.polygon import orient

    west, south, east, north = outline.bounds
    # About a centimetre, as RFC 7946 advises; more digits for outlines of less than a metre.
    digits = max(7, 3 - math.floor(math.log10(max(east - west, north - south))))
    pieces = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        band = shapely.box(-180 + 360 * turn, -90, 180 + 360 * turn, 90)
        pieces.append(translate(outline.intersection(band), -360 * turn))
    whole = shapely.union_all(pieces, grid_size=10.0**-digits)  # around the Earth, pieces meet
    polygons = [orient(each) for each in getattr(whole, "geoms", [whole]) if each.geom_type == "Polygon"]
    rings = [[_ring(ring, digits) for ring in (each.exterior, *each.interiors)] for each in polygons]
    if len(rings) == 1:
        return {"type": "Polygon", "coordinates": rings[0]}
    return {"type": "MultiPolygon", "coordinates": rings}


def _ring(ring, digits):
    return [[round(x, digits) + 0.0, round(y, digits) + 0.0] for x, y in ring.coords]


def read_metadata(file, dataset=None):
    """Metadata of a file, as columns of the index.

    Returns:
        dict: `acquired`, the acquisition time if the file has one (as UTC if it has no time zone); and for a photo
        with a GPS position its point, in the columns of `locate`.
    """
    tags, columns = {}, {}
    with suppress(Exception):  # of damaged EXIF, and of kinds that Pillow does not open; the pixels are read elsewhere
        with open_lazily(file) as image:
            # Pillow looks for metadata behind the pixels of a PNG by decoding these.
            exif = image.getexif() if _has_late_metadata(image) else Image.Image.getexif(image)
            _read_exif(exif, tags, columns)
    if dataset is not None:
        for domain in (None, *dataset.tag_namespaces()):
            if not (domain or "").startswith("xml:"):
                tags |= {name.upper(): value for name, value in dataset.tags(ns=domain).items()}
    return columns | _acquired(tags)


def metadata_of(image):
    """As `read_metadata`, of a Pillow image whose pixels are read."""
    tags, columns = {}, {}
    with suppress(Exception):  # of damaged EXIF
        _read_exif(image.getexif(), tags, columns)
    return columns | _acquired(tags)


def _read_exif(exif, tags, columns):
    """Add the times of EXIF to `tags` and the place to `columns`, as far as they can be read."""
    taken = exif.get_ifd(ExifTags.IFD.Exif)
    tags["TIFFTAG_DATETIME"] = exif.get(ExifTags.Base.DateTime)
    zone = str(taken.get(ExifTags.Base.OffsetTimeOriginal) or "").strip("\0 ")
    zone = zone if re.fullmatch(ZONE, zone) else ""  # cameras that know none write blanks and a colon
    tags["DATETIMEORIGINAL"] = f"{taken.get(ExifTags.Base.DateTimeOriginal) or ''}".strip("\0 ") + zone
    columns |= _point(exif.get_ifd(ExifTags.IFD.GPSInfo))


def _acquired(tags):
    acquired = next((time for name in TIME_TAGS if (time := parse_time(tags.get(name)))), None)
    return {"acquired": acquired} if acquired else {}


def _has_late_metadata(image):
    """Whether a PNG that was opened has text or EXIF behind its pixels; True for any other format."""
    if image.format != "PNG":
        return True
    stream, place, has_pixels = image.fp, image.fp.tell(), False
    stream.seek(8)
    while len(header := stream.read(8)) == 8 and header[4:] != b"IEND":
        has_pixels |= header[4:] == b"IDAT"
        if has_pixels and header[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            break
        stream.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    else:
        return False
    stream.seek(place)
    return True


def parse_time(text):
    """Parse a time of EXIF, TIFF or ISO 8601 as a datetime in UTC; None for anything else."""
    found = TIME.fullmatch(text) if isinstance(text, str) else None
    if not found:
        return None
    year, _, month, day, *clock, zone = found.groups()
    zone = (zone or "Z").replace("Z", "+0000").replace("UTC", "+0000").replace(":", "")
    zone = zone.ljust(5, "0")
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
