"""Archives in other storage: an S3-compatible server and an HTTP server with range requests, both on loopback."""

import logging
from contextlib import contextmanager

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio", reason="GeoTIFFs are read by rasterio, extra `geo`, which is not installed")
pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

from file_server import running_files  # noqa: E402
from rasterio.io import MemoryFile  # noqa: E402
from rasterio.shutil import copy  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402
from test_index import CAPTIONS, checkpoint, loaded  # noqa: E402, F401

from ieft.data import storage  # noqa: E402
from ieft.data.images import read_image  # noqa: E402
from ieft.data.storage import RemoteFile, check_state, is_address  # noqa: E402
from ieft.search import archive_files, read_ahead  # noqa: E402
from ieft.search.archive_files import find_images, is_gone, plan_tiles, read_hit, read_tiles  # noqa: E402
from ieft.search.command import main  # noqa: E402
from ieft.search.index import ImageIndex  # noqa: E402

# ruff: noqa: F811

SIDE = 2560  # more pixels than are read whole


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A cloud-optimised GeoTIFF of noise, which cannot be compressed: each pixel has its byte in the file."""
    folder = tmp_path_factory.mktemp("large")
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "width": SIDE, "height": SIDE, "crs": "EPSG:32632"}
    profile |= {"transform": from_origin(500000, 5400000, 10, 10)}
    with rasterio.open(folder / "plain.tif", "w", **profile) as dataset:
        dataset.write(np.random.default_rng(0).integers(0, 255, (1, SIDE, SIDE), np.uint8))
    copy(folder / "plain.tif", folder / "large.tif", driver="COG", compress="deflate", blocksize=128)
    return folder / "large.tif"


@pytest.fixture(autouse=True)
def nothing_kept():
    """Nothing that another test has read."""
    storage._kept.forget()
    storage._listed.clear()
    storage._told.clear()


def small_tiff(seed, size=40):
    pixels = np.random.default_rng(seed).integers(0, 255, (3, size, size), np.uint8)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "width": size, "height": size, "crs": "EPSG:4326"}
    with MemoryFile() as memory:
        with memory.open(**profile, transform=from_origin(8 + seed, 48, 0.001, 0.001)) as dataset:
            dataset.update_tags(TIFFTAG_DATETIME=f"2021:0{seed + 1}:01 10:00:00")
            dataset.write(pixels)
        return bytes(memory.getbuffer())


# HTTP ---------------------------------------------------------------------------------------------------------------


@contextmanager
def indexed_over_http(scene, folder, loaded):
    """A server of a scene, its address, and the index of the scene's tiles."""
    with running_files({"/archive/large.tif": scene.read_bytes()}) as server:
        archive = f"{server.address}/archive"
        index = ImageIndex(folder / "index", loaded[0], processor=loaded[1], create=True, root=archive)
        assert index.add(find_images(archive), tile=256, overlap=0.25)["added"] == 13**2
        assert server.sent <= 1.2 * scene.stat().st_size
        yield server, archive, index


def test_a_scene_over_http_is_indexed_with_about_its_bytes_and_a_query_reads_a_part(large, tmp_path, loaded):
    content = large.read_bytes()
    with indexed_over_http(large, tmp_path, loaded) as (server, archive, index):
        assert len(server.requests) < 20
        sent, number = server.sent, len(server.requests)
        assert index.add(find_images(archive), tile=256, overlap=0.25)["unchanged"] == 13**2
        assert server.sent - sent < 300_000  # the list and the header

        storage._kept.forget()  # as another process would
        sent, number = server.sent, len(server.requests)
        hits = index.search(CAPTIONS[0], top_k=2, rerank_top_k=2)
        assert {hit["stage"] for hit in hits} == {"re-ranked"}
        assert server.sent - sent < 0.15 * len(content)
        assert len(server.requests) - number < 20


