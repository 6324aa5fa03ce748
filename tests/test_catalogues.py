"""STAC catalogues as archives: static over HTTP, item collections, an API; filters by place and time; hits as STAC."""

import io
import json
import re
from datetime import datetime, timezone
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pystac = pytest.importorskip("pystac", reason="the extra `stac` is not installed")
pytest.importorskip("rasterio", reason="GeoTIFFs are read by rasterio, extra `geo`, which is not installed")
pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

from file_server import running_files  # noqa: E402
from test_index import CAPTIONS, checkpoint, loaded  # noqa: E402, F401
from test_storage import nothing_kept, small_tiff  # noqa: E402, F401

from ieft.data import storage  # noqa: E402
from ieft.search.catalogues import add_catalogue, column_of, is_catalogue, read_catalogue  # noqa: E402
from ieft.search.command import main  # noqa: E402
from ieft.search.filters import parse_interval, write_where  # noqa: E402
from ieft.search.index import ImageIndex  # noqa: E402

# ruff: noqa: F811

NUMBER = 4


def make_item(number, **changes):
    """An item of the month number + 1, at a longitude of number + 8, with a TIFF and a thumbnail as assets."""
    west, south, east, north = box = [8 + number, 47.96, 8.04 + number, 48]
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = pystac.Item(
        id=f"scene-{number}",
        geometry={"type": "Polygon", "coordinates": [ring]},
        bbox=box,
        datetime=datetime(2022, number + 1, 1, 10, tzinfo=timezone.utc),
        properties={"eo:cloud_cover": 10.0 * number, "view:off_nadir": number, "platform": "one"},
        collection="even" if number % 2 == 0 else "odd",
    )
    item.add_asset("visual", pystac.Asset(f"./{number}.tif", media_type=pystac.MediaType.COG, roles=["visual"]))
    item.add_asset("thumbnail", pystac.Asset(f"./{number}.png", media_type="image/png", roles=["thumbnail"]))
    return item


@pytest.fixture(scope="module")
def files():
    """A static catalogue: path -> bytes."""
    links = [{"rel": "item", "href": f"./items/{number}.json"} for number in range(NUMBER)]
    catalogue = {"type": "Catalog", "id": "root", "description": "test", "stac_version": "1.0.0", "links": links}
    found = {"/catalog.json": json.dumps(catalogue).encode()}
    for number in range(NUMBER):
        item = make_item(number).to_dict(include_self_link=False, transform_hrefs=False)
        found[f"/items/{number}.json"] = json.dumps(item).encode()
        found[f"/items/{number}.tif"] = small_tiff(number)
    return found


@pytest.fixture
def index(tmp_path, loaded):
    return ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1], create=True)


def test_a_static_catalogue_over_http_is_an_archive(files, index):
    with running_files(dict(files)) as server:
        place = f"{server.address}/catalog.json"
        assert is_catalogue(place)
        report = add_catalogue(index, place, properties=["view:off_nadir", "platform"])
        assert report == {"added": NUMBER, "unchanged": 0, "unreadable": {}}
        rows = sorted(index.rows(), key=lambda row: row["file"])
        assert [row["file"] for row in rows] == [f"{server.address}/items/{number}.tif" for number in range(NUMBER)]
        assert [row["item"] for row in rows] == [f"scene-{number}" for number in range(NUMBER)]
        assert [row["collection"] for row in rows] == ["even", "odd"] * 2
        assert [row["eo_cloud_cover"] for row in rows] == [0, 10, 20, 30]
        assert [(row["view_off_nadir"], row["platform"]) for row in rows] == [(n, "one") for n in range(NUMBER)]
        assert {row["acquired"].year for row in rows} == {2022}  # of the item, not of the file
        hits = index.search(CAPTIONS[0], where="eo_cloud_cover < 15 AND collection = 'even'")
        assert [hit["item"] for hit in hits] == ["scene-0"]

        # A change of the catalogue alone reads no image again.
        item = make_item(2)
        item.properties["eo:cloud_cover"] = 99.0
        server.files["/items/2.json"] = json.dumps(
            item.to_dict(include_self_link=False, transform_hrefs=False)
        ).encode()
        assert add_catalogue(index, place) == {"added": 0, "unchanged": NUMBER, "unreadable": {}}
        rows = index.rows("eo_cloud_cover = 99")
        assert [(row["item"], row["platform"]) for row in rows] == [("scene-2", "one")]


