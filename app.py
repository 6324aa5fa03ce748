"""A web page to search an image archive by a sentence or by an image.

    python app.py --model outputs/demo --index outputs/scenes.lance --archive outputs/scenes
    IEFT_MODEL=user/ieft-scenes IEFT_INDEX=archive.lance IEFT_ARCHIVE=archive python app.py

The index is made first from `--archive` where that is given. The page also runs as a Hugging Face Space.

Visitors are not trusted. They see thumbnails and file names, no paths and no files. What they send is checked before
anything else reads it, and bounded in size, time, rate, pixels and open connections; only the addresses that the page
itself needs are answered.
"""

import argparse
import asyncio
import html
import ipaddress
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

try:
    import gradio as gr
    import gradio.processing_utils
    import lancedb  # noqa: F401
except ImportError as error:
    sys.exit(f"app.py: {error.name} is not installed; the page needs the extra `app`: pip install 'ieft[app]'.")
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from PIL import Image, ImageOps
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from ieft import IeftForImageTextRetrieval, IeftProcessor, draw_scene
from ieft.data.images import describe_image, parse_bands, read_image
from ieft.search.archive_files import find_images, read_hit, read_hits
from ieft.search.command import hide_loading_bar
from ieft.search.explain import draw_heat_map, explain_pair
from ieft.search.filters import check_where
from ieft.search.geography import to_geojson
from ieft.search.index import ImageIndex

MEGABYTE = 1 << 20
LARGEST_UPLOAD = 10 * MEGABYTE
LARGEST_QUESTION = MEGABYTE // 4  # what the page sends but uploads
MOST_PIXELS = 40_000_000
MOST_CHARACTERS = 500
UPLOAD_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # that the page offers
MOST_SHOWN, MOST_RERANKED, LONGEST_SIDE = 48, 64, 10**6
BODY_SECONDS = 60  # for a request's content to arrive in
MOST_OPEN, MOST_OPEN_BY_ONE = 400, 40  # requests being answered, streams of events among them
MOST_UPLOADS, MOST_UPLOADS_BY_ONE = 8, 2  # arriving at once, each held in memory until it is whole
READS_PER_QUESTION = 30  # files and events that a visitor may ask for, for each request of its rate
NEEDED_TO_READ = re.compile(
    r"/(config|theme\.css|manifest\.json|favicon\.ico|robots\.txt|(assets|static)/.+)?|/gradio_api/"
    r"(info|app_id|startup-events|queue/data|upload_progress|heartbeat/\w+|file=/.+)"
)
NEEDED_TO_ASK = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)/?")
HIDDEN_COLUMNS = ("vector", "state", "limits")
KEPT_SECONDS = 1800  # uploads, thumbnails, what a visitor was shown last
SCENES_SEED, SCENES_SIZE = 1, 192  # not the seed of training
THUMB, DETAIL = 320, 512
EXAMPLES = (
    "three white storage tanks in a yellow desert",
    "a football field and red houses in a town",
    "a curved river with a bridge over it",
    "many ships beside a beach",
    "planes in a snowy field",
)
HINT = (
    "Say what an aerial image should show. Embeddings find the nearest images, the **shortlist**; the network reads "
    "the first of them with the sentence and **re-ranks** them."
)
SCORES = (
    "Select an image to see what spoke for it. Scores order the images of one search: re-ranked ones by the network's "
    "score, any number; the shortlist's own by the similarity of embeddings, at most 1."
)
STYLE = """
.gradio-container { max-width: 1240px !important; }
#examples { flex-wrap: wrap; gap: 6px; }
#examples button { flex: 0 1 auto; font-weight: 400; }
#gallery .grid-wrap { height: auto; max-height: none; padding-top: 2.2rem; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); height: auto; }
#gallery .caption-label { left: 0; right: 0; bottom: 0; max-width: none; border-width: 1px 0 0; border-radius: 0; }
#detail .word { display: inline-block; margin: 2px; padding: 1px 6px; border-radius: 4px; }
#detail .word small { opacity: 0.7; }
#detail table, #detail tr, #detail td, #detail th { border: 0; }
#detail th, #detail td { padding: 2px 6px; }
#detail th { text-align: left; font-weight: 500; padding-right: 1.2em; }
#detail td { overflow-wrap: anywhere; }
"""


