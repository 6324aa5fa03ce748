"""Places by RFC 7946: cut at the antimeridian, true outlines, poles, ground control points; times of acquisition."""

import json
from datetime import datetime, timezone

import numpy as np
import pytest
from PIL import Image

rasterio = pytest.importorskip("rasterio", reason="GeoTIFF, extra `geo`, is not installed")
shapely = pytest.importorskip("shapely", reason="outlines, extra `geo`, is not installed")

from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.transform import Affine, from_origin  # noqa: E402
from rasterio.warp import transform  # noqa: E402
from test_one_reader import set_orientation  # noqa: E402

from ieft.search.archive_files import read_place_and_time  # noqa: E402
from ieft.search.geography import SIDES, parse_time, read_metadata, to_geojson  # noqa: E402
from ieft.search.tiles import Window  # noqa: E402

WIDTH, HEIGHT = 60, 40


def write(file, crs, matrix, *, size=(WIDTH, HEIGHT), points=None, **tags):
    shape = {"width": size[0], "height": size[1], "count": 1, "dtype": "uint8"}
    with rasterio.open(file, "w", driver="GTiff", crs=crs, transform=matrix, **shape) as dataset:
        dataset.write(np.zeros((1, size[1], size[0]), np.uint8))
        dataset.update_tags(**tags)
        if points:
            dataset.gcps = points, rasterio.crs.CRS.from_epsg(4326)
    return file


def place(file, window=None):
    return next(read_place_and_time(file, [window] if window else ()))


def check_geometry(found):
    """What RFC 7946 asks of any polygon; the shape."""
    geometry = json.loads(found["geometry"])
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    for rings in polygons:
        for ring in rings:
            assert ring[0] == ring[-1] and np.abs(np.array(ring)).max(axis=0).tolist() <= [180, 90]
        assert shapely.LinearRing(rings[0]).is_ccw
    shape = shapely.geometry.shape(geometry)
    assert shape.is_valid and (geometry["type"] == "MultiPolygon") == (len(polygons) > 1)
    assert found["south"] == pytest.approx(shape.bounds[1], abs=1e-6)
    assert found["north"] == pytest.approx(shape.bounds[3], abs=1e-6)
    return shape


@pytest.mark.parametrize("crs, matrix", [
    ("EPSG:32760", from_origin(814000, 8080000, 160, 240)),
    ("EPSG:32701", from_origin(180000, 8080000, 160, 240)),
    ("EPSG:4326", from_origin(179.9, -17, 0.005, 0.005)),  # beyond 180
    ("EPSG:4326", from_origin(-180.1, -17, 0.005, 0.005)),
    ("EPSG:3832", from_origin(3330000, -1950000, 500, 500)),  # a Mercator map around the Pacific
    ("EPSG:3857", from_origin(20027508, -1950000, 500, 500)),  # Web Mercator, beyond its edge
    ("EPSG:3857", from_origin(-20047508, -1950000, 500, 500)),
])  # fmt: skip
def test_what_crosses_the_antimeridian_is_cut(tmp_path, crs, matrix):
    found = place(write(tmp_path / "a.tif", crs, matrix))
    shape = check_geometry(found)
    assert len(shape.geoms) == 2 and found["west"] > 170 and found["east"] < -170  # RFC 7946, 5.2
    assert shape.contains(shapely.Point(179.99, shape.centroid.y)) and shape.contains(
        shapely.Point(-179.99, shape.centroid.y)
    )