def put_item(server, item):
    content = json.dumps(item.to_dict(include_self_link=False, transform_hrefs=False))
    server.files[f"/items/{item.id[-1]}.json"] = content.encode()


def test_what_has_changed_in_a_catalogue_replaces_what_it_told_before(files, index):
    """A property that is gone, one of a column that an earlier run asked for, a place that the image does not tell."""
    with running_files(dict(files)) as server:
        place = f"{server.address}/items/2.json"
        item = make_item(2)
        item.assets["visual"].href = "./2.jpg"
        server.files["/items/2.jpg"] = photograph(0)
        put_item(server, item)
        add_catalogue(index, place, properties=["platform"])
        assert [(row["eo_cloud_cover"], row["west"]) for row in index.rows()] == [(20, 10)]
        item.properties |= {"platform": "two"}
        del item.properties["eo:cloud_cover"]
        item.bbox[0] = 10.01
        put_item(server, item)
        assert add_catalogue(index, place) == {"added": 0, "unchanged": 1, "unreadable": {}}
        (row,) = index.rows()
        assert (row["eo_cloud_cover"], row["platform"], row["west"]) == (None, "two", 10.01)

        del item.properties["platform"]
        put_item(server, item)
        add_catalogue(index, place)
        assert [row["platform"] for row in index.rows()] == [None]
        with pytest.raises(ValueError, match="The index has string in the column platform; this is double"):
            item.properties["platform"] = 3
            item.assets["visual"].href = "./3.tif"
            put_item(server, item)
            add_catalogue(index, place)
        assert len(index) == 1  # nothing is embedded that has no columns


