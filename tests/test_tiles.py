"""Tests of the tiles of large scenes: full coverage, correct pixels, one common stretch, bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

rasterio = pytest.importorskip("rasterio", reason="GeoTIFF, extra `geo`, is not installed")

from ieft.data import images  # noqa: E402
from ieft.search.tiles import Scene, Window, cut_windows  # noqa: E402


@pytest.fixture(params=["cut out of the whole", "read by window"])
def any_size(request, monkeypatch):
    """Test both ways: small images are read whole and cut, large ones are read by window."""
    if request.param == "read by window":
        monkeypatch.setattr(images, "MAX_PIXELS", 0)
    return request.param


def write_scene(file, pixels, *, crs="EPSG:32631", **profile):
    """Bands (C, H, W) as a GeoTIFF of 10 m pixels."""
    count, height, width = pixels.shape
    transform = rasterio.transform.from_origin(500000, 5400000, 10, 10)
    shape = {"width": width, "height": height, "count": count, "dtype": pixels.dtype}
    with rasterio.open(file, "w", driver="GTiff", crs=crs, transform=transform, **shape, **profile) as scene:
        scene.write(pixels)
    return file


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (65, 500), (40, 100), (1, 1)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.9])
def test_tiles_cover_every_pixel_and_stay_inside(size, overlap):
    width, height = size
    covered = np.zeros((height, width), int)
    windows = cut_windows(width, height, tile=64, overlap=overlap)
    assert len(set(windows)) == len(windows)
    for col, row, tile_width, tile_height in windows:
        assert 0 <= col <= width - tile_width and 0 <= row <= height - tile_height
        assert (tile_width, tile_height) == (min(64, width), min(64, height))
        covered[row : row + tile_height, col : col + tile_width] += 1
    assert covered.min() == 1 or min(size) > 64 and covered.min() >= 1
    if overlap == 0.25 and size == (300, 200):
        assert [window.col for window in windows[:6]] == [0, 48, 96, 144, 192, 236]


def test_a_tile_is_what_the_image_shows_there(tmp_path, any_size):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 90, 120), np.uint8)
    window = Window(33, 20, 50, 40)
    expected = pixels[:3, 20:60, 33:83].transpose(1, 2, 0)
    with Scene(write_scene(tmp_path / "scene.tif", pixels, photometric="RGB", alpha="unspecified")) as scene:
        assert (scene.width, scene.height, scene.limits) == (120, 90, None)
        assert np.array_equal(np.asarray(scene.read(window)), expected)
    for name, picture in (("p.png", Image.fromarray(pixels[:3].transpose(1, 2, 0))),
                          ("palette.png", Image.fromarray(pixels[:3].transpose(1, 2, 0)).quantize(40))):  # fmt: skip
        picture.save(tmp_path / name)
        with Scene(tmp_path / name) as scene:
            crop = picture.convert("RGB").crop((33, 20, 83, 60))
            assert np.array_equal(np.asarray(scene.read(window)), np.asarray(crop))


def test_all_tiles_of_a_scene_share_one_stretch(tmp_path, any_size):
    """A ramp over 16 bits: each tile is a part of the whole stretched image; known limits avoid a second read."""
    ramp = np.broadcast_to(np.linspace(1000, 9000, 400), (1, 100, 400)).astype(np.uint16)
    with Scene(write_scene(tmp_path / "ramp.tif", ramp)) as scene:
        whole = np.asarray(scene.read(Window(0, 0, 400, 100)))
        low, high = np.percentile(ramp, (2, 98))
        assert scene.limits == (pytest.approx([low, high], rel=0.01) if any_size == "read by window" else None)
        assert np.ptp(whole) == 255
        for col in (0, 130, 300):
            assert np.array_equal(np.asarray(scene.read(Window(col, 0, 100, 100))), whole[:, col : col + 100])
    with Scene(tmp_path / "ramp.tif", limits=[0, 18000]) as scene:
        assert any_size != "read by window" or np.asarray(scene.read(Window(0, 0, 400, 100))).max() == pytest.approx(
            127.5, abs=1
        )


def test_no_data_is_black_and_not_part_of_the_stretch(tmp_path, any_size):
    pixels = np.random.default_rng(0).normal(5, 1, (3, 80, 80)).astype(np.float32)
    pixels[:, :40] = -9999
    pixels[:, 50, 50] = np.nan
    with Scene(write_scene(tmp_path / "float.tif", pixels, nodata=-9999)) as scene:
        shown = np.asarray(scene.read(Window(0, 0, 80, 80)))
        assert not shown[:40].any() and not shown[50, 50].any() and shown[40:].mean() == pytest.approx(127, abs=15)
        assert all(0 < limit < 10 for limit in scene.limits or [5])


def test_what_is_wrong_is_said(tmp_path, any_size):
    for tile, overlap in ((0, 0), (64, 1), (64, -0.1)):
        with pytest.raises(ValueError, match="tile from 1"):
            cut_windows(9, 9, tile=tile, overlap=overlap)
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no scene")
    with pytest.raises(ValueError, match="broken.tif cannot be read"):
        Scene(tmp_path / "broken.tif")
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    file = write_scene(tmp_path / "cut.tif", np.full((3, 400, 400), 7, np.uint8), **blocks)
    file.write_bytes(file.read_bytes()[:200_000])
    with pytest.raises(ValueError, match="cut.tif cannot be read"), Scene(file) as scene:
        scene.read(Window(300, 300, 100, 100))


READ_ALL = """
import resource, sys
from ieft.search.tiles import Scene, cut_windows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Scene(sys.argv[1]) as scene:
    windows = cut_windows(scene.width, scene.height, tile=256, overlap=0.25)
    for window in windows[: int(sys.argv[2])]:
        scene.read(window)
print(len(windows), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_huge_scene_is_read_in_little_memory(tmp_path):
    """20,000 x 20,000 of 16 bits, 800 MB, the first blocks filled: memory grows by a small part of it."""
    file = tmp_path / "huge.tif"
    profile = {"driver": "GTiff", "width": 20000, "height": 20000, "count": 1, "dtype": "uint16", "sparse_ok": True}
    with rasterio.open(file, "w", tiled=True, blockxsize=512, blockysize=512, **profile) as scene:
        filled = np.random.default_rng(0).integers(1, 4000, (1, 512, 2048), np.uint16)
        scene.write(filled, window=((0, 512), (0, 2048)))
    printed = subprocess.run([sys.executable, "-c", READ_ALL, file, "100"], capture_output=True, text=True, check=True)
    tiles, megabytes = map(float, printed.stdout.split())
    assert tiles == 104**2 and megabytes < 200