def test_rows_of_tiles_that_are_read_at_once_share_what_they_read(large, tmp_path, loaded, monkeypatch):
    """As with images of the size that networks take, of which a row of tiles is a task."""
    monkeypatch.setattr(read_ahead, "BYTES_PER_TASK", 3 * 32 * 32 * 13)
    with indexed_over_http(large, tmp_path, loaded):
        pass


def test_tiles_over_http_are_those_of_the_file(large):
    with running_files({"/large.tif": large.read_bytes()}) as server:
        address = f"{server.address}/large.tif"
        windows = plan_tiles(address, 500, 0.1).windows
        remote, local = list(read_tiles(address, windows)), list(read_tiles(str(large), windows))
        for (row, image), (expected, pixels) in zip(remote, local, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(pixels))
            differ = {name for name in row if row[name] != expected[name]}
            assert differ == {"file", "time"}
        storage._kept.forget()
        sent = server.sent
        row, image = remote[7]
        assert np.array_equal(np.asarray(read_hit(row | {"tiling": "cut"})), np.asarray(image))
        # Blocks of 128 x 128 around a window of 500 x 500, and the header.
        assert server.sent - sent < 2.5 * row["tile_width"] * row["tile_height"]


def test_a_lost_connection_is_tried_again_and_then_named(large):
    with running_files({"/large.tif": large.read_bytes()}) as server:
        file = RemoteFile(f"{server.address}/large.tif")
        server.cuts = [1000, 0]
        assert file.read(0, 5000) == large.read_bytes()[:5000]
        row, image = next(read_tiles(file.address, plan_tiles(file.address, 500, 0).windows))
        storage._kept.forget()
        server.cuts = [1000] * 8
        with pytest.raises(ConnectionError, match=r"large\.tif: the connection was lost 4 times"):
            read_hit(row | {"tiling": "cut"})
        # In the midst of the pixels, where decoders report errors of their own.
        storage._kept.forget()
        windows = plan_tiles(file.address, 500, 0).windows
        server.cuts = [1000] * 8
        with pytest.raises(ConnectionError, match=r"large\.tif: the connection was lost 4 times"):
            list(read_tiles(file.address, windows))


def test_a_server_in_trouble_is_no_file_that_is_gone(large):
    with running_files({"/archive/large.tif": large.read_bytes()}) as server:
        address, archive = f"{server.address}/archive/large.tif", f"{server.address}/archive"
        assert not is_gone(address) and is_gone(f"{archive}/other.tif")
        storage._told.clear()
        server.status = 503
        assert not is_gone(address)
        with pytest.raises(ConnectionError, match="lost 4 times"):
            archive_files.find_gone([address], root=archive)
        with pytest.raises(ConnectionError, match="lost 4 times.*503"):
            find_images(archive)
        server.status = 403
        with pytest.raises(PermissionError, match="may not be read"):
            check_state(address)
    assert not is_gone(address)  # no server at all


def test_a_folder_that_cannot_be_listed_is_named(large):
    files = {f"/archive/{number}.tif": small_tiff(number) for number in range(2)}
    with running_files(files | {"/archive/deep/3.tif": small_tiff(3)}) as server:
        archive, unreadable = f"{server.address}/archive", {}
        assert find_images(archive) == [f"{archive}/0.tif", f"{archive}/1.tif", f"{archive}/deep/3.tif"]
        server.files["/archive/deep/"] = "/nowhere"
        with pytest.raises(FileNotFoundError, match="archive/deep/ does not exist"):
            find_images(archive)
        assert len(find_images(archive, unreadable)) == 2
        assert "cannot be listed" in str(unreadable)


def test_a_server_without_ranges_is_read_whole_where_that_is_safe(large, monkeypatch):
    with running_files({"/large.tif": large.read_bytes()}) as server:
        server.ranges = False
        file = RemoteFile(f"{server.address}/large.tif")
        assert file.read(3_000_000, 3_000_100) == large.read_bytes()[3_000_000:3_000_100]
        monkeypatch.setattr(storage, "LARGEST_WHOLE", 10**6)
        with pytest.raises(ValueError, match="does not serve parts of files"):
            RemoteFile(file.address).read(4_000_000, 4_000_100)


