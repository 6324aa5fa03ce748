"""Tests of the web page with a real process and a real browser, including what visitors must not have access to."""

import asyncio
import configparser
import io
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("gradio", reason="the page, extra `app`, is not installed")
pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

import httpx  # noqa: E402
from test_index import CAPTIONS, checkpoint, loaded  # noqa: E402, F401

from ieft.data.images import read_image  # noqa: E402
from ieft.page import command, visitors  # noqa: E402
from ieft.page.links import SETTINGS, read_link, write_link  # noqa: E402
from ieft.page.map_view import map_of, view_around  # noqa: E402
from ieft.page.page import SearchPage, name_of, tell_unplaced  # noqa: E402
from ieft.page.visitors import Gate, check_number, name_visitor, read_upload, write_filter  # noqa: E402
from ieft.search.archive_files import find_images  # noqa: E402
from ieft.search.explain import draw_heat_map, explain_pair  # noqa: E402
from ieft.search.index import ImageIndex  # noqa: E402
from ieft.search.queries import Query  # noqa: E402

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Gradio's client asks for the progress of an upload. Where that is over already the answer is 404, which Chromium and
# the client (as "Response") log; the client warns where it closes the stream. The upload itself is not touched.
UPLOAD_NOISE = ("/gradio_api/upload_progress?", "Method not implemented.", "Response {'url'")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE_NAME = "<img src=x onerror=alert(1)> it's 100%.tif"
REQUESTS_PER_MINUTE = 40
VISITORS = itertools.count(1)
PATIENCE = 120  # seconds; a test machine may be busy
DEFAULTS = [*SETTINGS.values()]  # the page's settings


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Twelve images of noise, two with bounds: one of them across the antimeridian, with a hostile name."""
    rasterio = pytest.importorskip("rasterio", reason="GeoTIFF, extra `geo`, is not installed")
    folder = tmp_path_factory.mktemp("archive") / "deep"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(10):
        pixels = noise.integers(0, 255, (40 + number, 40 + 5 * number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"Scene_{number:02}.png")
    places = {"placed.tif": ("EPSG:32631", 500000, 5400000, 10), HOSTILE_NAME: ("EPSG:4326", 179.98, -16, 0.001)}
    for name, (crs, left, top, pixel) in places.items():
        transform = rasterio.transform.from_origin(left, top, pixel, pixel)
        layout = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": crs, "transform": transform}
        with rasterio.open(folder / name, "w", width=60 if name == "placed.tif" else 40, height=40, **layout) as scene:
            scene.write(noise.integers(0, 255, (3, 40, scene.width), np.uint8))
            scene.update_tags(ACQUISITIONDATETIME="2021-07-01T10:00:00Z")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory, checkpoint, archive):  # noqa: F811
    """The page as a process, from a folder that holds no more than a Space does."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(ROOT / "ieft", folder / "ieft", ignore=shutil.ignore_patterns("__pycache__"))
    for source in [*ROOT.glob("*.py"), *ROOT.glob("space/*")]:
        shutil.copy(source, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = {"IEFT_MODEL": checkpoint, "IEFT_ARCHIVE": archive, "IEFT_INDEX": folder / "index.lance"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
    } | {name: str(value) for name, value in named.items()}  # fmt: skip
    log = folder / "log"
    started = [sys.executable, "app.py", "--requests_per_minute", str(REQUESTS_PER_MINUTE)]
    with open(log, "w") as output:
        process = subprocess.Popen(started, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "Running on" in log.read_text() or process.poll() is not None, 2 * PATIENCE)
        assert process.poll() is None, log.read_text()
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", log=log, index=named["IEFT_INDEX"], process=process)
    finally:
        process.terminate()
        process.wait(timeout=30)
    # Gradio logs how it refuses numbers out of bounds and paths that were not uploaded; no other error is raised.
    traces = re.findall(r"^Traceback.*?^\w\S*", log.read_text(), re.MULTILINE | re.DOTALL)
    refusals = ("gradio.exceptions.Error:", "gradio.exceptions.InvalidPathError:")
    assert [trace for trace in traces if not trace.endswith(refusals)] == []


@pytest.fixture(scope="module")
def index(served, loaded):  # noqa: F811
    return ImageIndex(served.index, loaded[0], processor=loaded[1])


def another_visitor():
    """Headers by which a proxy on this machine tells one visitor from others."""
    return {"X-Forwarded-For": f"203.0.113.{next(VISITORS)}"}


def wait_for(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, extra `test`, is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(served, browser):
    """A function that opens the page. Afterwards: nothing on the console, nothing asked of another host."""
    complaints, pages = [], []

    def open_page(*, expected=(), **options):
        options = {"viewport": {"width": 1280, "height": 900}, "extra_http_headers": another_visitor(), **options}
        context = browser.new_context(**options)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        pages.append(context)

        def note(kind, text):
            if not any(part in text for part in expected):
                complaints.append(f"{kind}: {text}")

        page.on("console", lambda message: note(message.type, f"{message.text} {message.location}"))
        page.on("pageerror", lambda error: note("exception", str(error)))
        page.on("dialog", lambda dialog: (note("dialog", dialog.message), dialog.dismiss()))
        page.on("request", lambda request: check_host(request.url))
        page.goto(served.url)
        page.wait_for_selector("#ask")
        return page

    def check_host(url):
        if not url.startswith((served.url, "data:", "blob:")):
            complaints.append(f"asked of another host: {url}")

    yield open_page
    for context in pages:
        context.close()
    assert "\n".join(complaints) == ""


def ask(page, caption):
    page.fill("#caption textarea", caption)
    page.click("#ask")


def upload(page, file, name=None):
    page.wait_for_selector("#by_image")
    if not page.locator("#upload").is_visible():
        page.click("#by_image > button")
    content = {"name": name or "photo.png", "mimeType": "image/png", "buffer": file}
    page.set_input_files("#upload input[type=file]", content)


def labels(page):
    page.wait_for_selector("#gallery .caption-label")
    return [" ".join(text.split()) for text in page.locator("#gallery .caption-label").all_inner_texts()]


def expected_labels(hits):
    return [f"{hit['rank']}. {hit['score']:.2f} {hit['stage']}" for hit in hits]


def message(page):
    """The text of the message that came up, which is then closed."""
    page.wait_for_selector(".toast-body")
    text = page.inner_text(".toast-body")
    page.click(".toast-close")
    page.wait_for_selector(".toast-body", state="detached")
    return " ".join(text.split())


def shown_picture(page):
    source = page.wait_for_selector("#picture img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def difference(image, other):
    return np.abs(np.asarray(image, dtype=float) - np.asarray(other.resize(image.size), dtype=float)).mean()


def has_no_sideways_scroll(page):
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return width <= window


def test_a_sentence_finds_images_and_a_click_says_why(open_page, index, loaded):  # noqa: F811
    page = open_page()
    ask(page, CAPTIONS[0])
    hits = index.search(CAPTIONS[0], top_k=12)
    assert labels(page) == expected_labels(hits)
    times = ", ".join(rf"{stage} [\d,]+ ms" for stage in ("embed", "shortlist", "re-rank", "thumbnails"))
    assert re.fullmatch(rf"12 of 12 images\. Time taken: {times}\.", page.inner_text("#summary"))
    page.locator("#gallery .thumbnail-item").nth(1).click()
    page.wait_for_selector("#reasons .word")
    assert Path(hits[1]["file"]).name in page.inner_text("#reasons table")
    picture = read_image(hits[1]["file"])
    explanation = explain_pair(*loaded, picture, CAPTIONS[0])
    words = [" ".join(text.split()) for text in page.locator("#reasons .word").all_inner_texts()]
    assert words == [f"{word} {part:+.2f}" for word, part in explanation.words]
    shown = shown_picture(page)
    assert difference(shown, draw_heat_map(picture, explanation.heat)) < 20 < difference(shown, picture)
    # More like this one, less like another, and without what a second sentence says; the link asks the same.
    page.fill("#without textarea, #without input", CAPTIONS[1])
    page.click("#more")
    wanted, unwanted = [CAPTIONS[0], hits[1]], [CAPTIONS[1]]
    more = index.search(Query(wanted, unwanted), top_k=12)
    wait_for(lambda: labels(page) == expected_labels(more))
    page.locator("#gallery .thumbnail-item").nth(2).click()
    page.wait_for_function(f"document.querySelector('#reasons table')?.innerText.includes({name_of(more[2])!r})")
    page.click("#less")
    less = index.search(Query(wanted, [*unwanted, more[2]]), top_k=12)
    wait_for(lambda: labels(page) == expected_labels(less))
    chosen = [f"like {name_of(hits[1])}", f"not like {name_of(more[2])}"]
    assert page.locator("#liked label").all_inner_texts() == chosen
    wait_for(lambda: page.url.count("examples=") == 2)
    page.reload()
    assert labels(page) == expected_labels(less) and page.locator("#liked label").all_inner_texts() == chosen
    page.locator("#liked input").last.uncheck()
    wait_for(lambda: labels(page) == expected_labels(more))


def test_an_image_finds_itself_and_a_click_shows_it(open_page, index, archive):
    index.add_captions(["a <b>lake</b> & two ships", *CAPTIONS[:2]])
    page = open_page(expected=UPLOAD_NOISE)
    file = archive / "Scene_04.png"
    upload(page, file.read_bytes())
    hits = index.search_image(read_image(file), top_k=12)
    assert labels(page) == expected_labels(hits) and labels(page)[0] == "1. 1.00 shortlist"
    page.locator("#gallery .thumbnail-item").first.click()
    assert difference(shown_picture(page), read_image(file)) < 20
    assert "Scene_04.png" in page.inner_text("#reasons") and not page.locator("#reasons .word").count()
    fitting = [hit["caption"] for hit in index.search_captions(read_image(file))]
    assert [text.rsplit(" ", 1)[0] for text in page.locator("#captions li").all_inner_texts()] == fitting
    assert "a <b>lake</b> & two ships" in fitting and not page.locator("#link a").count()
    # Asked again, it is the same image, not the picture of it on the page.
    page.click("#filters > button")
    page.get_by_label("File name contains").fill("Scene_04")
    page.click("#ask")
    summary(page, "1 of 1")
    assert labels(page) == ["1. 1.00 shortlist"]


def while_answered(page, first, second):
    """Do the second while the answer to the first is on its way."""
    held = []
    pattern = "**/gradio_api/queue/data*"
    page.route(pattern, lambda route: route.continue_() if held else held.append(route))
    with page.expect_request(pattern):
        first()
    second()
    held[0].continue_()
    page.unroute(pattern)


def test_what_is_shown_is_what_was_last_asked(open_page, index):
    page = open_page()
    while_answered(page, lambda: ask(page, CAPTIONS[0]), lambda: ask(page, CAPTIONS[1]))
    page.wait_for_url(lambda url: parse_qsl(url.partition("?")[2]) == [("sentence", CAPTIONS[1])])
    hits = index.search(CAPTIONS[1], top_k=12)
    assert labels(page) == expected_labels(hits)
    found = page.locator("#gallery .thumbnail-item")
    found.nth(4).click()
    page.wait_for_function(f"document.querySelector('#reasons table')?.innerText.includes({name_of(hits[4])!r})")
    assert page.locator("#gallery .thumbnail-item.selected").get_attribute("aria-label") == labels(page)[4]
    # What is selected of a search before, while the next one is answered, is not taken for another image.
    page.evaluate("searchMap.trigger('select', {index: 1, label: '2. of a search before.tif'})")
    assert "select again" in message(page) and name_of(hits[4]) in page.inner_text("#reasons table")


def test_what_cannot_be_searched_gets_a_message_and_the_page_goes_on(open_page):
    page = open_page(expected=UPLOAD_NOISE)
    page.click("#ask")
    assert "Write a sentence first" in message(page)
    upload(page, b"no image at all")
    assert "cannot be read as an image" in message(page)
    page.wait_for_selector("#upload input[type=file]", state="attached")  # the place is free again
    upload(page, bytes(visitors.LARGEST_UPLOAD + 1))
    assert "exceed the maximum allowed size of 10" in message(page)
    upload(page, png_of_size(60_000, 60_000))
    assert "pixels expected" in message(page)
    upload(page, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.eps")
    assert "cannot be read as an image" in message(page)
    page.click("#by_image > button")
    ask(page, CAPTIONS[1])
    assert len(labels(page)) == 12


def test_filters_and_geojson(open_page, archive):
    page = open_page()
    page.click("#filters button")
    page.get_by_label("SQL condition").fill("no_column > 1")
    ask(page, CAPTIONS[0])
    assert "An SQL condition must compare these columns: file, content" in message(page)
    page.get_by_label("SQL condition").fill("width >= 60")
    page.get_by_label("Only with geographic bounds").check()
    page.click("#ask")
    assert labels(page)[0].startswith("1.") and len(labels(page)) == 1
    with page.expect_download() as download:
        page.click("#geojson")
    assert download.value.suggested_filename == "hits.geojson"
    text = Path(download.value.path()).read_text()
    assert str(archive) not in text
    feature = json.loads(text)["features"][0]
    assert feature["properties"]["file"] == "placed.tif" and feature["properties"]["rank"] == 1
    assert feature["geometry"]["coordinates"][0][0] == pytest.approx([3.0, 48.75], abs=0.01)


def outlines(page):
    """What the map draws of the hits: the names of its markers, and the number of its outlines."""
    page.wait_for_selector("#map .rank", state="attached")
    names = page.locator("#map .rank").evaluate_all("found => found.map(each => each.getAttribute('aria-label'))")
    return names, page.locator("#map path.outline").count()


def drag(page, corner, other):
    """Drag over the map, from one corner to another as parts of its width and height."""
    box = page.locator("#map .map").bounding_box()
    for step, (x, y) in enumerate((corner, other)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)
        page.mouse.up() if step else page.mouse.down()


def summary(page, start):
    page.wait_for_function(f"document.querySelector('#summary')?.innerText.startsWith({start!r})")
    return page.inner_text("#summary")


def test_hits_are_on_a_map_where_a_box_is_a_filter_and_a_link_reopens_the_search(open_page, index, served):
    page = open_page()
    page.wait_for_selector("#map .leaflet-container, #map .map.leaflet-container")  # before anything is asked
    ask(page, CAPTIONS[0])
    names = [Path(hit["file"]).name for hit in index.search(CAPTIONS[0], top_k=12)]
    placed = {name: f"{names.index(name) + 1}. {name}" for name in ("placed.tif", HOSTILE_NAME)}
    labels(page)
    shown, drawn = outlines(page)
    assert set(shown) == set(placed.values()) and drawn == 2  # the one across the antimeridian is whole
    assert "2 of 12 images are on the map" in page.inner_text("#unplaced")
    # Selected on the map, shown in the gallery and explained, and the other way round.
    page.get_by_role("button", name=placed[HOSTILE_NAME]).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#reasons .word")
    assert HOSTILE_NAME in page.inner_text("#reasons table") and HOSTILE_NAME in page.inner_text(
        "#map .leaflet-tooltip"
    )
    page.wait_for_selector(f"#gallery .grid-container > :nth-child({names.index(HOSTILE_NAME) + 1}) .selected")
    page.locator("#gallery .thumbnail-item").nth(names.index("placed.tif")).click()
    page.wait_for_selector("#map .rank.chosen[aria-label$='placed.tif'][aria-pressed=true]")
    assert page.locator("#map path.outline.chosen").count() == 1
    # A box: drawn, written in its filter, part of the link.
    page.click("#filters > button")
    page.click("#map .draw")
    seen = page.evaluate("searchMap.map.getBounds().toBBoxString()").split(",")  # of both: across the antimeridian
    assert float(seen[0]) < 3 and float(seen[2]) > 180
    drag(page, (0.02, 0.02), (0.6, 0.6))
    assert "1 of 1 images" in summary(page, "1 of 1")
    west, south, east, north = map(float, page.input_value("#bbox input, #bbox textarea").split(","))
    assert west < 3 < east < 179 and south < 48 < north and outlines(page)[0] == ["1. placed.tif"]
    page.wait_for_selector("#map path.box", state="attached")
    page.wait_for_url(re.compile("bbox="))
    again = page.context.new_page()
    again.goto(page.url)
    assert "1 of 1 images" in summary(again, "1 of 1") and again.input_value("#caption textarea") == CAPTIONS[0]
    again.close()
    page.click("#map .clear")
    assert "12 of 12 images" in summary(page, "12 of 12") and "bbox" not in page.get_attribute("#link a", "href")
    # The view as a box, and time as a range.
    page.fill("#bbox input, #bbox textarea", "179, -20, -179, -10")
    page.fill("#acquired_from input, #acquired_from textarea", "2021-06")
    page.fill("#acquired_to input, #acquired_to textarea", "2021-08")
    page.click("#ask")
    assert "1 of 1 images" in summary(page, "1 of 1") and outlines(page)[0] == [f"1. {HOSTILE_NAME}"]
    page.click("#map .here")
    page.wait_for_function("!document.querySelector('#bbox input, #bbox textarea').value.startsWith('179, ')")
    west, south, east, north = map(float, page.input_value("#bbox input, #bbox textarea").split(","))
    assert 179 < west < 180 and -180 < east < -179 and -17 < south < north < -15
    assert page.evaluate("document.querySelector('#summary [role=status]').getAttribute('aria-live')") == "polite"
    # Tiles are asked for where a base map is configured, and only then; coastlines are not drawn then.
    asked = []
    tile = png_of_size(1, 1)
    page.route("**/tiles/**", lambda route: (asked.append(route.request.url), route.fulfill(body=tile)))
    base = {"url": f"{served.url}/tiles/{{z}}/{{x}}/{{y}}.png", "credit": "Tiles by <b>someone</b>"}
    page.evaluate("base => { searchMap.props.value = {...searchMap.props.value, base}; searchMap.show(); }", base)
    page.wait_for_selector("#map .leaflet-tile", state="attached")
    assert "Tiles by someone" in page.inner_text("#map .leaflet-control-attribution")
    wait_for(lambda: asked)
    assert not page.locator("#map path.land").count()


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_the_map_on_a_phone_and_in_the_dark(open_page, width, scheme):
    page = open_page(viewport={"width": width, "height": 844}, has_touch=width == 390, color_scheme=scheme)
    ask(page, CAPTIONS[0])
    labels(page)
    assert has_no_sideways_scroll(page) and len(outlines(page)[0]) == 2
    box = page.locator("#map .map").bounding_box()
    assert box["x"] >= 0 and box["width"] > (300 if width == 390 else 400) and box["x"] + box["width"] <= width
    for name in ("draw", "here", "clear"):
        assert page.locator(f"#map .{name}").bounding_box()["height"] >= 24  # a finger hits it
    background, text = page.evaluate(
        "['#map .map', '#map .degrees'].map(each => getComputedStyle(document.querySelector(each)))"
        ".map((style, at) => at ? style.color : style.backgroundColor)"
    )
    if width == 390:  # names are text there too
        page.click("#filters > button")
        page.get_by_label("File name contains").fill("ONERROR=alert(1)> it's 100%")
        page.get_by_text("a curved river with a bridge over it").click()  # an example is searched for at once
        assert "1 of 1 images" in summary(page, "1 of 1")
        page.locator("#gallery .thumbnail-item").tap()
        page.wait_for_selector("#reasons .word")
        assert HOSTILE_NAME in page.inner_text("#reasons table") and has_no_sideways_scroll(page)
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (background, text)]
    assert lightness[0] < 0.3 < lightness[1] if scheme == "dark" else lightness[0] > 0.8 > lightness[1]


def test_too_many_requests_get_a_message(open_page, served):
    visitor = another_visitor()
    page = open_page(extra_http_headers=visitor, expected=("429 (Too Many Requests)",))  # Chromium logs the answer
    with httpx.Client(base_url=served.url, headers=visitor) as client:
        flood(client)
    ask(page, CAPTIONS[0])
    assert f"More than {REQUESTS_PER_MINUTE} requests in a minute" in message(page)


# ---- over HTTP


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served.url, timeout=PATIENCE, headers=another_visitor()) as client:
        yield client


def call(client, name, *data):
    """What the page answers: its outputs, or its error's text."""
    endpoints = client.get("/config").json()["dependencies"]
    number = next(endpoint["id"] for endpoint in endpoints if endpoint["api_name"] == name)
    session = os.urandom(6).hex()
    body = {"data": data, "fn_index": number, "session_hash": session}
    client.post("/gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data: ") or "{}")
            if event.get("msg") == "process_completed":
                output = event["output"]
                return output["data"] if event["success"] else str(output["error"])


def asked(sentence="", *settings, image=None, without="", examples=()):
    """What the page and its API take, in their order."""
    return [sentence, without, image, list(examples), *(settings or DEFAULTS)]


def captions_of(outputs):
    gallery = next(part for part in outputs if isinstance(part, dict) and isinstance(part.get("value"), list))
    return [shown["caption"].split() for shown in gallery["value"]]


def flood(client):
    statuses = [client.post("/gradio_api/queue/join", json={}).status_code for _ in range(REQUESTS_PER_MINUTE + 5)]
    assert statuses[0] != 429 and statuses[-5:] == [429] * 5
    return statuses


def png_of_size(width, height):
    """A PNG that says so, without the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_stages_and_settings(client, index):
    shown = captions_of(call(client, "page", *asked(CAPTIONS[0], 8, 3, *DEFAULTS[2:])))
    hits = index.search(CAPTIONS[0], top_k=8, rerank_top_k=3)
    assert [" ".join(words) for words in shown] == expected_labels(hits)
    assert [words[2] for words in shown] == ["re-ranked"] * 3 + ["shortlist"] * 5
    assert "Images to show: a whole number" in call(client, "page", *asked(CAPTIONS[0], 10**9, *DEFAULTS[1:]))


def example(kind, served, folder, archive):
    """An example of the documentation with the address of this page; a photograph of the archive beside it."""
    shutil.copy(archive / "Scene_03.png", folder / "photo.png")
    text = (ROOT / "docs" / "api.md").read_text().split(f"```{kind}\n")[1].split("```")[0]
    return text.replace("http://127.0.0.1:7860", served.url)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_example_with_curl(served, tmp_path, archive, index):
    script = ["bash", "-c", example("bash", served, tmp_path, archive)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found, explained, similar = map(json.loads, done.stdout.splitlines())
    hits = found[0]["hits"]
    assert found[0]["images"] == 12 and [hit["rank"] for hit in hits] == [1, 2, 3]
    query = Query(["many ships beside a beach"], ["planes"])
    assert [hit["name"] for hit in hits] == [Path(hit["file"]).name for hit in index.search(query, top_k=3)]
    assert explained[0]["id"] == hits[0]["id"] and [each["word"] for each in explained[0]["words"]][:2] == [
        "many",
        "ships",
    ]
    assert explained[1]["url"].startswith(served.url)
    assert [hit["rank"] for hit in similar[0]["hits"]] == [1, 2, 3] and similar[0]["hits"][0]["name"] == "Scene_03.png"
    assert str(archive.parent) not in json.dumps([found, similar, explained[0]])


def test_the_example_with_the_client_of_gradio(served, tmp_path, archive, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("python", served, tmp_path, archive), names)  # noqa: S102
    *_, first, second, third, reasons = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (first, second, third)] == ["1", "2", "3"] and "'word': 'many'" in reasons
    assert max(Image.open(names["heat_map"]).size) <= 512
    assert (
        names["found"]["hits"][0]["name"] == "Scene_03.png" and names["more"]["hits"][0]["id"] == names["best"]["id"]
    )


def test_what_the_api_is_asked_is_checked_and_counted(client, served):
    assert "Write a sentence first" in call(client, "search", *asked(without="planes"))
    known = call(client, "search", *asked(CAPTIONS[0]))[0]["hits"][0]["id"]
    many = [f"+{number}.0.0" for number in range(9)]
    for examples, said in (
        (["x"], "with + or -"), (["+x"], "The id of an image"), (["+a.1.2"], "not in the archive"),
        (["+" + known] * 2, "Each example once"), (many, "Up to 8"), ("+a", "as a list"),
    ):  # fmt: skip
        assert said in call(client, "search", *(asked()[:3] + [examples] + DEFAULTS)), examples
    for crafted in ("' OR 1=1 --", "a\\'b.0.0", "a'b.0.0", "\0.0.0", 5, None, ["a.0.0"]):
        assert "The id of an image" in call(client, "explain", crafted, CAPTIONS[0]), crafted
    with httpx.Client(base_url=served.url, headers=another_visitor()) as other:
        for _ in range(REQUESTS_PER_MINUTE):
            other.post("/gradio_api/call/v2/search", json={})
        assert other.post("/gradio_api/call/v2/search", json={"sentence": CAPTIONS[0]}).status_code == 429


def test_no_file_is_served_but_the_pages_own(client, checkpoint, archive, served):  # noqa: F811
    secrets = ["/etc/passwd", checkpoint / "config.json", archive / "Scene_00.png", served.index, served.log]
    paths = [f"/gradio_api/file={secret}" for secret in secrets]
    paths += [f"/gradio_api/file=/{secret}" for secret in secrets]
    shown = call(client, "page", *asked(CAPTIONS[0]))
    gallery = next(part for part in shown if isinstance(part, dict) and isinstance(part.get("value"), list))
    thumbnail = gallery["value"][0]["image"]["path"]
    assert client.get(f"/gradio_api/file={thumbnail}").status_code == 200
    folder = Path(thumbnail).parent.parent
    up = "/".join([".."] * len(folder.parts))
    paths += [f"/gradio_api/file={folder}/{up}{secret}" for secret in secrets]
    paths += [f"/gradio_api/file={folder}/%2e%2e/%2e%2e{secret}" for secret in secrets]
    paths += ["/gradio_api/file=app.py", "/gradio_api/file=index.lance", "/gradio_api/file=http://127.0.0.1/"]
    paths += ["/web/../page.py", "/web/%2e%2e/page.py", "/web/page.py", "/web//etc/passwd", "/web/"]
    paths += [
        "/gradio_api/call/page/abc",
        "/gradio_api/openapi.json",
        "/app.py",
        "/static/%2e%2e/%2e%2e/%2e%2e/__init__.py",
        "/assets/..%2f..%2f..%2froutes.py",
    ]
    paths += ["/gradio_api/proxy=http://127.0.0.1/", "/docs", "/openapi.json", "/monitoring", "/gradio_api/vibe-code"]
    for path in paths:
        answer = client.get(path)
        assert answer.status_code in (403, 404), path
        assert "detail" in answer.json() and len(answer.content) < 1000, path
    for path in (
        "/gradio_api/run/search",
        "/gradio_api/call/v2/page",
        "/gradio_api/call/search",
        "/gradio_api/vibe-edit",
        "/gradio_api/process_recording",
        "/login",
    ):
        assert client.post(path, json={}).status_code == 404


def test_an_upload_must_have_been_uploaded(client, checkpoint, archive):  # noqa: F811
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, format="PNG")
    sent = client.post("/gradio_api/upload", files={"files": ("a.png", picture.getvalue())}).json()[0]
    upload = {"path": sent, "meta": {"_type": "gradio.FileData"}}
    assert len(call(client, "search", *asked(image=upload))[0]["hits"]) == 12
    for path in ("/etc/passwd", str(archive / "Scene_00.png"), str(checkpoint / "config.json"), "app.py"):
        for name in ("page", "search"):
            assert isinstance(call(client, name, *asked(image=upload | {"path": path})), str), path
    elsewhere = upload | {"path": "http://93.184.216.34/photo.png"}
    assert "not the address" in call(client, "search", *asked(image=elsewhere))
    assert "not the address" in call(client, "search", *asked(elsewhere))


def test_uploads_and_questions_are_bounded(client):
    too_large = client.post("/gradio_api/upload", files={"files": ("a.png", bytes(visitors.LARGEST_UPLOAD + 1))})
    assert too_large.status_code == 413
    half = bytes(visitors.LARGEST_UPLOAD // 2)
    three = client.post("/gradio_api/upload", files=[("files", (f"{number}.png", half)) for number in range(3)])
    assert three.status_code == 413 and "At most 10 MB" in three.json()["detail"]
    question = {"data": ["a" * visitors.LARGEST_QUESTION]}
    assert client.post("/gradio_api/queue/join", json=question).status_code == 413
    unmeasured = client.post("/gradio_api/upload", content=iter([b"a"] * 3))
    assert unmeasured.status_code == 411
    assert "up to 500 characters" in call(client, "search", *asked("a" * 501))


@pytest.mark.parametrize(
    "place, value, said",
    [
        (6, "length(repeat('x', 400000000)) > 1", "&#x27;repeat&#x27; cannot stand in one"),
        (6, "1=1; DROP TABLE images", "cannot stand in one"),
        (6, "file = 5", "a value of the column"),
        (6, ["width > 1"], "A condition as text"),
        (6, {"a": 1}, "A condition as text"),
        (0, 2.5, "whole number"),
        (6, "acquired > '2021'", "acquired &gt;= timestamp &#x27;2021-06-01&#x27;"),
        (0, "12", "Images to show: a whole number from 1 to 48 expected; got 12"),
        (1, -1, "Images to re-rank: a whole number from 0 to 64"),
        (2, 10**12, "Width, at least: a whole number from 0 to 1,000,000"),
        (3, [1], "Height, at least: a whole number"),
        (4, ["a"], "A part of a file name as text"),
        (5, "maybe", "True or false"),
        (7, "1, 2, 3", "bbox must be west, south, east and north"),
        (8, "yesterday", "datetime must be a time such as"),
        (9, "2021/2022", "datetime must be a time such as"),
        (10, 0, "A weight from 0.05 to 4 expected"),
        (11, float("1e9"), "A weight from 0.05 to 4 expected"),
        (12, 2, "A probability from 0 to 1 expected"),
        (12, 0.5, "by a calibrated network"),
    ],
    ids=lambda each: ascii(each)[:30],
)  # fmt: skip
def test_a_crafted_setting_gets_a_message_that_names_it(client, place, value, said):
    settings = [value if at == place else was for at, was in enumerate(DEFAULTS)]
    answer = call(client, "search", *asked(CAPTIONS[0], *settings))
    assert isinstance(answer, str), answer
    assert said in answer and "damaged" not in answer
    assert "/" not in re.sub(r"/&gt;|-\d\d/|/?\.\./?|2021/", "", answer)  # no path; HTML and intervals have one


@pytest.mark.parametrize("content", [
    b"\xff\xfe", b"[]", b'{"data": [], "fn_index": 999, "session_hash": "x"}',
    b'{"data": "x", "fn_index": 0, "session_hash": "x"}', b'{"data": [], "fn_index": -1, "session_hash": "x"}',
])  # fmt: skip
def test_a_crafted_request_is_refused_without_a_traceback(client, served, content):
    answer = client.post("/gradio_api/queue/join", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and "detail" in answer.json()


def test_requests_are_counted_by_visitor_whatever_it_claims(served, client):
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(base_url=served.url, transport=transport) as other:
        flood(other)
        claim = {"X-Forwarded-For": "198.51.100.7"}
        assert other.post("/gradio_api/queue/join", json={}, headers=claim).status_code == 429
        assert other.post("/gradio_api/upload", files={"files": b"a"}).status_code == 429
        assert other.get("/").status_code == 200
    assert client.post("/gradio_api/queue/join", json={}).status_code != 429


def test_an_image_gone_from_the_archive_is_named_in_the_log_alone(client, archive, served):
    file = archive / "Scene_03.png"
    file.rename(archive / "hidden")
    try:
        answer = call(client, "search", *asked(CAPTIONS[0]))
    finally:
        (archive / "hidden").rename(file)
    assert not isinstance(answer, str) and "Scene_03" not in str(answer)  # skipped, and the others shown
    assert str(file) in served.log.read_text()


# ---- in this process


@given(st.text(max_size=20))
@settings(max_examples=25, deadline=None)
def test_part_of_a_file_name_is_taken_literally(index, name):
    if "\\'" in name or "\0" in name.strip():
        with pytest.raises(visitors.gr.Error, match="part of a file name"):
            write_filter(name=name)
        return
    names = [Path(row["file"]).name for row in index.rows(columns=["file"])]
    expected = sum(name.strip().lower() in known.lower() for known in names)
    assert index.table.count_rows(write_filter(name=name)) == expected


@pytest.mark.parametrize(
    "value",
    [True, "12", [12], {"a": 1}, float("nan"), float("inf"), -1, 49, 2.5, 10**400],
    ids=lambda value: str(value)[:9],
)
def test_numbers_that_visitors_send_are_whole_and_in_bounds(value):
    with pytest.raises(visitors.gr.Error, match="whole number from 1 to 48 expected"):
        check_number(value, "Images to show", 1, visitors.MOST_SHOWN)


def test_a_visitor_is_an_address_or_a_network_of_ipv6():
    named = [name_visitor({"client": (host, 1)}) for host in ("192.0.2.7", "::ffff:192.0.2.7", "2001:db8::1")]
    assert named == ["192.0.2.7", "192.0.2.7", "2001:db8::/64"]
    assert name_visitor({"client": ("2001:db8::ffff:1", 1)}) == named[2] != name_visitor({"client": None})


def ask_gate(gate, path, *, method="POST", body=b"", seconds=0.0, length=None):
    """The status that a gate answers a request with, whose content arrives after some seconds."""
    sent = []

    async def receive():
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(body) if length is None else length).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": ("192.0.2.7", 1)}
    return gate(scope, receive, send), lambda: sent[0]["status"]


async def answer_later(scope, receive, send):
    await receive()
    await asyncio.sleep(0.3)
    await visitors.JSONResponse({})(scope, receive, send)


def run_apart(coroutine):
    """`asyncio.run` in a thread of its own: Playwright's loop runs in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def test_content_that_drips_and_too_many_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(visitors, "BODY_SECONDS", 2.0)
    gate = Gate(answer_later, requests_per_minute=1000)

    async def ask_all(questions):
        await asyncio.gather(*(asking for asking, _ in questions))
        return [status() for _, status in questions]

    upload = "/gradio_api/upload"
    assert run_apart(ask_all([ask_gate(gate, upload, body=b"a", seconds=30.0)])) == [408]
    at_once = visitors.MOST_UPLOADS_BY_ONE + 1
    answers = run_apart(ask_all([ask_gate(gate, upload, body=b"a", seconds=0.1) for _ in range(at_once)]))
    assert answers == [200] * visitors.MOST_UPLOADS_BY_ONE + [429]
    reads = [ask_gate(gate, "/gradio_api/queue/data", method="GET") for _ in range(visitors.MOST_OPEN_BY_ONE + 3)]
    assert run_apart(ask_all(reads)) == [200] * visitors.MOST_OPEN_BY_ONE + [429] * 3
    assert not gate.open and not gate.uploads
    assert run_apart(ask_all([ask_gate(gate, upload, body=b"a", length="9" * 4000)])) == [413]


def test_an_archive_without_places_and_times_has_no_map_and_no_such_filters(tmp_path, loaded):  # noqa: F811
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    bare = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1], create=True)
    bare.add([tmp_path / "a.png"], progress=False)
    page = SearchPage(bare)
    assert not any(part.visible for part in (page.map, page.bbox, page.unplaced, page.geojson, *page.settings[8:10]))
    assert page.map.value is None and page.settings[0].visible