@pytest.mark.parametrize("crs, matrix", [
    ("EPSG:32632", Affine(7.66, 6.43, 500000, 6.43, -7.66, 5400000)),  # rotated by 40 degrees
    ("EPSG:32632", Affine(10, 4, 500000, 0, -10, 5400000)),  # sheared
    ("EPSG:4326", Affine(0.1, 0.02, 10, 0.03, -0.1, 50)),
    ("EPSG:32632", Affine(10, 0, 500000, 0, 10, 5400000)),  # south up
    ("EPSG:27572", Affine(10, 0, 600000, 0, -10, 2400000)),  # another datum and meridian
])  # fmt: skip
def test_the_outline_is_that_of_the_pixels(tmp_path, crs, matrix):
    window = Window(10, 5, 30, 20)
    shape = check_geometry(place(write(tmp_path / "a.tif", crs, matrix), window))
    corners = [matrix @ corner if hasattr(matrix, "__matmul__") else matrix * corner
               for corner in ((10, 5), (10, 25), (40, 25), (40, 5))]  # fmt: skip
    expected = shapely.Polygon(np.transpose(transform(crs, "EPSG:4326", *zip(*corners, strict=True))))
    assert shape.symmetric_difference(expected).area < 1e-3 * expected.area
    assert 4 <= len(shape.exterior.coords) - 1 <= 12


def test_a_large_scene_keeps_its_curved_edges(tmp_path):
    file = write(tmp_path / "a.tif", "EPSG:32633", from_origin(100000, 8000000, 10000, 10000))
    shape = check_geometry(place(file))
    xs, ys = transform("EPSG:32633", "EPSG:4326", [400000], [8000000 - 100])  # just inside of the upper edge
    assert shape.contains(shapely.Point(xs[0], ys[0])) and len(shape.exterior.coords) > 8


@pytest.mark.parametrize("crs, left, top, pole", [
    ("EPSG:3413", -3000000, 2000000, 90), ("EPSG:3031", -3000000, 2000000, -90), ("EPSG:3413", -3000500, 2000700, 90),
])  # fmt: skip
def test_what_holds_a_pole_goes_around_the_earth(tmp_path, crs, left, top, pole):
    found = place(write(tmp_path / "a.tif", crs, from_origin(left, top, 100000, 100000)))
    shape = check_geometry(found)
    assert (found["west"], found["east"]) == (-180, 180) and pole in (found["south"], found["north"])
    for lon in range(-179, 180, 30):
        assert shape.contains(shapely.Point(lon, pole * 0.99)) and not shape.contains(shapely.Point(lon, 0))


def test_what_has_a_pole_as_its_corner_has_a_quarter(tmp_path):
    found = place(write(tmp_path / "a.tif", "EPSG:3413", from_origin(0, 4000000, 100000, 100000)))
    shape = check_geometry(found)
    assert [found[side] for side in ("west", "east", "north")] == pytest.approx([45, 135, 90])
    assert shape.contains(shapely.Point(90, 89.9)) and not shape.contains(shapely.Point(0, 89.9))


@pytest.mark.parametrize("crs, sides, expected, inside, outside", [
    ("EPSG:3413", (-1e6, 0, 1e6, 2e6), (45, -135, 90), (100, 85), (0, 85)),
    ("EPSG:3413", (-1e6, -2e6, 1e6, 0), (-135, 45, 90), (0, 85), (100, 85)),
    ("EPSG:3413", (-1.3e6, 0, 0.2e6, 1.5e6), (45, -135, 90), (-170, 85), (0, 85)),
    ("EPSG:3031", (0, -0.7e6, 2e6, 1.3e6), (0, 180, -90), (90, -85), (-90, -85)),
])  # fmt: skip
def test_what_has_a_pole_on_an_edge_has_half_a_turn(tmp_path, crs, sides, expected, inside, outside):
    west, south, east, north = sides
    matrix = from_origin(west, north, (east - west) / WIDTH, (north - south) / HEIGHT)
    found = place(write(tmp_path / "a.tif", crs, matrix))
    shape = check_geometry(found)
    pole = found["north" if expected[2] > 0 else "south"]
    assert (found["west"], found["east"], pole) == pytest.approx(expected)
    assert shape.contains(shapely.Point(inside)) and not shape.intersects(shapely.Point(outside))