class SearchPage:
    """The page over one index: its layout and its event handlers."""

    def __init__(self, index):
        self.index = index
        index.needs_files = True  # to be shown
        self.page = gr.Blocks(title="Image search", analytics_enabled=False, delete_cache=(300, KEPT_SECONDS))
        with self.page:
            self.query, self.hits = (gr.State(time_to_live=KEPT_SECONDS) for _ in range(2))  # stay on the server
            gr.Markdown(f"# Search {len(index):,} images\n{HINT}")
            self._lay_out_questions()
            self._lay_out_answers()
            self._connect()

    def _lay_out_questions(self):
        with gr.Tab("By sentence"):
            with gr.Row(equal_height=True):
                self.caption = gr.Textbox(
                    label="Sentence",
                    placeholder=EXAMPLES[0],
                    max_length=MOST_CHARACTERS,
                    scale=8,
                    min_width=300,
                    elem_id="caption",
                )
                self.ask = gr.Button("Search", variant="primary", scale=1, min_width=120, elem_id="ask")
            with gr.Row(elem_id="examples"):
                self.examples = [gr.Button(example, size="sm", min_width=0) for example in EXAMPLES]
        with gr.Tab("By image"):
            label = f"An image, of up to {LARGEST_UPLOAD // MEGABYTE} MB; images like it are found by embedding alone"
            self.upload = gr.Image(label=label, sources=["upload", "clipboard"], height=240, elem_id="upload")
            self.upload.preprocess = lambda sent: sent and sent.path  # decoding is ours: `read_upload`
            self.ask_image = gr.Button("Search again", elem_id="ask_image")
        with gr.Accordion("Filters and settings", open=False, elem_id="filters"):
            with gr.Row():
                width = gr.Number(
                    0, label="Width, at least", precision=0, minimum=0, maximum=LONGEST_SIDE, min_width=120
                )
                height = gr.Number(
                    0, label="Height, at least", precision=0, minimum=0, maximum=LONGEST_SIDE, min_width=120
                )
                name = gr.Textbox(label="File name contains", min_width=160)
                placed = gr.Checkbox(label="Only with geographic bounds", min_width=160)
            where = gr.Textbox(
                label="SQL condition over the index's columns", placeholder="width >= 256 AND north > 48"
            )
            with gr.Row():
                top_k = gr.Slider(1, MOST_SHOWN, 12, step=1, label="Images to show")
                rerank_top_k = gr.Slider(0, MOST_RERANKED, 32, step=1, label="Images of the shortlist to re-rank")
        self.settings = [top_k, rerank_top_k, width, height, name, placed, where]
        for setting in self.settings:  # checked by `check_settings`, whose messages name the setting
            setting.preprocess = lambda sent: sent

    def _lay_out_answers(self):
        with gr.Column(visible=False, elem_id="answers") as self.answers:
            self.summary = gr.Markdown(elem_id="summary")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self.gallery = gr.Gallery(
                        label="Images, best first", allow_preview=False, columns=None, object_fit="cover",
                        height="auto", buttons=[], elem_classes="gallery", elem_id="gallery",
                    )  # fmt: skip
                    gr.Markdown(SCORES)
                    self.geojson = gr.DownloadButton("Download as GeoJSON", size="sm", elem_id="geojson")
                with gr.Column(scale=2, min_width=320, visible=False, elem_id="detail") as self.detail:
                    self.picture = gr.Image(label="Image", buttons=["fullscreen"], elem_id="picture")
                    self.reasons = gr.HTML(elem_id="reasons")

    def _connect(self):
        shown = [self.query, self.hits, self.answers, self.summary, self.gallery, self.geojson, self.detail]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "network"}
        by_caption = {"fn": self.search_caption, "inputs": [self.caption, *self.settings], "outputs": shown}
        by_image = {"fn": self.search_image, "inputs": [self.upload, *self.settings], "outputs": [self.upload, *shown]}
        gr.on([self.ask.click, self.caption.submit], **by_caption, **one_at_a_time, api_name="search")
        for example in self.examples:
            filled = example.click(outputs=self.caption, js=f"() => {json.dumps(example.value)}")
            filled.then(**by_caption, **one_at_a_time, api_visibility="private")
        gr.on([self.upload.upload, self.ask_image.click], **by_image, **one_at_a_time, api_name="search_image")
        explained = [self.detail, self.picture, self.reasons]
        self.gallery.select(
            self.explain, [self.query, self.hits], explained, **one_at_a_time, api_visibility="private"
        ).then(js="() => document.getElementById('detail').scrollIntoView({behavior: 'smooth', block: 'nearest'})")

    def search_caption(self, caption, *settings):
        """Search by a sentence with the settings: updates of the page."""
        caption = check_text(caption, "sentence")
        if not caption:
            raise told("Write a sentence first: what should the image show?")
        top_k, rerank_top_k, filters = check_settings(settings)
        return self._show(
            caption,
            filters,
            lambda where: self.index.search(caption, top_k=top_k, rerank_top_k=rerank_top_k, where=where),
        )

    def search_image(self, file, *settings):
        """A file that a visitor sent and the settings -> what to show."""
        if not isinstance(file, str):
            raise told("Choose an image first.")
        top_k, _, filters = check_settings(settings)
        try:
            image = read_upload(file)
        except ValueError as error:
            gr.Warning(html.escape(str(error)), title="Not searched")
            return {self.upload: None}
        answer = self._show(image, filters, lambda where: self.index.search_image(image, top_k=top_k, where=where))
        return answer | {self.upload: draw_thumbnail(image, 2 * DETAIL)}

    def _show(self, query, filters, search):
        where, number = self._count(filters)
        with archive_errors():
            hits = search(where)
            started = time.perf_counter()
            thumbnails = [(hit, draw_thumbnail(image, THUMB)) for hit, image in read_hits(hits)]
        seconds = hits.seconds | {"thumbnails": time.perf_counter() - started}
        times = ", ".join(f"{stage} {1000 * taken:,.0f} ms" for stage, taken in seconds.items())
        hits = [hit for hit, _ in thumbnails]
        shown = [(image, label_hit(hit)) for hit, image in thumbnails]
        return {
            self.query: query if isinstance(query, str) else None,
            self.hits: hits,
            self.answers: gr.Column(visible=True),
            self.summary: f"**{len(hits)} of {number:,} images.** Time taken: {times}.",
            self.gallery: gr.Gallery(shown, selected_index=None),
            self.geojson: self._offer_geojson(hits),
            self.detail: gr.Column(visible=False),
        }

    def _count(self, filters):
        """The filter as SQL or None, and how many images pass it."""
        columns = [name for name in self.index.table.schema.names if name not in HIDDEN_COLUMNS]
        where = write_filter(*filters, columns=columns)
        try:
            return where, self.index.table.count_rows(where)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"app.py: filter {where!r}: {error}", file=sys.stderr)
            raise told(
                f"This SQL condition cannot be used: a comparison of {', '.join(columns)} expected, with a value of "
                "the column's own kind, such as: width >= 256 AND north > 48, or acquired >= timestamp '2021-06-01'."
            ) from None

    def _offer_geojson(self, hits):
        """A GeoJSON download of the hits' outlines, if there are any, with file names instead of paths."""
        if not any(hit["geometry"] for hit in hits):
            return gr.DownloadButton("No image with geographic bounds: no GeoJSON", value=None, interactive=False)
        named = [hit | {"file": Path(hit["file"]).name} for hit in hits]
        text = json.dumps(to_geojson(named), indent=1, default=str)
        file = gradio.processing_utils.save_bytes_to_cache(text.encode(), "hits.geojson", self.geojson.GRADIO_CACHE)
        return gr.DownloadButton("Download as GeoJSON", value=file, interactive=True)

    def explain(self, query, hits, event: gr.SelectData):
        """Show the selected hit, with the heat map of the sentence if there is one."""
        if not hits or not isinstance(event.index, int) or not 0 <= event.index < len(hits):
            raise told("These results are too old to be explained: search again.")
        hit, words = hits[event.index], []
        with archive_errors():
            picture = read_hit(hit)
        image = ImageOps.contain(picture, (DETAIL, DETAIL))
        if query is not None:
            processor = self.index.processor
            explanation = explain_pair(self.index.model, processor, picture, query)
            image = draw_heat_map(image, explanation.heat, fit=processor.image_processor.fit)
            words = explanation.words
        label = "What spoke for the sentence: the brighter, the more" if words else "Image"
        return {
            self.detail: gr.Column(visible=True),
            self.picture: gr.Image(image, label=label),
            self.reasons: describe_words(words) + describe_hit(hit),
        }