def test_a_view_is_the_narrowest_that_holds_all_boxes():
    assert view_around([]) is None and view_around([[np.nan] * 4]) is None
    assert view_around([[1, 2, 3, 4], [5, -6, 7, 8]]) == [1, -6, 7, 8]
    assert view_around([[179, 0, -179, 1]]) == [179, 0, 181, 1]
    assert view_around([[170, 0, 175, 1], [-175, 0, -170, 1]]) == [170, 0, 190, 1]
    assert view_around([[170, 0, -170, 1], [-175, 0, -172, 1]]) == [170, 0, 190, 1]
    assert view_around([[-180, -90, 180, 90]]) == [-180, -90, 180, 90]


@given(st.lists(st.tuples(st.integers(-180, 179), st.integers(1, 300)), min_size=1, max_size=6))
def test_a_view_holds_its_boxes_wherever_they_are(boxes):
    turned = [(west, 0, (west + width + 180) % 360 - 180, 1) for west, width in boxes]
    first, _, last, _ = view_around(turned)
    assert first <= last <= first + 360
    for west, _, east, _ in turned:
        width = (east - west) % 360
        assert (west - first) % 360 + width <= last - first or last - first == 360


def test_outlines_are_whole_across_the_antimeridian_and_none_is_invented():
    def hit(west, east, south, north, parts):
        rings = [[[[w, south], [e, south], [e, north], [w, north], [w, south]]] for w, e in parts]
        geometry = json.dumps({"type": "MultiPolygon", "coordinates": rings}) if parts else None
        return {"geometry": geometry, "west": west, "east": east, "south": south, "north": north}

    across, beside = hit(179, -179, 0, 1, [(179, 180), (-180, -179)]), hit(-178, -177, 0, 1, [(-178, -177)])
    nowhere, polar = hit(None, None, None, None, []), hit(0, 1, 86, 87, [(0, 1)])
    shown = map_of([nowhere, across, polar, beside], ["a", "b", "c", "d"])
    assert [feature["properties"] for feature in shown["features"]] == [
        {"index": 1, "label": "b"},
        {"index": 3, "label": "d"},
    ]
    assert shown["view"] == [179, 0, 183, 1]
    one, other = (feature["geometry"] for feature in shown["features"])
    assert one["type"] == other["type"] == "Polygon"
    assert {x for x, _ in one["coordinates"][0]} == {179, 180, 181} and {x for x, _ in other["coordinates"][0]} == {
        182,
        183,
    }
    assert map_of([nowhere], ["a"]) == {"features": [], "view": None}