@pytest.mark.parametrize("west, expected", [(350, (-10, 8)), (200, (-160, -142)), (359, (-1, 17))])
def test_longitudes_from_0_to_360_and_beyond(tmp_path, west, expected):
    found = place(write(tmp_path / "a.tif", "EPSG:4326", from_origin(west, 50, 0.3, 0.3)))
    check_geometry(found)
    assert (found["west"], found["east"]) == pytest.approx(expected)


@pytest.mark.parametrize("degrees", [1e-8, 1e-9])
def test_outlines_of_less_than_a_centimetre_enclose_an_area(tmp_path, degrees):
    found = place(write(tmp_path / "a.tif", "EPSG:4326", from_origin(10, 50, degrees, degrees), size=(10, 10)))
    assert check_geometry(found).area == pytest.approx(100 * degrees**2, rel=1e-2)


def test_a_scene_that_its_tag_turns_keeps_its_place(tmp_path):
    file = write(tmp_path / "a.tif", "EPSG:32632", from_origin(500000, 5400000, 10, 10))
    whole, left = place(file), place(file, Window(0, 0, 20, HEIGHT))
    set_orientation(file, 6)  # a quarter to the right: the upper edge shows what was at the left
    assert place(file) == whole
    assert list(read_place_and_time(file, [Window(0, 0, HEIGHT, WIDTH), Window(0, 0, HEIGHT, 20)])) == [whole, left]


@pytest.mark.parametrize("matrix, size", [
    (from_origin(-180, 90, 6, 4.5), (60, 40)), (from_origin(-0.125, 90.125, 0.25, 0.25), (1440, 721)),
])  # fmt: skip
def test_a_map_of_the_whole_earth(tmp_path, matrix, size):
    found = place(write(tmp_path / "a.tif", "EPSG:4326", matrix, size=size))
    assert [found[side] for side in SIDES] == [-180, -90, 180, 90]
    assert check_geometry(found).area == pytest.approx(360 * 180)


def test_ground_control_points_place_a_scene(tmp_path):
    corners = [(0, 0, 179, -10), (0, WIDTH, 181, -10.5), (HEIGHT, WIDTH, 180.9, -12), (HEIGHT, 0, 178.9, -11.5)]
    points = [GroundControlPoint(*corner) for corner in corners]
    found = place(write(tmp_path / "a.tif", None, None, points=points))
    assert found["west"] == pytest.approx(178.9) and found["east"] == pytest.approx(-179)
    assert len(check_geometry(found).geoms) == 2 and found["crs"] == "EPSG:4326"
    points = [GroundControlPoint(row, col, lon - 360 * (lon > 180), lat) for row, col, lon, lat in corners]
    assert place(write(tmp_path / "b.tif", None, None, points=points)) == found  # as radar scenes write them


@pytest.mark.parametrize("crs, matrix, points, own", [
    ('LOCAL_CS["site",UNIT["metre",1]]', from_origin(0, 0, 1, 1), None, True),
    ("EPSG:4326", from_origin(500000, 5400000, 1, 1), None, True),  # metres called degrees
    ("EPSG:32631", Affine(0, 0, 500000, 0, 0, 5400000), None, True),
    ("+proj=sinu +R=6371007.181 +units=m", from_origin(-20015109, 10007554, 100000, 100000), None, True),
    ("EPSG:32631", None, None, False),  # which pixels?
    (None, None, [GroundControlPoint(0, 0, 10, 10), GroundControlPoint(0, 60, 11, 10)], False),
    (None, from_origin(500000, 5400000, 10, 10), None, True),  # in which reference?
    ("EPSG:32631", Affine(10, 0, 500000, 0, -1e-9, 5400000), None, True),
    ("+proj=geos +h=35785831 +lon_0=0 +ellps=WGS84", from_origin(-5500000, 5500000, 183333, 275000), None, True),
])  # fmt: skip
def test_what_has_no_place_gets_no_geometry_and_one_warning(tmp_path, caplog, crs, matrix, points, own):
    file = write(tmp_path / "a.tif", crs, matrix, points=points)
    found = place(file)
    assert not {"geometry", *SIDES} & set(found) and ("left" in found) == own
    assert len(caplog.records) == 1 and str(file) in caplog.text and len(caplog.text) < 600