def told(message):
    """An error shown to the visitor; escaped, since Gradio shows messages as HTML."""
    return gr.Error(html.escape(message), print_exception=False)


@contextmanager
def archive_errors():
    """Log errors of reading the archive, which contain paths, and show a message without them."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        message = "An image of the archive is gone or damaged, or the index is. The page's log tells which."
        raise told(message) from None


def check_text(text, name):
    """Text that a visitor sent, without blanks around it; `name` says what it is."""
    if text is not None and not isinstance(text, str):
        raise told(f"A {name} as text expected.")
    text = (text or "").strip()
    if len(text) > MOST_CHARACTERS:
        raise told(f"A {name} of up to {MOST_CHARACTERS} characters expected; got {len(text):,}.")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise told(f"A {name} of whole characters expected.")
    return text


def check_number(value, name, least, most):
    """A whole number that a visitor sent; nothing counts as `least`."""
    if value is None:
        return least
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_whole = is_whole or isinstance(value, float) and math.isfinite(value) and value == int(value)
    if not is_whole or not least <= value <= most:
        raise told(f"{name}: a whole number from {least:,} to {most:,} expected; got {str(value)[:50]}.")
    return int(value)


def check_settings(settings):
    """What a visitor set on the page, or sent in its place -> (top_k, rerank_top_k, arguments of `write_filter`)."""
    top_k, rerank_top_k, width, height, name, placed, where = settings
    width = check_number(width, "Width, at least", 0, LONGEST_SIDE)
    height = check_number(height, "Height, at least", 0, LONGEST_SIDE)
    if not isinstance(placed, bool | None):
        raise told("True or false expected for: only with geographic bounds.")
    return (
        check_number(top_k, "Images to show", 1, MOST_SHOWN),
        check_number(rerank_top_k, "Images to re-rank", 0, MOST_RERANKED),
        [width, height, name, placed, where],
    )


def write_filter(width=0, height=0, name=None, placed=False, where=None, *, columns=None):
    """A visitor's conditions as one SQL condition over the index's columns; None where there is none."""
    conditions = [f"{side} >= {least}" for side, least in (("width", width), ("height", height)) if least]
    if name := check_text(name, "part of a file name"):
        if "\\'" in name or "\0" in name:
            raise told("A part of a file name without \\' expected.")
        quoted = name.lower().replace("'", "''")  # in the name, not in the folders above it
        conditions.append(f"contains(lower(substr_index(file, '/', -1)), '{quoted}')")
    if placed:
        conditions.append("geometry IS NOT NULL")
    if where := check_text(where, "condition"):
        try:
            check_where(where, columns=columns, longest=MOST_CHARACTERS)
        except ValueError as error:
            raise told(str(error).replace("where must", "An SQL condition must", 1)) from None
        conditions.append(f"({where})")
    return " AND ".join(conditions) or None


def read_upload(file):
    """Read an uploaded image as PIL RGB.

    Raises:
        ValueError: for what is no image of a usual kind, one of too many pixels, or one whose bands must be chosen.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            width, height, _ = describe_image(file)
            if width * height <= MOST_PIXELS:
                return read_image(file)
        size = f"{width:,} x {height:,}"
    except Image.DecompressionBombError:
        size = "many more"
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        kinds, reason = ", ".join(UPLOAD_FORMATS), str(error.__cause__ or "")
        if "--bands" in reason:
            raise ValueError(f"Of this file's bands, which ones to show? {reason.partition(':')[0]}.") from None
        raise ValueError(f"This file cannot be read as an image; a whole one of {kinds} expected.") from None
    raise ValueError(f"An image of up to {MOST_PIXELS:,} pixels expected; this one has {size}.")