def test_why_hits_are_not_on_the_map():
    known, unknown = {"geometry": "{}"}, {"geometry": None}
    assert tell_unplaced([known, known], 2) == ""
    assert tell_unplaced([unknown], 0) == "None of these images is on the map: their places are not known."
    assert tell_unplaced([known, unknown], 1) == "1 of 2 images are on the map: the place of the others is not known."
    beyond = "1 beyond 85° north or south, where the map ends."
    assert tell_unplaced([known], 0) == f"None of these images is on the map: {beyond}"
    assert tell_unplaced([known, known], 1) == f"1 of 2 images are on the map: {beyond}"
    three = tell_unplaced([known, known, unknown], 1)
    assert three == f"1 of 3 images are on the map: the place of 1 is not known; {beyond}"


def test_a_link_asks_what_was_asked():
    assert write_link(SETTINGS | {"sentence": ""}) == "" and read_link([("utm_source", "x")]) is None
    question = SETTINGS | {"sentence": "ships & 'planes' 100%", "without": "#", "examples": ["+a.0.0", "-b.0.0"]}
    question |= {"top_k": 3, "placed": True, "unwanted_weight": 0.5, "bbox": "1, 2, 3, 4"}
    link = write_link(question)
    assert "width" not in link and "'" not in link
    assert read_link(parse_qsl(link[1:])) == question
    assert read_link([("top_k", "many"), ("sentence", "a")])["top_k"] == "many"  # and `check_settings` says so
    assert read_link([("placed", "true")])["placed"] == "true" and read_link([("placed", "0")])["placed"] is False
    assert write_link(question | {"sentence": "a" * 5000}) == ""