def test_hits_without_a_place_have_no_geometry():
    row = {"file": "a.png", "geometry": None} | dict.fromkeys(SIDES)
    assert to_geojson([row])["features"][0] == {"type": "Feature", "geometry": None, "properties": {"file": "a.png"}}


@pytest.mark.parametrize("text, expected", [
    ("2021:06:01 10:20:30", (10, 20, 30)), ("2021-06-01T10:20:30Z", (10, 20, 30)),
    ("2021-06-01T10:20:30.123456789+02:00", (8, 20, 30)), ("20210601T102030", (10, 20, 30)), ("2021-06-01", (0, 0, 0)),
    ("2021/06/01 10:20", (10, 20, 0)), ("2021:06:01 10:20:30-0930", (19, 50, 30)), ("0000:00:00 00:00:00", None),
    ("20210601102030", (10, 20, 30)), ("2021-06-01T12:20:30+02", (10, 20, 30)), ("202106", None),
    ("    :  :     :  :  ", None), ("2021:13:01 10:20:30", None), ("yesterday", None), (None, None), (5, None),
])  # fmt: skip
def test_times_as_files_write_them(text, expected):
    assert parse_time(text) == (expected and datetime(2021, 6, 1, *expected, tzinfo=timezone.utc))


@pytest.mark.parametrize("tags", [
    {"TIFFTAG_DATETIME": "2021:06:01 10:20:30"}, {"acquired": "2021-06-01T10:20:30Z"},
    {"TIFFTAG_DATETIME": "2024:01:01 00:00:00", "ACQUISITIONDATETIME": "2021-06-01 10:20:30"},
    {"ACQUISITION_START_TIME": "2021-06-01T10:20:30.5Z", "TIFFTAG_DATETIME": "2024:01:01 00:00:00"},
    {"NITF_IDATIM": "20210601102030"}, {"FirstLineTime": "2021-06-01T10:20:30.0Z"},
    {"time_coverage_start": "2021-06-01T10:20:30Z"}, {"ACQUIRED": "unknown", "DateTime": "2021-06-01T10:20:30Z"},
])  # fmt: skip
def test_the_time_of_acquisition_of_a_scene(tmp_path, tags):
    file = write(tmp_path / "a.tif", "EPSG:32631", from_origin(500000, 5400000, 10, 10), **tags)
    assert place(file)["acquired"] == datetime(2021, 6, 1, 10, 20, 30, tzinfo=timezone.utc)


def test_time_and_place_of_a_photo(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0x9003: "2021:06:01 10:20:30", 0x9011: "+02:00"}
    exif[0x8825] = {1: "S", 2: (17.0, 30.0, 36.0), 3: "W", 4: (179.0, 15.0, 0.0)}
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    found = read_metadata(tmp_path / "a.jpg")
    assert found["acquired"] == datetime(2021, 6, 1, 8, 20, 30, tzinfo=timezone.utc)
    assert json.loads(found["geometry"]) == {"type": "Point", "coordinates": [-179.25, -17.51]}
    assert (found["west"], found["north"]) == pytest.approx((-179.25, -17.51))
    exif[0x8769] = {0x9003: "2021:06:01 10:20:30", 0x9011: "   :  "}  # of a camera that knows no zone
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert read_metadata(tmp_path / "a.jpg")["acquired"] == datetime(2021, 6, 1, 10, 20, 30, tzinfo=timezone.utc)
    for gps in ({}, {1: "S"}, {1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)},
                {1: "N", 2: (99.0, 0.0, 0.0), 3: "E", 4: (1.0, 0.0, 0.0)}):  # fmt: skip
        exif[0x8825] = gps
        Image.new("RGB", (40, 30)).save(tmp_path / "b.jpg", exif=exif)
        assert "geometry" not in read_metadata(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_bytes(b"no image")
    assert read_metadata(tmp_path / "c.jpg") == {}