def photograph(seed):
    """A JPEG, which tells no place and no time."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_an_image_that_is_embedded_again_keeps_what_the_catalogue_told(files, index):
    """Whole, in tiles, and without a place of its own; the second time the catalogue is not asked."""
    with running_files(dict(files)) as server:
        item = make_item(3)
        item.assets["visual"].href = "./3.jpg"
        server.files["/items/3.jpg"] = photograph(0)
        put_item(server, item)
        add_catalogue(index, f"{server.address}/catalog.json", properties=["platform"])
        told = ("item", "collection", "eo_cloud_cover", "platform", "acquired")
        places = ("west", "east", "geometry")

        def rows(names):
            return {row["file"][-5:]: [row[name] for name in names] for row in index.rows()}

        before, placed = rows(told), rows(places)["3.jpg"]
        assert None not in placed and not any(None in values for values in before.values())
        tiffs = {f"/items/{number}.tif": small_tiff(number + 4) for number in range(3)}
        server.files |= tiffs | {"/items/3.jpg": photograph(1)}
        storage._told.clear()
        add = [f"{server.address}{path}" for path in (*tiffs, "/items/3.jpg")]
        assert index.add(add)["added"] == 4
        assert rows(told) == before and rows(places)["3.jpg"] == placed
        assert rows(["west"])["2.tif"] == [14]  # of the new file, which tells its own
        assert index.add(add[:1], tile=24)["added"] > 1
        assert {tuple(row[name] for name in told) for row in index.rows("tiling != ''")} == {tuple(before["0.tif"])}


def test_items_are_chosen_by_place_time_and_collection(files):
    with running_files(dict(files)) as server:
        place = f"{server.address}/catalog.json"

        def found(**filters):
            return sorted(columns["item"][-1] for columns in read_catalogue(place, **filters)[0].values())

        assert found(bbox=(8.9, 40, 10.01, 50)) == ["1", "2"]
        assert found(datetime="2022-02/2022-03") == ["1", "2"]
        assert found(datetime="../2022-01-01T10:00:00Z") == ["0"]
        assert found(collections=["odd"]) == ["1", "3"]
        with pytest.raises(FileNotFoundError, match="0 items pass the filters"):
            found(datetime="1999")
        with pytest.raises(FileNotFoundError, match="no asset 'red'; it has visual, thumbnail"):
            found(asset="red")


def test_an_item_collection_on_this_machine_and_a_broken_one(files, tmp_path, index):
    (tmp_path / "items").mkdir()
    (tmp_path / "items/1.tif").write_bytes(files["/items/1.tif"])
    item, other = (make_item(number).to_dict(include_self_link=False, transform_hrefs=False) for number in (1, 2))
    other["assets"]["second"] = {"href": "other.tif", "type": "image/tiff"}
    collection = tmp_path / "items/found.geojson"
    collection.write_text(json.dumps({"type": "FeatureCollection", "features": [item, other]}))
    report = add_catalogue(index, collection)
    assert report["added"] == 1 and "one image expected, or --asset" in str(report["unreadable"])
    assert [row["file"] for row in index.rows()] == [str((tmp_path / "items/1.tif").resolve())]
    for content, reason in (
        ("[1]", "a catalogue, a collection or items"),
        ("{", "cannot be read"),
        ("{}", "expected"),
    ):
        collection.write_text(content)
        with pytest.raises(ValueError, match=reason):
            read_catalogue(collection)


def test_a_catalogue_elsewhere_names_no_files_of_this_machine(files, tmp_path):
    secret = tmp_path / "secret.tif"
    secret.write_bytes(small_tiff(0))
    for href in (str(secret), f"file://{secret}", "ftp://host/x.tif"):
        item = make_item(0).to_dict(include_self_link=False, transform_hrefs=False)
        item["assets"]["visual"]["href"] = href
        with running_files({"/item.json": json.dumps(item).encode()}) as server:
            with pytest.raises(FileNotFoundError, match="none"):
                images, _ = read_catalogue(f"{server.address}/item.json")
                assert not any(str(secret) == image for image in images)
                raise FileNotFoundError("none")  # an absolute path is one of the server
    catalogue = json.loads(files["/catalog.json"])
    catalogue["links"] = [{"rel": "item", "href": f"file://{tmp_path}/item.json"}]
    (tmp_path / "item.json").write_bytes(files["/items/0.json"])
    with running_files({"/catalog.json": json.dumps(catalogue).encode()}) as server:
        with pytest.raises(ValueError, match="a file of this machine"):
            read_catalogue(f"{server.address}/catalog.json")


class Api(dict):
    """Files of a server, and answers of a STAC API."""

    def get(self, path):
        place = urlsplit(path)
        if place.path == "/search":
            self.asked = place.query
            features = [json.loads(self[f"/items/{number}.json"]) for number in range(2)]
            for number, feature in enumerate(features):
                feature["assets"]["visual"]["href"] = f"{self.address}/items/{number}.tif"
            return json.dumps({"type": "FeatureCollection", "features": features, "links": []}).encode()
        return super().get(path)


def test_a_search_of_an_api_is_an_archive(files, index):
    pytest.importorskip("pystac_client", reason="the extra `stac` is not installed")
    answers = Api(files)
    with running_files(answers) as server:
        answers.address, server.kind = server.address, "application/json"
        search = {"rel": "search", "href": f"{server.address}/search", "type": "application/geo+json", "method": "GET"}
        links = [search, {"rel": "root", "href": f"{server.address}/v1"}]
        landing = {"type": "Catalog", "id": "api", "description": "test", "stac_version": "1.0.0", "links": links}
        landing["conformsTo"] = [f"https://api.stacspec.org/v1.0.0/{name}" for name in ("core", "item-search")]
        answers["/v1"] = json.dumps(landing).encode()
        assert is_catalogue(f"{server.address}/v1")
        report = add_catalogue(
            index, f"{server.address}/v1", collections=["even"], bbox=(8, 40, 9, 50), datetime="2022"
        )
        assert report["added"] == 1  # the API of this test ignores what is asked
        assert re.search("collections=even", answers.asked) and "bbox=8" in answers.asked


def test_the_command_filters_and_writes_items(files, tmp_path, checkpoint, capsys):
    named = ["--model", str(checkpoint), "--index", str(tmp_path / "index")]
    with running_files(dict(files)) as server:
        place = f"{server.address}/catalog.json"
        assert main(["index", place, "--asset", "visual", "--property", "platform", "--datetime", "2022", *named]) == 0
        assert capsys.readouterr().out.startswith("4 added")
        filters = ["--bbox", "-20", "40", "10.01", "50", "--datetime", "2022-02/.."]
        assert main(["query", CAPTIONS[0], *filters, *named, "--json", "--stac", str(tmp_path / "hits.json")]) == 0
        assert sorted(hit["item"] for hit in json.loads(capsys.readouterr().out)) == ["scene-1", "scene-2"]
        assert main(["export", *filters, *named]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        with pytest.raises(SystemExit, match="are of a STAC catalogue"):
            main(["index", str(tmp_path), "--asset", "visual", *named])
        found = pystac.ItemCollection.from_file(str(tmp_path / "hits.json"))
        assert len(found) == 2
        for item in found:
            pytest.importorskip("jsonschema", reason="the schemas of STAC are checked by jsonschema")
            item.validate()
            assert item.properties["ieft:rank"] in (1, 2) and item.datetime.year == 2022
        # What was found is an archive again.
        images, _ = read_catalogue(tmp_path / "hits.json")
        assert sorted(images) == [f"{server.address}/items/{number}.tif" for number in (1, 2)]
        assert sorted(columns["eo_cloud_cover"] for columns in images.values()) == [10, 20]


def test_columns_cannot_take_the_place_of_the_index_s_own(files, index):
    assert column_of("eo:cloud_cover") == "eo_cloud_cover" and column_of("2x") == "_2x"
    for name in ("file", "Vector", "item"):
        with pytest.raises(ValueError, match="cannot become a column"):
            column_of(name)


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2021", (2021, 1, 1), (2022, 1, 1)),
        ("2021-12", (2021, 12, 1), (2022, 1, 1)),
        ("2021-02-28", (2021, 2, 28), (2021, 3, 1)),
        ("2021-06/2021-08-02", (2021, 6, 1), (2021, 8, 3)),
        ("../2021", None, (2022, 1, 1)),
        ("2021-06-01T12:00:00+02:00/..", (2021, 6, 1, 10), None),
    ],
)
def test_times_are_read_as_in_stac(text, start, end):
    expected = [each and datetime(*each, tzinfo=timezone.utc) for each in (start, end)]
    assert list(parse_interval(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "..", "yesterday", "2021-13", "2022/2021", "2021/2022/2023", "2021-06-31", "1e3"]
)
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="datetime must be a time such as"):
        parse_interval(text)


@pytest.mark.parametrize(
    "bbox", [(1, 2, 3), (0, 50, 1, 40), (0, 0, 181, 1), ("a", 0, 1, 1), (float("nan"), 0, 1, 1), 7]
)
def test_other_boxes_are_refused(bbox):
    with pytest.raises(ValueError, match="bbox must be west, south, east and north"):
        write_where(bbox=bbox)


def test_boxes_meet_images_across_the_antimeridian(index, tmp_path):
    """Compared with a plain loop over many boxes."""
    import itertools

    import pyarrow as pa

    sides = [(170, 175), (175, -175), (-180, -170), (-10, 10), (179, 180), (-179, 179)]
    rows = [
        {"file": f"{place}", "col": 0, "row": 0, "west": west, "east": east, "south": 0.0, "north": 10.0}
        for place, (west, east) in enumerate(sides)
    ]
    rows = [row | {"vector": np.ones(8, np.float32)} for row in rows]
    index.table.add(pa.Table.from_pylist(rows, schema=index.table.schema))

    def longitudes(west, east):
        return {degree % 360 for degree in np.arange(west, (east if east >= west else east + 360) + 0.5, 0.5)}

    for west, east in itertools.product((-180, -176, -170, -5, 172, 176, 180), repeat=2):
        expected = {f"{place}" for place, span in enumerate(sides) if longitudes(*span) & longitudes(west, east)}
        found = {row["file"] for row in index.select(write_where(bbox=(west, 5, east, 20)), ["file"])}
        if (west, east) != (180, -180):
            assert found == expected, (west, east)
    assert index.select(write_where(bbox=(-180, 10.5, 180, 20)), ["file"]) == []