def test_filters_are_one_condition(index):
    def passing(**conditions):
        return sorted(Path(row["file"]).stem for row in index.rows(write_filter(**conditions), columns=["file"]))

    assert passing(name="SCENE_0", width=70, height=48) == ["Scene_08", "Scene_09"]
    assert passing(name="deep") == []  # a folder's name is not the file's
    assert passing(name="100%") == [Path(HOSTILE_NAME).stem]
    assert passing(placed=True) == [Path(HOSTILE_NAME).stem, "placed"]
    assert passing(name="scene_0", where="width = 40 OR width = 45") == ["Scene_00", "Scene_01"]
    assert passing(bbox="-180, 0, 180,90") == ["placed"] and passing(bbox="-180 -90 180 -80") == []
    assert passing(bbox="179 -20 -179.99 0") == [Path(HOSTILE_NAME).stem]
    assert len(passing(acquired_from="2021", acquired_to="2021-07")) == len(passing(acquired_to="2021-07-01")) == 2
    assert passing(acquired_from="2021-08") == passing(acquired_to="2021-06") == []
    assert write_filter(bbox=" ", acquired_from="", acquired_to=" ") is None
    assert write_filter() is None


WHOLE = {}
for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
    buffer = io.BytesIO()
    Image.effect_noise((24, 20), 60).convert("RGB").save(buffer, format=kind)
    WHOLE[kind] = buffer.getvalue()


