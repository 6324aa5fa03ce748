"""Tests that a file gives the same pixels in every code path that reads images."""

import io
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image, ImageOps
from rasterio.enums import ColorInterp

import ieft  # noqa: F401 (makes the reader known to the processor)
import processing_ieft
from ieft.data import images
from ieft.data.images import Scene, Window, read_image
from ieft.page.visitors import read_upload
from ieft.search.archive_files import read_hit
from prepare_datasets import load_retrieval_dataset
from processing_ieft import IeftImageProcessor, array_to_rgb, to_rgb

SIDE = 64
RNG = np.random.default_rng(0)
BYTES = RNG.integers(1, 255, (4, SIDE, SIDE), dtype=np.uint8)
DEEP = (RNG.random((4, SIDE, SIDE)).cumsum(2) * 60 + 300 * np.arange(1, 5)[:, None, None]).astype(np.uint16)
SMOOTH = np.stack([np.add.outer(np.arange(SIDE), np.arange(SIDE) * c) for c in (1, 2, 3)]).astype(np.uint8)
PHOTO = Image.fromarray(BYTES[:3].transpose(1, 2, 0))
COLOURS = {level: (level * 7 % 256, level * 13 % 256, 200 - level) for level in range(32)}


def write(path, pixels, *, colours=None, colormap=None, later=False, mask=None, **options):
    count, height, width = pixels.shape
    options = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype} | options
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **options) as raster:
        if colormap and not later:
            raster.write_colormap(1, colormap)
        raster.write(pixels)
        if colours:
            raster.colorinterp = [ColorInterp[name] for name in colours]
        if mask is not None:
            raster.write_mask(mask)
    if later:
        with rasterio.open(path, "r+") as raster:
            raster.write_colormap(1, colormap)


def save(path, image, **options):
    image.save(path, **options)


def with_orientation(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    PHOTO.save(path, exif=exif, quality=95)


def with_exif_that_cannot_be_written(path):
    """EXIF as written by some drones: a resolution as text, which Pillow reads but cannot write as a number."""
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH.transpose(1, 2, 0)).save(buffer, "JPEG", quality=95)
    orientation = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"  # 6
    resolution = b"\x01\x1a\x00\x02\x00\x00\x00\x0372\x00\x00"
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + orientation + resolution + b"\x00" * 4
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    path.write_bytes(buffer.getvalue()[:2] + segment + buffer.getvalue()[2:])


def set_orientation(path, orientation):
    """Write the tag of a little-endian TIFF, in a copy of its first directory at its end."""
    content = path.read_bytes() + b"\0" * (path.stat().st_size % 2)
    start = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[start : start + 2], "little")
    entries = [content[start + 2 + 12 * each : start + 14 + 12 * each] for each in range(count)]
    entries = [entry for entry in entries if entry[:2] != struct.pack("<H", 274)]
    entries = sorted([*entries, struct.pack("<HHIHH", 274, 3, 1, orientation, 0)], key=lambda entry: entry[1::-1])
    following = content[start + 2 + 12 * count : start + 6 + 12 * count]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + following
    path.write_bytes(content[:4] + struct.pack("<I", len(content)) + content[8:] + directory)


def write_turned(path, pixels, orientation, **options):
    write(path, pixels, **options)
    set_orientation(path, orientation)


