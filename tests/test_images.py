"""Tests that every kind of remote-sensing image becomes an RGB image with visible content."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile

from ieft.data.images import describe_image, is_plain, parse_bands, read_image
from processing_ieft import stretch_to_bytes, to_rgb

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
# A scene as from a sensor: reflectances in a small part of the 16-bit range, (C, H, W).
REFLECTANCE = (RNG.random((13, 40, 56)).cumsum(2) * 60 + 300 * np.arange(1, 14)[:, None, None]).astype(np.uint16)
BYTES = RNG.integers(0, 256, (3, 40, 56), dtype=np.uint8)


def write_scene(path, pixels, *, driver="GTiff", colours=None, **options):
    count, height, width = pixels.shape
    with rasterio.open(path, "w", driver=driver, count=count, height=height, width=width, dtype=pixels.dtype,
                       **options) as scene:  # fmt: skip
        scene.write(pixels)
        if colours:
            scene.colorinterp = [ColorInterp[name] for name in colours]
    return path


def stretched(pixels):
    return np.stack([stretch_to_bytes(band) for band in pixels], axis=2)


LAYOUTS = {
    "strips": {},
    "one row a strip": {"blockysize": 1},
    "tiles": {"tiled": True, "blockxsize": 16, "blockysize": 16},
    "tiles by band": {"tiled": True, "blockxsize": 32, "blockysize": 16, "interleave": "band"},
    "strips by band": {"interleave": "band"},
    "big endian": {"ENDIANNESS": "BIG"},
    "BigTIFF": {"BIGTIFF": "YES"},
    **{name: {"compress": name} for name in ("lzw", "deflate", "zstd", "packbits", "lerc", "lzma")},
    "predictor": {"compress": "deflate", "predictor": 2, "tiled": True, "blockxsize": 16, "blockysize": 16},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth", ["uint8", "uint16"])
def test_a_tiff_of_any_layout_and_compression(tmp_path, layout, depth):
    pixels = BYTES if depth == "uint8" else REFLECTANCE[:3]
    path = write_scene(tmp_path / "a.tif", pixels, photometric="rgb", **LAYOUTS[layout])
    expected = pixels.transpose(1, 2, 0) if depth == "uint8" else stretched(pixels)
    assert np.array_equal(np.asarray(read_image(path)), expected)
    assert np.array_equal(np.asarray(read_image(path.read_bytes())), expected)


def test_a_bare_conversion_makes_16_bits_black_and_ours_does_not(tmp_path):
    path = write_scene(tmp_path / "a.tif", REFLECTANCE[:3] // 4, photometric="rgb")
    with Image.open(path) as image:
        assert np.asarray(image.convert("RGB")).max() < 8  # of 255
    picture = np.asarray(read_image(path))
    assert picture.max() == 255 and 100 < picture.mean() < 160
    png = write_scene(tmp_path / "a.png", REFLECTANCE[:3] // 4, driver="PNG")
    with Image.open(png) as image:
        assert np.asarray(image.convert("RGB")).max() < 8
    assert np.array_equal(np.asarray(read_image(png)), picture)
    assert not is_plain(path) and not is_plain(png) and describe_image(path) == (56, 40, "3 x uint16")


@pytest.mark.parametrize("depth", ["uint16", "int16", "uint32", "int32", "float32", "float64", "int8"])
@pytest.mark.parametrize("count", [1, 3])
def test_numbers_of_every_kind_are_stretched_band_by_band(tmp_path, depth, count):
    scale = 1 / 200 if depth == "int8" else 1
    pixels = (REFLECTANCE[:count] * scale - (0 if depth.startswith("u") else 20)).astype(depth)
    path = write_scene(tmp_path / "a.tif", pixels)
    expected = stretched(pixels) if count == 3 else np.repeat(stretched(pixels), 3, axis=2)
    assert np.array_equal(np.asarray(read_image(path)), expected)
    assert expected.max() == 255 and expected.mean() > 60


def test_no_data_is_black_and_takes_no_part_in_the_stretch(tmp_path):
    for depth, value in (("int16", -9999), ("float32", -1e30), ("float32", float("nan"))):
        pixels = REFLECTANCE[:1].astype(depth)
        pixels[:, :10] = value
        picture = np.asarray(read_image(write_scene(tmp_path / "a.tif", pixels, nodata=value)))
        assert picture[:10].max() == 0
        assert np.array_equal(picture[10:, :, 0], stretch_to_bytes(pixels[0, 10:]))


def test_bands_are_chosen_by_number_from_one(tmp_path):
    path = write_scene(tmp_path / "a.tif", REFLECTANCE)
    with pytest.raises(ValueError, match=r"a.tif cannot be read .* 13 bands: choose three, such as --bands 3,2,1"):
        read_image(path)
    assert np.array_equal(np.asarray(read_image(path, bands=(4, 3, 2))), stretched(REFLECTANCE[[3, 2, 1]]))
    assert np.array_equal(np.asarray(read_image(path, bands=(13,)))[:, :, 1], stretch_to_bytes(REFLECTANCE[12]))
    with pytest.raises(ValueError, match="bands 1 to 13; band 14 was asked for"):
        read_image(path, bands=(14, 1, 1))
    photo = tmp_path / "a.png"
    Image.fromarray(BYTES.transpose(1, 2, 0)).save(photo)
    assert np.array_equal(np.asarray(read_image(photo, bands=(3, 2, 1))), BYTES[::-1].transpose(1, 2, 0))


@pytest.mark.parametrize("count", range(4, 14))
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_four_to_thirteen_bands(tmp_path, count, depth):
    pixels = (REFLECTANCE[:count] // (20 if depth is np.uint8 else 1)).astype(depth)
    path = write_scene(tmp_path / "a.tif", pixels, photometric="minisblack")
    expected = pixels[[2, 1, 0]].transpose(1, 2, 0) if depth is np.uint8 else stretched(pixels[[2, 1, 0]])
    assert np.array_equal(np.asarray(read_image(path, bands=(3, 2, 1))), expected)
    with pytest.raises(ValueError, match=f"it has {count} bands"):
        read_image(path)
    named = ["nir", "blue", "green", "red"] if count == 4 else None
    if named:
        path = write_scene(tmp_path / "b.tif", REFLECTANCE[:4], colours=["undefined", *named[1:]])
        assert np.array_equal(np.asarray(read_image(path)), stretched(REFLECTANCE[[3, 2, 1]]))


def test_jpeg_2000_of_16_bits(tmp_path):
    path = write_scene(tmp_path / "a.jp2", REFLECTANCE[:3], driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES")
    assert np.array_equal(np.asarray(read_image(path)), stretched(REFLECTANCE[:3]))


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(tmp_path, mode):
    colours = Image.fromarray(BYTES.transpose(1, 2, 0))
    image = Image.fromarray(REFLECTANCE[0]).convert(mode) if mode in ("I;16", "I", "F") else colours.convert(mode)
    image.save(tmp_path / "a.tif", compression="tiff_lzw" if mode != "1" else "group4")
    picture = read_image(tmp_path / "a.tif")
    assert picture.mode == "RGB" and picture.size == (56, 40) and np.asarray(picture).std() > 20
    if mode == "P":
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(image.convert("RGB"))).max() == 0
    if mode == "CMYK":
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(colours)).mean() < 2


def test_a_palette_of_a_scene(tmp_path):
    path = tmp_path / "a.tif"
    classes = RNG.integers(0, 3, (1, 40, 56), dtype=np.uint8)
    with rasterio.open(path, "w", driver="GTiff", count=1, height=40, width=56, dtype="uint8") as scene:
        scene.write_colormap(1, {0: (10, 20, 30), 1: (200, 0, 0), 2: (0, 90, 255)})
        scene.write(classes)
    expected = np.array([(10, 20, 30), (200, 0, 0), (0, 90, 255)])[classes[0]]
    assert np.array_equal(np.asarray(read_image(path)), expected)
    assert np.array_equal(np.asarray(read_image(path, bands=(1,))), expected)  # the way of rasterio


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_pictures_are_turned_upright(tmp_path, ending):
    image = Image.new("RGB", (30, 20), "red")
    image.paste("blue", (0, 0, 30, 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / f"a.{ending}", exif=exif)
    picture = read_image(tmp_path / f"a.{ending}")
    assert picture.size == (20, 30) and picture.getpixel((17, 15))[2] > 200  # the blue edge is on the right


def test_transparent_pixels_are_black(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png")).max() == 0


# Plain or not --------------------------------------------------------------------------------------------------------


def test_what_is_plain_is_read_alike_by_pillow_and_by_us(tmp_path):
    Image.fromarray(BYTES.transpose(1, 2, 0)).save(tmp_path / "a.jpg")
    Image.fromarray(BYTES.transpose(1, 2, 0)).save(tmp_path / "b.tif")
    Image.fromarray(REFLECTANCE[0]).save(tmp_path / "c.tif")
    for path in sorted(tmp_path.iterdir()):
        assert is_plain(path) and not is_plain(path, bands=(1,))
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(read_image(path)))
    assert describe_image(tmp_path / "a.jpg") == (56, 40, "RGB")
    write_scene(tmp_path / "d.tif", BYTES, compress="lerc", photometric="rgb")
    assert not is_plain(tmp_path / "d.tif") and not is_plain(b"none")


@pytest.mark.parametrize("text, bands", [("3,2,1", (3, 2, 1)), ("8", (8,)), (" 4, 3,2", (4, 3, 2)), (None, None)])
def test_bands_as_they_are_typed(text, bands):
    assert parse_bands(text) == bands


@pytest.mark.parametrize("text", ["3,2", "0,1,2", "r,g,b", "", "1,2,3,4", "-1"])
def test_bands_that_make_no_picture_are_refused(text):
    with pytest.raises(ValueError, match="one number or three, counted from 1"):
        parse_bands(text)


# Bad files -----------------------------------------------------------------------------------------------------------


def encoded(form):
    stream = io.BytesIO()
    Image.fromarray(BYTES.transpose(1, 2, 0)).save(stream, form)
    return stream.getvalue()


def encoded_deep(driver, **options):
    with MemoryFile() as held:
        write_scene(held.name, REFLECTANCE[:3], driver=driver, **options)
        return held.read()


BAD = {
    "zero bytes": b"",
    "html": b"<!DOCTYPE html><html>not found</html>",
    "text": b"no image",
    "truncated jpeg": encoded("JPEG")[:500],
    "truncated png": encoded("PNG")[:3000],
    "truncated tiff": encoded("TIFF")[:3000],
    "truncated png of 16 bits": encoded_deep("PNG")[:5000],
    "truncated tiff of 16 bits": encoded_deep("GTiff", compress="deflate")[:5000],
    "truncated jpeg 2000": encoded_deep("JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES")[:5000],
    "header of a tiff": b"II*\0\x08\0\0\0",
    "damaged png": encoded("PNG")[:60] + b"\xff" * 40 + encoded("PNG")[100:],
    "vrt that names another file": b"<VRTDataset rasterXSize='1' rasterYSize='1'></VRTDataset>",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("bands", [None, (1,)])
def test_a_bad_file_is_one_error_that_names_it(tmp_path, kind, bands):
    (tmp_path / "bad.tif").write_bytes(BAD[kind])
    with pytest.raises(ValueError, match="bad.tif cannot be read as an image: .") as raised:
        read_image(tmp_path / "bad.tif", bands=bands)
    assert raised.value.__cause__ is not None
    with pytest.raises(ValueError, match=f"image of {len(BAD[kind]):,} bytes cannot be read"):
        read_image(BAD[kind], bands=bands)


def test_a_file_that_is_gone_is_said_to_be(tmp_path):
    for bands in (None, (1,)):
        with pytest.raises((FileNotFoundError, ValueError), match="gone.tif"):
            read_image(tmp_path / "gone.tif", bands=bands)


def test_without_rasterio_the_reason_is_what_to_install(tmp_path, monkeypatch):
    path = write_scene(tmp_path / "a.tif", REFLECTANCE[:3], photometric="rgb")
    single = write_scene(tmp_path / "b.tif", REFLECTANCE[:1])
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ValueError, match=r"pip install 'ieft\[geo\]'"):
        read_image(path)
    assert np.asarray(read_image(single)).max() == 255  # Pillow has it


# Large files ---------------------------------------------------------------------------------------------------------


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (13_500, 13_500)).save(tmp_path / "bomb.png")  # 182 million pixels
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match="decompression bomb"):
        read_image(tmp_path / "bomb.png")
    with rasterio.open(tmp_path / "bomb.tif", "w", driver="GTiff", count=1, dtype="uint8", width=20_000,
                       height=20_000, tiled=True, blockxsize=20_000, blockysize=20_000, SPARSE_OK=True):  # fmt: skip
        pass
    with pytest.raises(ValueError, match="blocks of 20000 x 20000, .* decompression bomb"):
        read_image(tmp_path / "bomb.tif")


READ = """
import resource, sys
from ieft.data.images import read_image
for path, bands in zip(sys.argv[1:], (None, (4, 3, 2))):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    picture = read_image(path, bands=bands)
    print(picture.width, picture.height, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_huge_images_are_read_in_bounded_memory(tmp_path):
    """The increase in MB of the peak memory of a new process."""
    Image.new("RGB", (6000, 6000), "green").save(tmp_path / "a.jpg")  # 108 MB as an array
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=13, dtype="uint16", width=6000, height=6000,
                       tiled=True, blockxsize=512, blockysize=512, SPARSE_OK=True) as scene:  # fmt: skip
        scene.write(np.full((13, 512, 512), 900, np.uint16), window=((0, 512), (0, 512)))  # 936 MB as an array
    command = [sys.executable, "-c", READ, tmp_path / "a.jpg", tmp_path / "a.tif"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    jpeg, tiff = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert jpeg[:2] == (2048, 2048) and jpeg[2] < 70
    assert tiff[:2] == (2048, 2048) and tiff[2] < 400
    assert not is_plain(tmp_path / "a.jpg")