@given(st.sampled_from(sorted(WHOLE)), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_upload_is_an_image_or_a_message(tmp_path_factory, kind, data):
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "upload"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert read_upload(file).mode == "RGB"
    except ValueError as error:
        assert "expected" in str(error)


def test_what_app_needs_is_said(tmp_path, checkpoint, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        command.main(["--index", str(tmp_path)])
    assert "IEFT_MODEL" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="No index at"):
        command.main(["--model", str(checkpoint), "--index", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="there are none"):
        command.main(["--model", str(checkpoint), "--index", str(tmp_path / "none"), "--archive", str(tmp_path)])


def test_scenes_are_drawn_once(tmp_path):
    command.draw_archive(tmp_path, 2)
    first = tmp_path / "0000.png"
    before = first.read_bytes(), first.stat().st_mtime_ns
    command.draw_archive(tmp_path, 3)
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert [file.name for file in find_images(tmp_path)] == ["0000.png", "0001.png", "0002.png"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_space_installs_what_setup_names():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    named = [setup["options"]["install_requires"], extras["search"], extras["geo"], extras["app"]]
    wanted = {line for part in named for line in part.split() if not line.startswith(("ieft", "gradio"))}
    assert set((ROOT / "space" / "requirements.txt").read_text().split()) == wanted
    card = (ROOT / "space" / "README.md").read_text()
    version = re.search(r"^sdk_version: (\S+)$", card, re.MULTILINE).group(1)
    assert f"gradio>={version.rsplit('.', 1)[0]}" in extras["app"] and "app_file: app.py" in card