def test_only_what_was_asked_for_is_requested(tmp_path, monkeypatch):
    """No format that names other files is opened, and no string but an address of the archive is one."""
    with running_files({"/secret.tif": small_tiff(0)}) as server:
        secret = f"{server.address}/secret.tif"
        vrt = (
            '<VRTDataset rasterXSize="40" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
            f"<SourceFilename>/vsicurl/{secret}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
        )
        server.files["/archive/scene.tif"] = vrt.encode()
        with pytest.raises(ValueError, match="cannot be read as an image"):
            list(
                read_tiles(
                    f"{server.address}/archive/scene.tif",
                    plan_tiles(f"{server.address}/archive/scene.tif", 8, 0).windows,
                )
            )
        with pytest.raises(FileNotFoundError):
            read_image(secret)
        assert {path for path, _ in server.requests} == {"/archive/scene.tif"}


def test_a_list_of_addresses_is_an_archive(tmp_path):
    small = tmp_path / "here.tif"
    small.write_bytes(small_tiff(0))
    with running_files({"/1.tif": small_tiff(1)}) as server:
        (tmp_path / "list.txt").write_text(f"{server.address}/1.tif\n\nhere.tif\n")
        assert find_images(tmp_path / "list.txt") == [f"{server.address}/1.tif", small]
        assert find_images(f"file://{small}") == [small]


def test_addresses_are_told_from_paths():
    assert all(is_address(each) for each in ("s3://bucket/a", "https://host/a.tif", "abfs://box@account/a"))
    assert not any(is_address(each) for each in ("/data/a", "a.tif", "C:/a", "C:\\a", "a:b", "file:///data/a", b"x"))
    for address, reason in (("zip://a.tif::s3://b/c.zip", "unpack"), ("nothing://a", "fsspec opens")):
        with pytest.raises(ValueError, match=reason):
            check_state(address)


# S3 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    """A client of an S3-compatible server on loopback; credentials and the server's address are in the environment."""
    s3fs = pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
    pytest.importorskip("moto", reason="the S3-compatible server of the tests is not installed")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        names |= {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_MAX_ATTEMPTS": "1"}
        for name, value in names.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield s3fs.S3FileSystem(use_listings_cache=False)
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3, request):
    """A bucket with six images."""
    name = request.node.name.replace("_", "-")[:50].strip("-")
    s3.mkdir(name)
    s3.pipe(
        {f"{name}/archive/{number}.tif": small_tiff(number) for number in range(6)} | {f"{name}/archive/x.txt": b"x"}
    )
    return f"s3://{name}"


def open_index(folder, loaded, root, **options):
    return ImageIndex(folder / "index", loaded[0], processor=loaded[1], create=True, root=root, **options)