def draw_thumbnail(image, side):
    image.thumbnail((side, side))
    return image


def label_hit(hit):
    return f"{hit['rank']}.  {hit['score']:.2f}  {hit['stage']}"


def describe_words(words):
    """The words as HTML, on green if they raise the score, on red if they lower it."""
    largest = max((abs(part) for _, part in words), default=0) or 1
    spans = [
        f'<span class="word" style="background: rgba({"20, 184, 166" if part > 0 else "239, 68, 68"}, '
        f'{abs(part) / largest * 0.7:.2f})">{html.escape(word)} <small>{part:+.2f}</small></span>'
        for word, part in words
    ]
    return f"<p>Each word's part in the score:</p><p>{''.join(spans)}</p>" if words else ""


def describe_hit(hit):
    """The facts about a hit as an HTML table, with the name of its file but not the path."""
    facts = {"file": Path(hit["file"]).name, "pixels": f"{hit['width']} x {hit['height']}"}
    if hit["tiling"]:
        facts["tile"] = f"{hit['tile_width']} x {hit['tile_height']}, from column {hit['col']}, row {hit['row']}"
    facts |= {"rank": hit["rank"], hit["stage"]: f"score {hit['score']:.3f}", "similarity": f"{hit['similarity']:.3f}"}
    if hit["geometry"]:
        facts["bounds"] = ", ".join(f"{side} {hit[side]:.6g}°" for side in ("west", "south", "east", "north"))
    if hit["acquired"]:
        facts["acquired"] = f"{hit['acquired']:%Y-%m-%d %H:%M} UTC"
    rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(fact))}</td></tr>" for name, fact in facts.items())
    return f"<table>{''.join(rows)}</table>"