CUT_ALPHA = np.where(np.indices((SIDE, SIDE))[0] < 20, 0, 255).astype(np.uint8)
KINDS = {
    "a.jpg": lambda path: save(path, PHOTO, quality=95),
    "cmyk.jpg": lambda path: save(path, PHOTO.convert("CMYK"), quality=95),
    "turned.jpg": lambda path: with_orientation(path, 6),
    "drone.jpg": with_exif_that_cannot_be_written,
    "a.png": lambda path: save(path, PHOTO),
    "alpha.png": lambda path: save(path, Image.fromarray(BYTES.transpose(1, 2, 0))),
    "grey_alpha.png": lambda path: save(path, PHOTO.convert("LA")),
    "palette.png": lambda path: save(path, PHOTO.quantize(40), transparency=3),
    "grey16.png": lambda path: save(path, Image.fromarray(DEEP[0])),
    "rgb16.png": lambda path: write(path, DEEP[:3], driver="PNG"),
    "a.bmp": lambda path: save(path, PHOTO),
    "a.gif": lambda path: save(path, PHOTO),
    "a.webp": lambda path: save(path, PHOTO, lossless=True),
    "a.tif": lambda path: write(path, BYTES[:3], photometric="rgb"),
    "jpeg_in.tif": lambda path: write(path, SMOOTH, photometric="ycbcr", compress="jpeg"),
    "rgb16.tif": lambda path: write(path, DEEP[:3], photometric="rgb"),
    "grey16.tif": lambda path: write(path, DEEP[:1]),
    "negative.tif": lambda path: write(path, DEEP[:3].astype(np.int16) - 700),
    "float.tif": lambda path: write(path, (DEEP[:3] / 20000).astype(np.float32)),
    "no_data.tif": lambda path: write(path, np.where(CUT_ALPHA, BYTES[:3], 0), nodata=0, photometric="rgb"),
    "no_data_white.tif": lambda path: write(path, np.where(CUT_ALPHA, BYTES[:3], 255), nodata=255, photometric="rgb"),
    "no_data16.tif": lambda path: write(path, np.where(CUT_ALPHA, DEEP[:3], 65535), nodata=65535),
    "masked.tif": lambda path: write(path, BYTES[:3], mask=CUT_ALPHA, photometric="rgb"),
    "palette.tif": lambda path: write(path, BYTES[:1] % 32, colormap=COLOURS),
    "palette_later.tif": lambda path: write(path, BYTES[:1] % 32, colormap=COLOURS, later=True),
    "bgrn.tif": lambda path: write(path, DEEP, colours=["blue", "green", "red", "undefined"]),
    "bgr.tif": lambda path: write(path, BYTES[:3], colours=["blue", "green", "red"], photometric="minisblack"),
    "alpha.tif": lambda path: write(
        path, np.concatenate([BYTES[:3], CUT_ALPHA[None]]), photometric="rgb", alpha="yes"
    ),
    "turned_grey.tif": lambda path: write_turned(path, BYTES[:1], 6),
    "turned_deep_grey.tif": lambda path: write_turned(path, DEEP[:1], 8),
    "turned_deep.tif": lambda path: write_turned(path, DEEP[:3], 3, photometric="rgb"),
    "turned_no_data.tif": lambda path: write_turned(path, BYTES[:3], 7, nodata=0, photometric="rgb"),
    "complex_int16.tif": lambda path: write(path, DEEP[:1].astype(np.complex64), dtype="complex_int16"),
    "one_bit.tif": lambda path: write(path, BYTES[:1] % 2, nbits=1),
    "white_is_0.tif": lambda path: write(path, BYTES[:1], photometric="miniswhite"),
    "a.jp2": lambda path: write(path, BYTES[:3], driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES"),
}


UNKNOWN_TO_PILLOW = ("negative.tif", "float.tif", "no_data16.tif", "bgrn.tif", "bgr.tif", "complex_int16.tif")


def processed(image):
    pixels = IeftImageProcessor(SIDE)(image)["pixel_values"][0]
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", KINDS)
def test_every_way_gives_the_same_pixels(tmp_path, monkeypatch, name):
    path = tmp_path / name
    KINDS[name](path)
    expected = np.asarray(read_image(path))
    assert expected.shape == (SIDE, SIDE, 3) and expected.std() > 20
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"image": name, "captions": ["a field ."], "split": split, "id": split})
                  for split in ("test",)) + "\n"
        + json.dumps({"image": "other.png", "captions": ["a pond ."], "split": "train"}) + "\n"
        + json.dumps({"image": "more.png", "captions": ["a lake ."], "split": "validation"})
    )  # fmt: skip
    for seed, other in enumerate(("other.png", "more.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 9, 3), np.uint8)).save(tmp_path / other)
    ways = {
        "bytes": np.asarray(read_image(path.read_bytes())),
        "processor, path": processed(str(path)),
        "dataset": np.asarray(
            to_rgb(load_retrieval_dataset(str(tmp_path / "rows.jsonl"), cache_dir=tmp_path)["test"][0]["image"])
        ),
        "index, whole": np.asarray(read_hit({"file": str(path), "tiling": "", "bands": None})),
    }
    if name.rpartition(".")[2] in ("jpg", "png", "bmp", "gif", "webp", "tif"):
        ways["page"] = np.asarray(read_upload(str(path)))
    if name not in UNKNOWN_TO_PILLOW:
        ways["processor, PIL"] = processed(Image.open(path))
    window = Window(10, 20, 30, 25)
    with Scene(path) as scene:
        ways["tile"] = np.asarray(scene.read(window))
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    with Scene(path) as scene:
        ways["tile by window"] = np.asarray(scene.read(window))
    for way, pixels in ways.items():
        wanted = expected[20:45, 10:40] if way.startswith("tile") else expected
        if name in ("jpeg_in.tif",) and way == "tile by window":
            assert np.abs(pixels.astype(int) - wanted).mean() < 2, way  # another decoder of JPEG
        else:
            assert np.array_equal(pixels, wanted), way


def test_the_colours_are_those_that_the_file_means(tmp_path):
    def read(name):
        KINDS[name](tmp_path / name)
        return np.asarray(read_image(tmp_path / name))

    palette = np.array([COLOURS[level] for level in range(32)], np.uint8)[BYTES[0] % 32]
    assert np.array_equal(read("palette.tif"), palette) and np.array_equal(read("palette_later.tif"), palette)
    assert np.array_equal(read("bgr.tif"), BYTES[2::-1].transpose(1, 2, 0))
    assert np.array_equal(read("white_is_0.tif")[:, :, 0], 255 - BYTES[0])
    for name in ("no_data.tif", "no_data_white.tif", "no_data16.tif", "masked.tif", "alpha.tif"):
        shown = read(name)
        assert not shown[:20].any() and shown[20:].std() > 20, name
    KINDS["drone.jpg"](tmp_path / "drone.jpg")
    turned = np.asarray(read_image(tmp_path / "drone.jpg")).astype(int)
    upright = np.asarray(Image.fromarray(SMOOTH.transpose(1, 2, 0)).rotate(-90))
    assert np.abs(turned - upright).mean() < 30 < np.abs(turned - SMOOTH.transpose(1, 2, 0)).mean()
    with pytest.raises(TypeError), Image.open(tmp_path / "drone.jpg") as image:
        ImageOps.exif_transpose(image)


UPRIGHT = {
    2: lambda image: image[:, ::-1], 3: lambda image: image[::-1, ::-1], 4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2), 6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("options", [{"photometric": "rgb"}, {"photometric": "rgb", "nodata": 0}, {}])
def test_every_tiff_is_turned_upright_whole_and_by_window(tmp_path, monkeypatch, orientation, options):
    path = tmp_path / "a.tif"
    stored = BYTES[:3, :40] if options else DEEP[:1, :40]  # higher than wide, and wider than high
    write(path, stored, **options)
    expected = UPRIGHT[orientation](np.asarray(read_image(path)))
    set_orientation(path, orientation)
    for file in (path, path.read_bytes()):
        assert np.array_equal(np.asarray(read_image(file)), expected)
    assert np.array_equal(np.asarray(to_rgb(Image.open(path))), expected) or "nodata" in options
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    with Scene(path) as scene:
        assert (scene.height, scene.width) == expected.shape[:2]
        assert np.array_equal(np.asarray(scene.read(Window(3, 7, 20, 30))), expected[7:37, 3:23])


def test_deep_colours_that_pillow_would_clip_are_refused_by_name(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 64 64 65535\n" + DEEP[:3].transpose(1, 2, 0).astype(">u2").tobytes())
    with pytest.raises(ValueError, match=r"a\.ppm cannot be read as an image: .* bit depth"):
        read_image(path)
    path.write_bytes(b"P6 64 64 255\n" + BYTES[:3].transpose(1, 2, 0).tobytes())
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(PHOTO))


ASKED = {
    "four bands": lambda path: write(path, BYTES, photometric="minisblack"),
    "alpha that is none": lambda path: write(path, BYTES, photometric="rgb", alpha="yes"),
    "thirteen bands": lambda path: write(path, np.concatenate([DEEP] * 3 + [DEEP[:1]])),
    "two bands": lambda path: write(path, DEEP[:2]),
}


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("most_pixels", [None, 0])
def test_what_would_have_to_be_guessed_is_asked_for_by_every_way(tmp_path, monkeypatch, kind, most_pixels):
    path = tmp_path / "a.tif"
    ASKED[kind](path)
    bands = (1,) if kind == "two bands" else (2, 1, 4) if kind != "alpha that is none" else (1, 2, 3)
    expected = np.asarray(read_image(path, bands=bands))
    if most_pixels is not None:
        monkeypatch.setattr(images, "MAX_PIXELS", most_pixels)
    with pytest.raises(ValueError, match="such as --bands"), Scene(path) as scene:
        scene.read(Window(0, 0, 9, 9))
    with Scene(path, bands=bands) as scene:
        assert np.array_equal(np.asarray(scene.read(Window(3, 2, 9, 9))), expected[2:11, 3:12])
    with pytest.raises(ValueError, match="such as --bands"):
        IeftImageProcessor(SIDE)(str(path))
    assert expected.std() > 20


def test_floats_from_0_to_1_are_the_bytes_they_were_made_of():
    array = np.asarray(PHOTO)
    expected = IeftImageProcessor(32)(PHOTO)["pixel_values"]
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    for image in (tensor, tensor.numpy(), array / 255.0, array.astype(np.float16) / np.float16(255)):
        assert torch.equal(IeftImageProcessor(32)(image)["pixel_values"], expected)
    assert torch.equal(IeftImageProcessor(32)(tensor, do_rescale=False)["pixel_values"], expected)


def test_arrays_and_files_of_all_kinds_are_the_image_they_hold(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    content, array = (tmp_path / "a.png").read_bytes(), np.asarray(PHOTO).copy()
    expected = IeftImageProcessor(32)(PHOTO)["pixel_values"]
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    given = [tmp_path / "a.png", content, bytearray(content), io.BytesIO(content), tensor.clone().requires_grad_()]
    for image in (*given, [given[0]], np.dstack([array / 255, np.ones((SIDE, SIDE))])):
        assert torch.equal(IeftImageProcessor(32)(image)["pixel_values"], expected)
    assert (IeftImageProcessor(32)(tensor.to(torch.bfloat16))["pixel_values"] - expected).abs().max() < 0.02
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    assert torch.equal(IeftImageProcessor(32)(closed)["pixel_values"], expected)
    assert IeftImageProcessor(32)(array[:, :, 0])["pixel_values"].shape == (1, 3, 32, 32)
    for image in (None, 3, [None], {"bytes": content}, array.astype(object)):
        with pytest.raises(ValueError, match="An image"):
            IeftImageProcessor(32)(image)


@pytest.mark.parametrize("scale", [np.uint8(1), np.uint16(200), np.float32(1 / 255), np.float64(37)])
def test_what_an_array_marks_as_no_data_is_black_and_changes_nothing_else(scale):
    shown = BYTES[:3, 20:].transpose(1, 2, 0) * scale
    expected = np.asarray(array_to_rgb(shown))
    hidden = np.full((20, SIDE, 3), 200 * scale, shown.dtype)
    whole = np.concatenate([hidden, shown])
    mask = np.repeat(CUT_ALPHA[:, :, None] == 0, 3, axis=2)
    top = np.iinfo(shown.dtype).max if shown.dtype.kind == "u" else 1
    arrays = [np.ma.masked_array(whole, mask), np.dstack([whole, (CUT_ALPHA > 0) * top]).astype(shown.dtype)]
    arrays += [np.where(mask, np.nan, whole)] if shown.dtype.kind == "f" else []
    for array in arrays:
        pixels = np.asarray(array_to_rgb(array))
        assert not pixels[:20].any() and np.array_equal(pixels[20:], expected)


def test_a_fourth_band_of_an_array_that_holds_a_picture_is_asked_about():
    for array in (DEEP, DEEP / 1e5, BYTES, BYTES.transpose(1, 2, 0)):
        with pytest.raises(ValueError, match="choose three bands"):
            IeftImageProcessor(32)(array)


def test_without_the_full_reader_what_pillow_would_spoil_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(processing_ieft, "FULL_READER", None)
    for name in ("rgb16.tif", "rgb16.png", "no_data.tif", "bgrn.tif", "alpha.tif", "masked.tif"):
        KINDS[name](tmp_path / name)
        with pytest.raises(ValueError, match=name):
            IeftImageProcessor(32)(str(tmp_path / name))
    KINDS["a.tif"](tmp_path / "a.tif")
    assert IeftImageProcessor(32)(str(tmp_path / "a.tif"))["pixel_values"].shape == (1, 3, 32, 32)


# No file makes another be opened ------------------------------------------------------------------------------------


VRT = '<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>' \
      '<SourceFilename relativeToVRT="0">{}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>' \
      "</VRTRasterBand></VRTDataset>"  # fmt: skip
DISGUISED = {
    "VRT of a file": lambda secret: VRT.format(secret).encode(),
    "VRT of a URL": lambda secret: VRT.format("/vsicurl/http://127.0.0.1:9/x.tif").encode(),
    "ENVI header": lambda secret: b"ENVI\nsamples = 64\nlines = 64\nbands = 1\ndata type = 1\n",
    "WMS": lambda secret: (
        b"<GDAL_WMS><Service name='TMS'><ServerUrl>http://127.0.0.1:9/</ServerUrl></Service></GDAL_WMS>"
    ),
    "GeoJSON": lambda secret: b'{"type": "FeatureCollection", "features": []}',
    "EPS": lambda secret: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "nothing": lambda secret: b"",
}


@pytest.mark.parametrize("kind", DISGUISED)
@pytest.mark.parametrize("name", ["x.tif", "x.png"])
def test_only_formats_known_by_their_content_are_opened(tmp_path, kind, name):
    secret = tmp_path / "secret.tif"
    write(secret, BYTES[:1])
    (tmp_path / name).write_bytes(DISGUISED[kind](secret))
    for read in (
        read_image,
        Scene,
        lambda file: IeftImageProcessor(8)(str(file)),
        lambda file: read_upload(str(file)),
    ):
        with pytest.raises(ValueError):
            read(tmp_path / name)


def test_neighbours_of_a_file_are_not_taken_for_parts_of_it(tmp_path, monkeypatch):
    write(tmp_path / "a.tif", DEEP[:3], photometric="rgb")
    expected = np.asarray(read_image(tmp_path / "a.tif"))
    write(tmp_path / "a.tif.ovr", DEEP[:3, ::2, ::2] * 0)
    write(tmp_path / "a.tif.msk", BYTES[:1] * 0)
    (tmp_path / "a.tif.aux.xml").write_text(
        "<PAMDataset><PAMRasterBand band='1'><ColorInterp>Blue</ColorInterp><NoDataValue>400</NoDataValue>"
        "</PAMRasterBand></PAMDataset>"
    )
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif")), expected)
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    with Scene(tmp_path / "a.tif") as scene:
        assert np.array_equal(np.asarray(scene.read(Window(0, 0, SIDE, SIDE))), expected)


@pytest.fixture
def endless():
    """A server that never stops sending."""

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"\xff\xd8" + b"0" * 65536)
            except OSError:
                return

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x.jpg"
    server.shutdown()


def test_a_url_is_read_in_bounded_memory(endless, monkeypatch):
    monkeypatch.setattr(processing_ieft, "MAX_IMAGE_BYTES", 2**20)
    with pytest.raises(OSError, match="larger than 1,048,576 bytes"):
        IeftImageProcessor(8)(endless)
    with pytest.raises(ValueError, match="this base64 holds more"):
        IeftImageProcessor(8)("data:image/png;base64," + "A" * 2**21)