def test_an_archive_in_a_bucket_is_kept_as_a_folder_is(s3, bucket, tmp_path, loaded, caplog):
    archive = f"{bucket}/archive"
    index = open_index(tmp_path, loaded, archive)
    assert index.add(find_images(archive)) == {"added": 6, "unchanged": 0, "unreadable": {}}
    assert index.add(find_images(archive)) == {"added": 0, "unchanged": 6, "unreadable": {}}
    assert {row["file"] for row in index.rows()} == {f"{archive}/{number}.tif" for number in range(6)}
    assert {row["file"] for row in index.select(None, ["file"])} == {f"{number}.tif" for number in range(6)}
    assert all(row["west"] and row["acquired"] and row["time"] for row in index.rows())
    (tmp_path / "local").mkdir()
    for number in range(6):
        (tmp_path / f"local/{number}.tif").write_bytes(small_tiff(number))
    local = ImageIndex(tmp_path / "other", loaded[0], processor=loaded[1], create=True, root=tmp_path / "local")
    local.add(find_images(tmp_path / "local"))
    scores = [[(hit["file"][-5:], hit["score"]) for hit in each.search(CAPTIONS[0])] for each in (index, local)]
    assert scores[0] == scores[1]

    s3.pipe(f"{archive}/0.tif", small_tiff(7))
    s3.rm(f"{archive}/5.tif")
    assert index.add(find_images(archive))["added"] == 1
    storage._told.clear()
    assert len(index.search(CAPTIONS[0])) == 5
    assert "5.tif: it was moved or deleted" in caplog.text
    assert index.prune() == [f"{archive}/5.tif"]
    assert index.delete([f"{archive}/4.tif"]) == 1

    for number in range(4):
        s3.mv(f"{archive}/{number}.tif", f"{bucket}/moved/{number}.tif")
    with pytest.raises(FileNotFoundError, match="All 4 files of s3://.* are gone"):
        index.prune()
    assert index.relocate(f"{bucket}/moved") == (4, 4)
    assert len(index.search(CAPTIONS[0])) == 4


def test_a_bucket_that_cannot_be_reached_is_not_an_empty_one(s3, bucket, tmp_path, loaded, monkeypatch, capsys):
    archive = f"{bucket}/archive"
    index = open_index(tmp_path, loaded, archive)
    index.add(find_images(archive))
    storage._kept.forget()
    storage._told.clear()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        type(s3).clear_instance_cache()
        for action in (
            lambda: index.prune(force=True),
            lambda: find_images(archive),
            lambda: index.search(CAPTIONS[0]),
        ):
            with pytest.raises(ConnectionError, match="s3://.*the connection was lost"):
                action()
    type(s3).clear_instance_cache()
    assert len(index) == 6 and len(index.search(CAPTIONS[0])) == 6
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_images("s3://no-such-bucket/archive")
    with pytest.raises(FileNotFoundError, match="none"):
        find_images(f"{bucket}/nothing")


def test_a_bucket_is_indexed_and_searched_by_the_command(s3, bucket, tmp_path, checkpoint, capsys):
    named = ["--model", str(checkpoint), "--index", str(tmp_path / "index")]
    s3.pipe(f"{bucket}/archive/damaged.tif", small_tiff(0)[:200])
    assert main(["index", f"{bucket}/archive", "--tile", "24", *named]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"not indexed: {bucket}/archive/damaged.tif")
    outputs = ["--sheet", str(tmp_path / "sheet.png"), "--explain", str(tmp_path / "why"), "--json"]
    assert main(["query", CAPTIONS[0], "--top_k", "2", "--where", "west > 10", *named, *outputs]) == 0
    assert f"{bucket}/archive/" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists() and len(list((tmp_path / "why").iterdir())) == 2
    assert main(["query", "--image", f"{bucket}/archive/3.tif", "--top_k", "1", *named]) == 0
    assert f"{bucket}/archive/3.tif" in capsys.readouterr().out


def test_missing_credentials_are_no_lost_connection(s3, bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    type(s3).clear_instance_cache()
    with pytest.raises(PermissionError, match="without credentials.*AWS_NO_SIGN_REQUEST=YES"):
        find_images(f"{bucket}/archive")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    assert len(find_images(f"{bucket}/archive")) == 6  # this server allows it
    type(s3).clear_instance_cache()


def test_gdal_s_names_of_credentials_are_taken(monkeypatch):
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    monkeypatch.setenv("AWS_S3_ENDPOINT", "127.0.0.1:9000")
    monkeypatch.setenv("AWS_HTTPS", "NO")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "name")
    assert storage._options_of_gdal("s3") == {"anon": True, "endpoint_url": "http://127.0.0.1:9000"}
    assert storage._options_of_gdal("az") == {"account_name": "name"}
    assert storage._options_of_gdal("gs") == storage._options_of_gdal("https") == {}