class Gate:
    """ASGI middleware: answers the addresses that the page needs, for requests of bounded size that arrive in bounded
    time, at a bounded rate and in bounded number at once."""

    def __init__(self, app, *, requests_per_minute):
        self.app = app
        self.asks = RateLimitItemPerMinute(requests_per_minute)
        self.reads = RateLimitItemPerMinute(requests_per_minute * READS_PER_QUESTION)
        self.limiter = MovingWindowRateLimiter(MemoryStorage())
        self.open = Counter()  # requests being answered, by visitor
        self.uploads = Counter()  # that are arriving, by visitor

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        visitor = name_visitor(scope)
        if refusal := self._refuse(scope, visitor):
            return await refusal(scope, receive, send)
        self.open[visitor] += 1
        try:
            if scope["method"] == "POST":
                receive = await self._receive_whole(scope, receive, visitor)
            answer = self._answer if receive else _refusal(408, "The request did not arrive in time.")
            await answer(scope, receive, send)
        finally:
            self.open[visitor] -= 1
            self.open, self.uploads = +self.open, +self.uploads  # without those at zero

    async def _answer(self, scope, receive, send):
        """Answer by the page; crafted content that Gradio fails on gets a message, and a line in the log."""
        has_begun = False

        async def send_on(message):
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception as error:  # Gradio and Starlette raise whatever crafted content leads them to
            print(f"app.py: {scope['path'][:100]!r}: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr)
            if not has_begun:
                await _refusal(400, "A request as the page sends it expected.")(scope, receive, send)

    def _refuse(self, scope, visitor):
        asks = scope.get("method") == "POST"
        if scope["type"] != "http" or not (NEEDED_TO_ASK if asks else NEEDED_TO_READ).fullmatch(scope["path"]):
            return _refusal(404, "There is nothing here.")
        if self.open[visitor] >= MOST_OPEN_BY_ONE or self.open.total() >= MOST_OPEN:
            return _refusal(429, "Too many requests at once: wait a little, then go on.")
        if not asks:
            return None if self.limiter.hit(self.reads, visitor, "reads") else self._refusal_of_rate(self.reads)
        is_upload = "upload" in scope["path"]
        largest = LARGEST_UPLOAD + LARGEST_QUESTION if is_upload else LARGEST_QUESTION
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return _refusal(411, "A request that states its length expected.")
        if len(length) > 15 or int(length) > largest:
            most = f"{LARGEST_UPLOAD // MEGABYTE} MB" if is_upload else f"{LARGEST_QUESTION:,} bytes"
            return _refusal(413, f"At most {most} expected; got {length[:20].decode()} bytes.")
        if is_upload and (self.uploads.total() >= MOST_UPLOADS or self.uploads[visitor] >= MOST_UPLOADS_BY_ONE):
            return _refusal(429, "Too many uploads at once: wait a little, then go on.")
        return None if self.limiter.hit(self.asks, visitor) else self._refusal_of_rate(self.asks)

    def _refusal_of_rate(self, rate):
        return _refusal(429, f"More than {rate.amount} requests in a minute: wait a little, then go on.")

    async def _receive_whole(self, scope, receive, visitor):
        """A `receive` that gives a request's whole content at once; None where it did not arrive in time."""
        is_upload = "upload" in scope["path"]
        self.uploads[visitor] += is_upload
        try:
            content = await asyncio.wait_for(_read_body(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            return None
        finally:
            self.uploads[visitor] -= is_upload
        first = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive_rest():
            return first.pop() if first else await receive()

        return receive_rest


async def _read_body(receive):
    content, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.TimeoutError  # nobody waits for an answer
        content += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(content)


def name_visitor(scope):
    """By whom a request was sent: an address, of IPv6 the network of 64 bits that one visitor has to itself."""
    host = (scope.get("client") or ("unknown",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:100]
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def _refusal(status, message):
    return JSONResponse({"detail": message}, status_code=status)


def draw_archive(folder, number):
    """Draw synthetic scenes as PNG files, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        file = folder / f"{index:04}.png"
        if not file.exists():
            unfinished = file.with_suffix(".part")
            draw_scene(SCENES_SEED, index, size=SCENES_SIZE).image.save(unfinished, format="PNG")
            unfinished.replace(file)


def open_index(args):
    """Open the index of the arguments and add new images of the archive."""
    archive = args.archive and Path(args.archive)
    if args.draw_scenes:
        draw_archive(archive, args.draw_scenes)
    unreadable = {}
    files = find_images(archive, unreadable) if archive else []
    model = IeftForImageTextRetrieval.from_pretrained(args.model)
    index = ImageIndex(
        args.index,
        model,
        processor=IeftProcessor.from_pretrained(args.model),
        create=bool(files),
        root=archive if archive and archive.is_dir() else None,
    )
    if files:
        report = index.add(files, bands=parse_bands(args.bands))
        index.optimize()
        print(f"{report['added']:,} images added, {len(index):,} in {args.index}", flush=True)
        for file, why in (unreadable | report["unreadable"]).items():
            print(f"not indexed: {file}: {why}", file=sys.stderr)
    return index


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (
        ("model", "folder or Hub id of a checkpoint with contrastive heads"),
        ("index", "a folder, or object storage such as s3://bucket/prefix"),
        ("archive", "a folder of images to index first: what is new in it"),
    ):
        variable = f"IEFT_{name.upper()}"
        parser.add_argument(f"--{name}", default=os.environ.get(variable), help=f"{text}; or the variable {variable}")
    parser.add_argument(
        "--draw_scenes", type=int, default=0, help="draw so many synthetic scenes into the archive first"
    )
    parser.add_argument("--bands", help="bands of the archive's images that become red, green and blue, such as 4,3,2")
    parser.add_argument("--requests_per_minute", type=int, default=60, help="that one visitor may send")
    return parser


def main(arguments=None):
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not args.model or not args.index:
        parser.error("--model and --index expected, or IEFT_MODEL and IEFT_INDEX in the environment.")
    hide_loading_bar()
    try:
        index = open_index(args)
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: {error}")
    with tempfile.TemporaryDirectory(prefix="ieft-page-") as folder:
        # Gradio's own folder is shared by all its pages on a machine, and each serves all of it.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": f"{folder}/examples"}
        if os.environ.get("SPACE_ID"):  # there, visitors come through proxies of this network
            os.environ.setdefault("FORWARDED_ALLOW_IPS", "10.0.0.0/8")
        launch(SearchPage(index).page, requests_per_minute=args.requests_per_minute)


async def refuse_address(*_, **__):
    raise told("A file that was uploaded expected, not the address of one.")


def launch(page, *, requests_per_minute):
    """Serve a page until it is stopped, on GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, or 127.0.0.1:7860."""
    theme = gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    # In place of files, Gradio takes addresses, and would fetch whatever a visitor names.
    gradio.processing_utils.async_ssrf_protected_download = refuse_address
    page.queue(max_size=32).launch(
        theme=theme,
        css=STYLE,
        max_file_size=LARGEST_UPLOAD,
        state_session_capacity=1000,
        footer_links=[],
        share=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        app_kwargs={"middleware": [Middleware(Gate, requests_per_minute=requests_per_minute)]},
    )


if __name__ == "__main__":
    main()
