"""What visitors of the page send: checked before anything else reads it, bounded in size, rate, time and number.

Visitors are not trusted. Only the addresses that the page itself needs are answered.
"""

import asyncio
import html
import ipaddress
import math
import re
import sys
import warnings
from collections import Counter

import gradio as gr
import gradio.processing_utils
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from PIL import Image
from starlette.responses import JSONResponse

from ieft.data.images import describe_image, read_image
from ieft.search.filters import check_where, write_where

MEGABYTE = 1 << 20
LARGEST_UPLOAD = 10 * MEGABYTE
LARGEST_QUESTION = MEGABYTE // 4  # what the page sends but uploads
MOST_PIXELS = 40_000_000
MOST_CHARACTERS = 500
UPLOAD_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # that the page offers
MOST_SHOWN, MOST_RERANKED, LONGEST_SIDE = 48, 64, 10**6
WEIGHTS = 0.05, 4  # the least and the most of a part of a question
MOST_EXAMPLES = 8  # images of the archive that are part of a question
BODY_SECONDS = 60  # for a request's content to arrive in
MOST_OPEN, MOST_OPEN_BY_ONE = 400, 40  # requests being answered, streams of events among them
MOST_UPLOADS, MOST_UPLOADS_BY_ONE = 8, 2  # arriving at once, each held in memory until it is whole
READS_PER_QUESTION = 30  # files and events that a visitor may ask for, for each request of its rate
NEEDED_TO_READ = re.compile(
    r"/(config|theme\.css|manifest\.json|favicon\.ico|robots\.txt|(assets|static)/.+)?|/web/[a-z]+\.(js|css|json)|"
    r"/gradio_api/(info|app_id|startup-events|queue/data|upload_progress|heartbeat/\w+|file=/.+|"
    r"call/(search|explain)/\w+)"
)
NEEDED_TO_ASK = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset|call/v2/(search|explain))/?")


def told(message):
    """An error shown to the visitor; escaped, since Gradio shows messages as HTML."""
    return gr.Error(html.escape(message), print_exception=False)


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


def check_real(value, name, least, most):
    """A number that a visitor sent."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise told(f"{name} from {least} to {most} expected; got {str(value)[:50]}.")
    return float(value)


def check_settings(settings):
    """What a visitor set on the page, or sent in its place -> (top_k, rerank_top_k, the weights of images and of what
    is not wanted, the least probability, arguments of `write_filter`)."""
    top_k, rerank_top_k, width, height, name, placed, where, bbox, first, last, *numbers = settings
    width = check_number(width, "Width, at least", 0, LONGEST_SIDE)
    height = check_number(height, "Height, at least", 0, LONGEST_SIDE)
    if not isinstance(placed, bool | None):
        raise told("True or false expected for: only with geographic bounds.")
    return (
        check_number(top_k, "Images to show", 1, MOST_SHOWN),
        check_number(rerank_top_k, "Images to re-rank", 0, MOST_RERANKED),
        [check_real(weight, "A weight", *WEIGHTS) for weight in numbers[:2]],
        check_real(numbers[2], "A probability", 0, 1),
        [width, height, name, placed, where, bbox, first, last],
    )


def check_examples(examples):
    """Images of the archive that a visitor wants more of (+ and an id) or less of (- and an id)."""
    examples = examples or []
    if not isinstance(examples, list) or not all(isinstance(each, str) and each[:1] in "+-" for each in examples):
        raise told("Examples expected as a list of ids, each with + or - before it.")
    if len({each[1:] for each in examples}) < len(examples):
        raise told("Each example once expected.")
    if len(examples) > MOST_EXAMPLES:
        raise told(f"Up to {MOST_EXAMPLES} examples expected; got {len(examples):,}.")
    return [check_text(each, "id") for each in examples]


def write_filter(
    width=0, height=0, name=None, placed=False, where=None, bbox=None, acquired_from=None, acquired_to=None, *,
    columns=None
):  # fmt: skip
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
    bbox, first, last = check_text(bbox, "box"), check_text(acquired_from, "time"), check_text(acquired_to, "time")
    acquired = f"{first or '..'}/{last or '..'}" if first or last else None
    try:
        found = write_where(bbox=re.split(r"[\s,;]+", bbox) if bbox else None, datetime=acquired)
    except ValueError as error:
        raise told(str(error)) from None
    return " AND ".join([*conditions, *([found] if found else [])]) or None


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


def is_shown_by_browsers(file):
    """Whether an image that could be read is of a kind that browsers show."""
    try:
        with Image.open(file) as image:
            return image.format in ("BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP")
    except OSError:  # of kinds that rasterio reads
        return False


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
            print(f"ieft-page: {scope['path'][:100]!r}: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr)
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


async def refuse_address(*_, **__):
    raise told("A file that was uploaded expected, not the address of one.")
