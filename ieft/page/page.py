"""The search page: its layout, and what happens when a visitor asks.

Visitors see thumbnails and file names, no paths and no files. What is asked, on the page, by a link or by the API, is
a list of values in one order: sentence, without, an uploaded image, examples, and `SETTINGS`.
"""

import html
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import gradio.processing_utils
from PIL import Image, ImageOps
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from ieft.page.links import ASKED, SETTINGS, read_link, write_link
from ieft.page.map_view import MAP_EDGE, map_of, view_around
from ieft.page.visitors import (
    LARGEST_UPLOAD,
    LONGEST_SIDE,
    MEGABYTE,
    MOST_CHARACTERS,
    MOST_RERANKED,
    MOST_SHOWN,
    WEIGHTS,
    Gate,
    check_examples,
    check_settings,
    check_text,
    is_shown_by_browsers,
    read_upload,
    refuse_address,
    told,
    write_filter,
)
from ieft.search.archive_files import read_hit, read_hits
from ieft.search.explain import draw_heat_map, explain_pair
from ieft.search.geography import SIDES, to_geojson
from ieft.search.queries import Query
from ieft.search.tables import quote

HIDDEN_COLUMNS = ("vector", "state", "limits")
KEPT_SECONDS = 1800  # uploads, thumbnails, what a visitor was shown last
THUMB, DETAIL = 320, 512
MOST_CAPTIONS = 5  # of the index, shown for an uploaded image
# What visitors send comes as they sent it: `visitors` checks it and reads images, with messages that name the setting.
UNCHECKED = {"preprocess": False}
EXAMPLE_NAMES = {"+": "like {}", "-": "not like {}"}
WEB = Path(__file__).parent / "web"  # what browsers load: the map, its library, the style
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
PROBABILITIES = " The percentage is the probability that a sentence alone belongs to the image."
MAP = """<div class="map-and-buttons"><div class="map" role="region" aria-label="Map of the images found"></div>
<div class="buttons"><button type="button" class="draw" aria-pressed="false">Draw a box</button>
<button type="button" class="here">Search in this view</button>
<button type="button" class="clear">Remove the box</button></div></div>"""
STATUS = '<p role="status" aria-live="polite">${value}</p>'
LINK = "${value && `<a href='${value}'>Link to this search</a>`}"
SHOW_LINK = f"link => showLink(link, {json.dumps([*ASKED, *SETTINGS])})"
SHOW_DETAIL = "() => document.getElementById('detail').scrollIntoView({behavior: 'smooth', block: 'nearest'})"


class SearchPage:
    """The page over one index: its layout and its event handlers.

    Whether the archive has places and times is looked at when the page is made: without them there is no map, and no
    filter by them.

    Args:
        base_map: address of the tiles of a map, with {z}, {x} and {y}, that visitors' browsers load; None for none.
        base_map_credit: who made them, as HTML.
    """

    def __init__(self, index, *, base_map=None, base_map_credit=""):
        self.index = index
        index.needs_files = True  # to be shown
        self.base_map = base_map and {"url": base_map, "credit": base_map_credit}
        self.has_places, self.has_times = (
            index.table.count_rows(f"{column} IS NOT NULL") > 0 for column in ("geometry", "acquired")
        )
        self.page = gr.Blocks(title="Image search", analytics_enabled=False, delete_cache=(300, KEPT_SECONDS))
        with self.page:
            # On the server: the sentence of the last search, its hits, and the index of the one that is shown.
            self.query, self.hits, self.chosen = (gr.State(time_to_live=KEPT_SECONDS) for _ in range(3))
            gr.Markdown(f"# Search {len(index):,} images\n{HINT}")
            self._lay_out_questions()
            self._lay_out_answers()
            self._add_api()  # first: it has the names that are documented
            self._connect()

    def _lay_out_questions(self):
        with gr.Row(equal_height=True):
            self.caption = gr.Textbox(
                "",
                label="Sentence",
                placeholder=EXAMPLES[0],
                max_length=MOST_CHARACTERS,
                scale=6,
                min_width=300,
                elem_id="caption",
            )
            self.without = gr.Textbox(
                "", label="Without", placeholder="clouds", max_length=MOST_CHARACTERS, scale=2, elem_id="without"
            )
            self.ask = gr.Button("Search", variant="primary", scale=1, min_width=120, elem_id="ask")
        with gr.Row(elem_id="examples"):
            self.sentences = [gr.Button(example, size="sm", min_width=0) for example in EXAMPLES]
        self.examples = gr.CheckboxGroup(
            [], label="Images of the archive that are part of the question", visible=False, elem_id="liked"
        )
        with gr.Accordion("An image as the question", open=False, elem_id="by_image"):
            label = f"Images like this one; a file of up to {LARGEST_UPLOAD // MEGABYTE} MB"
            self.upload = gr.Image(
                label=label, sources=["upload", "clipboard"], height=240, format="png", elem_id="upload"
            )
            self.captions = gr.HTML(visible=False, elem_id="captions")
        self._lay_out_settings()
        self.asked = [self.caption, self.without, self.upload, self.examples, *self.settings]

    def _lay_out_settings(self):
        with gr.Accordion("Filters and settings", open=False, elem_id="filters"):
            with gr.Row():
                width, height = (
                    gr.Number(
                        SETTINGS[side],
                        label=f"{side.capitalize()}, at least",
                        precision=0,
                        minimum=0,
                        maximum=LONGEST_SIDE,
                        min_width=120,
                    )
                    for side in ("width", "height")
                )
                name = gr.Textbox(SETTINGS["name"], label="File name contains", min_width=160)
                placed = gr.Checkbox(
                    SETTINGS["placed"], label="Only with geographic bounds", min_width=160, visible=self.has_places
                )
            with gr.Row():
                self.bbox = gr.Textbox(
                    SETTINGS["bbox"],
                    label="Touches west, south, east, north (degrees)",
                    placeholder="7.5, 47.1, 8.9, 47.9",
                    min_width=160,
                    visible=self.has_places,
                    elem_id="bbox",
                )
                first, last = (
                    gr.Textbox(
                        SETTINGS[name],
                        label=label,
                        placeholder=example,
                        min_width=140,
                        visible=self.has_times,
                        elem_id=name,
                    )
                    for name, label, example in (
                        ("acquired_from", "Acquired from", "2021-06-01, or 2021-06"),
                        ("acquired_to", "Acquired up to", "2021-08-31, or 2021"),
                    )
                )
            where = gr.Textbox(
                SETTINGS["where"],
                label="SQL condition over the index's columns",
                placeholder="width >= 256 AND north > 48",
            )
            with gr.Row():
                top_k = gr.Slider(1, MOST_SHOWN, SETTINGS["top_k"], step=1, label="Images to show")
                rerank_top_k = gr.Slider(
                    0, MOST_RERANKED, SETTINGS["rerank_top_k"], step=1, label="Images of the shortlist to re-rank"
                )
            with gr.Row():
                weights = [
                    gr.Slider(*WEIGHTS, SETTINGS[name], step=0.05, label=label)
                    for name, label in (
                        ("image_weight", "Weight of images beside the sentence's, 1"),
                        ("unwanted_weight", "Weight of what is not wanted"),
                    )
                ]
            least = gr.Slider(
                0,
                1,
                SETTINGS["min_probability"],
                step=0.01,
                label="Probability, at least: what a sentence alone fits less is not shown",
                visible=self.index.has_probability,
                elem_id="min_probability",
            )
        self.settings = [
            top_k, rerank_top_k, width, height, name, placed, where, self.bbox, first, last, *weights, least
        ]  # fmt: skip

    def _lay_out_answers(self):
        with gr.Row(equal_height=False):
            self.summary = gr.HTML("", html_template=STATUS, elem_id="summary", scale=5)
            self.link = gr.HTML("", html_template=LINK, elem_id="link", min_width=120)
        with gr.Row():
            with gr.Column(scale=3, min_width=320, visible=False, elem_id="answers") as self.answers:
                self.gallery = gr.Gallery(
                    label="Images, best first", allow_preview=False, columns=None, object_fit="cover",
                    height="auto", buttons=[], elem_classes="gallery", elem_id="gallery",
                )  # fmt: skip
                gr.Markdown(SCORES + (PROBABILITIES if self.index.has_probability else ""))
                self.geojson = gr.DownloadButton(
                    "Download as GeoJSON", size="sm", visible=self.has_places, elem_id="geojson"
                )
            with gr.Column(scale=2, min_width=320):
                self.map = gr.HTML(
                    {"features": [], "view": self._view(), "base": self.base_map} if self.has_places else None,
                    html_template=MAP,
                    js_on_load="startSearchMap(element, props, trigger, watch);",
                    head='<link rel="stylesheet" href="web/leaflet.css"><script src="web/leaflet.js"></script>'
                    '<script src="web/map.js"></script>',
                    apply_default_css=False,
                    chosen=None,
                    visible=self.has_places,
                    elem_id="map",
                )
                self.unplaced = gr.HTML("", visible=self.has_places, elem_id="unplaced")
                with gr.Column(visible=False, elem_id="detail") as self.detail:
                    self.picture = gr.Image(label="Image", buttons=["fullscreen"], elem_id="picture")
                    with gr.Row():
                        self.more = gr.Button("More like this", size="sm", elem_id="more")
                        self.less = gr.Button("Not like this", size="sm", elem_id="less")
                    self.reasons = gr.HTML(elem_id="reasons")

    def _view(self):
        """The part of the world that the archive's images are in."""
        rows = self.index.table.search().where("geometry IS NOT NULL").select(list(SIDES)).to_arrow()
        return view_around(list(zip(*(rows[side].to_pylist() for side in SIDES), strict=True)))

    def _connect(self):
        shown = [
            self.query, self.hits, self.upload, self.captions, self.summary, self.link, self.answers, self.gallery,
            self.geojson, self.map, self.unplaced, self.detail,
        ]  # fmt: skip
        # What is asked or selected while an answer is on its way comes next, so that the last is what is shown.
        hidden = {"api_visibility": "private", "trigger_mode": "always_last", **UNCHECKED}
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "network"}
        search = {"fn": self.search, "inputs": self.asked, "outputs": shown, **one_at_a_time, **hidden}
        search |= {"api_name": "page", "show_progress_on": [self.summary, self.gallery]}
        again = search | {"fn": self.search_again}

        def then_link(searched):
            searched.success(js=SHOW_LINK, inputs=self.link)

        then_link(gr.on([self.ask.click, self.caption.submit, self.without.submit, self.upload.upload], **search))
        for button in self.sentences:
            filled = button.click(outputs=self.caption, js=f"() => {json.dumps(button.value)}")
            then_link(filled.then(**search))
        for button, sign in ((self.more, "+"), (self.less, "-")):
            added = button.click(
                lambda *given, sign=sign: self.add_example(sign, *given),
                [self.examples, self.hits, self.chosen],
                self.examples,
                **hidden,
            )
            then_link(added.success(**search))
        then_link(gr.on([self.examples.input, self.upload.clear], **again))
        explained = [self.chosen, self.map, self.detail, self.picture, self.reasons]
        inputs = [self.query, self.hits]
        explain = {**one_at_a_time, **hidden, "show_progress_on": self.picture}
        self.gallery.select(self.explain, inputs, explained, **explain).then(js=SHOW_DETAIL)
        if self.has_places:
            boxed = self.map.input(self.take_box, None, self.bbox, **hidden)
            then_link(boxed.success(**again))
            self.bbox.change(js="text => window.searchMap?.showBox(text)", inputs=self.bbox)
            self.map.select(self.explain_of_map, inputs, [self.gallery, *explained], **explain).then(js=SHOW_DETAIL)
        fields = [part for part in self.asked if part is not self.upload]
        then_link(self.page.load(self.open_link, None, [*fields, *shown], **one_at_a_time, **hidden))

    def _add_api(self):
        """Endpoints for programs; their inputs are those of the page, their outputs are data."""
        call = {"concurrency_limit": 1, "concurrency_id": "network", "api_visibility": "public", **UNCHECKED}
        button, found, picture = gr.Button(visible=False), gr.JSON(visible=False), gr.Image(visible=False)
        identifier = gr.Textbox(label="id of an image that was found", visible=False)
        examples = gr.JSON([], label="ids of images that were found, with + or - before each", visible=False)
        asked = [examples if part is self.examples else part for part in self.asked]
        button.click(self.find, asked, found, api_name="search", **call)
        button.click(self.explain_id, [identifier, self.caption], [found, picture], api_name="explain", **call)

    # What visitors ask ----------------------------------------------------------------------------------------------

    def search(self, sentence, without, file, examples, *settings):
        """What was asked -> updates of the page."""
        try:
            found = self._find(sentence, without, file, examples, settings)
        except UnreadableUpload as error:
            gr.Warning(html.escape(str(error)), title="Not searched")
            return {self.upload: None}
        with archive_errors():
            started = time.perf_counter()
            thumbnails = [(hit, draw_thumbnail(image, THUMB)) for hit, image in read_hits(found.hits)]
            captions = self._captions_of(found.image)
        seconds = found.hits.seconds | {"thumbnails": time.perf_counter() - started}
        times = ", ".join(f"{stage} {1000 * taken:,.0f} ms" for stage, taken in seconds.items())
        hits = [hit for hit, _ in thumbnails]
        drawn = map_of(hits, [label_on_map(rank, hit) for rank, hit in enumerate(hits, 1)])
        return {
            self.query: found.asked["sentence"] or None,
            self.hits: hits,
            self.upload: self._show_upload(file, found.image),
            self.captions: gr.HTML(list_captions(captions), visible=bool(captions)),
            self.summary: f"<b>{tell_number(found, len(hits))}</b> Time taken: {times}.",
            self.link: "" if found.image is not None else write_link(found.asked),
            self.answers: gr.Column(visible=bool(hits)),
            self.gallery: gr.Gallery([(image, label_hit(hit)) for hit, image in thumbnails], selected_index=None),
            self.geojson: self._offer_geojson(hits),
            self.map: gr.HTML(drawn | {"base": self.base_map}, chosen=None) if self.has_places else gr.skip(),
            self.unplaced: tell_unplaced(hits, len(drawn["features"])),
            self.detail: gr.Column(visible=False),
        }

    def search_again(self, sentence, without, file, examples, *settings):
        """`search`, after something else than the button was used: nothing where nothing is asked."""
        if not (sentence or file or any(each.startswith("+") for each in check_examples(examples))):
            return gr.skip()
        return self.search(sentence, without, file, examples, *settings)

    def find(
        self, sentence="", without="", image=None, examples=None, top_k=12, rerank_top_k=32, width=0, height=0,
        name="", placed=False, where="", bbox="", acquired_from="", acquired_to="", image_weight=1,
        unwanted_weight=0.25, min_probability=0,
    ):  # fmt: skip
        """Images of the archive for a sentence, without what another one says, like an uploaded image, and like or
        unlike images that were found before: their ids with + or - before them. Best first."""
        settings = [
            top_k, rerank_top_k, width, height, name, placed, where, bbox, acquired_from, acquired_to, image_weight,
            unwanted_weight, min_probability,
        ]  # fmt: skip
        try:
            found = self._find(sentence, without, image, examples, settings)
        except UnreadableUpload as error:
            raise told(str(error)) from None
        return {"images": found.number, "hits": [describe_for_programs(hit) for hit in found.hits]}

    def _find(self, sentence, without, file, examples, settings):
        """What was asked, unchecked -> `Found`."""
        sentence, without = check_text(sentence, "sentence"), check_text(without, "sentence for what to leave out")
        examples = check_examples(examples)
        top_k, rerank_top_k, weights, least, filters = check_settings(settings)
        image = None
        if file is not None:
            path = file.get("path") if isinstance(file, dict) else None
            if not isinstance(path, str):
                raise told("An image that was uploaded expected.")
            try:
                image = read_upload(path)
            except ValueError as error:
                raise UnreadableUpload(str(error)) from None
        query = self._query(sentence, without, image, examples, *weights)
        if least and not (self.index.has_probability and query.is_sentence and rerank_top_k):
            raise told("A least probability is known for one sentence alone, by a calibrated network that re-ranks.")
        options = {"top_k": top_k, "rerank_top_k": rerank_top_k, "min_probability": least or None}
        where, number = self._count(filters)
        with archive_errors():
            hits = self.index.search(query, where=where, **options)
        asked = dict(zip(SETTINGS, settings, strict=True))
        return Found(asked | {"sentence": sentence, "without": without, "examples": examples}, image, hits, number)

    def _query(self, sentence, without, image, examples, image_weight, unwanted_weight):
        """What was asked, checked, as one query."""
        liked, disliked = ([self._row(each[1:]) for each in examples if each[0] == sign] for sign in "+-")
        images = [*([] if image is None else [image]), *liked]
        wanted = [*([sentence] if sentence else []), *images]
        if not wanted:
            raise told("Write a sentence first: what should the image show?")
        unwanted = [*([without] if without else []), *disliked]
        weights = [1.0] * bool(sentence) + [image_weight] * len(images) + [unwanted_weight] * len(unwanted)
        return Query(wanted, unwanted, weights)

    def _count(self, filters):
        """The filter as SQL or None, and how many images pass it."""
        columns = [name for name in self.index.table.schema.names if name not in HIDDEN_COLUMNS]
        where = write_filter(*filters, columns=columns)
        try:
            return where, self.index.table.count_rows(where)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"ieft-page: filter {where!r}: {error}", file=sys.stderr)
            raise told(
                f"This SQL condition cannot be used: a comparison of {', '.join(columns)} expected, with a value of "
                "the column's own kind, such as: width >= 256 AND north > 48, or acquired >= timestamp '2021-06-01'."
            ) from None

    def _show_upload(self, file, image):
        """What the place of the uploaded image shows: the file itself, which is searched for again, where browsers can
        show it, else a picture of it."""
        if image is None:
            return None
        return gr.skip() if is_shown_by_browsers(file["path"]) else draw_thumbnail(image, 2 * DETAIL)

    def _captions_of(self, image):
        """The sentences of the index that fit an uploaded image best."""
        if image is None or not self.index.captions.count_rows():
            return []
        return self.index.search_captions(image, top_k=MOST_CAPTIONS)

    def _row(self, identifier):
        """The row of the index that an id stands for, as a hit."""
        content, col, row = split_id(identifier)
        where = f"content = {quote(content)} AND col = {col} AND row = {row}"
        rows = self.index.rows(where)
        if not rows:
            raise told("An image of this question is not in the archive any more: search again.")
        return rows[0]

    def _offer_geojson(self, hits):
        """A GeoJSON download of the hits' outlines, if there are any, with file names instead of paths."""
        if not any(hit["geometry"] for hit in hits):
            return gr.DownloadButton("No image with geographic bounds: no GeoJSON", value=None, interactive=False)
        named = [hit | {"file": name_of(hit)} for hit in hits]
        text = json.dumps(to_geojson(named), indent=1, default=str)
        file = gradio.processing_utils.save_bytes_to_cache(text.encode(), "hits.geojson", self.geojson.GRADIO_CACHE)
        return gr.DownloadButton("Download as GeoJSON", value=file, interactive=True)

    # What visitors select -------------------------------------------------------------------------------------------

    def explain(self, query: str | None, hits: list | None, event: gr.EventData) -> dict:
        """Show the hit selected in the gallery, with the heat map of the sentence if there is one."""
        shown = part_of(event, "value")
        return self._explain(
            query, hits, part_of(event, "index"), shown.get("caption") if isinstance(shown, dict) else None
        )

    def explain_of_map(self, query: str | None, hits: list | None, event: gr.EventData) -> dict:
        """Show the hit selected on the map, which is then selected in the gallery too."""
        index = part_of(event, "index")
        return self._explain(query, hits, index, part_of(event, "label")) | {
            self.gallery: gr.Gallery(selected_index=index)
        }

    def _explain(self, query, hits, index, label):
        if not hits or type(index) is not int or not 0 <= index < len(hits):
            raise told("These results are too old to be explained: search again.")
        hit = hits[index]
        if label not in (label_hit(hit), label_on_map(index + 1, hit)):  # what was selected is of the search before
            raise told("Other images are shown by now: select again.")
        image, words = self._draw_reasons(hit, query)
        label = "What spoke for the sentence: the brighter, the more" if words else "Image"
        return {
            self.chosen: index,
            self.map: gr.HTML(chosen=index),
            self.detail: gr.Column(visible=True),
            self.picture: gr.Image(image, label=label),
            self.reasons: describe_words(words) + describe_hit(hit),
        }

    def _draw_reasons(self, hit, sentence):
        """A hit's image, with the heat map of a sentence if there is one, and (word, part in the score) pairs."""
        with archive_errors():
            picture = read_hit(hit)
        image = ImageOps.contain(picture, (DETAIL, DETAIL))
        if not sentence:
            return image, []
        processor = self.index.processor
        explanation = explain_pair(self.index.model, processor, picture, sentence)
        return draw_heat_map(image, explanation.heat, fit=processor.image_processor.fit), explanation.words

    def explain_id(self, identifier, sentence=""):
        """The image of an id, with a heat map of what spoke for the sentence, and each word's part in the score."""
        sentence = check_text(sentence, "sentence")
        hit = self._row(identifier)
        image, words = self._draw_reasons(hit, sentence)
        facts = describe_for_programs(hit)
        return facts | {"words": [{"word": word, "part": round(float(part), 4)} for word, part in words]}, image

    def add_example(self, sign, examples, hits, index):
        """Add the hit that is shown to the examples of the question, as wanted (+) or not wanted (-)."""
        if not hits or index is None:
            raise told("These results are too old to be used: search again.")
        identifier = id_of(hits[index])
        kept = [each for each in check_examples(examples) if each[1:] != identifier]
        return self._offer_examples(check_examples([*kept, sign + identifier]))

    def _offer_examples(self, examples):
        names = [EXAMPLE_NAMES[each[0]].format(name_of(self._row(each[1:]))) for each in examples]
        choices = list(zip(names, examples, strict=True))
        return gr.CheckboxGroup(choices, value=examples, visible=bool(examples))

    def take_box(self, event: gr.EventData) -> str:
        """The box that was drawn on the map, as the text of the filter."""
        return check_text(part_of(event, "box"), "box")

    def open_link(self, request: gr.Request) -> dict:
        """What the page's address asks, and what is found."""
        asked = read_link(request.query_params.multi_items())
        if asked is None:
            return gr.skip()
        settings = [asked[name] for name in SETTINGS]
        found = self.search(asked["sentence"], asked["without"], None, asked["examples"], *settings)
        fields = dict(zip(self.settings, settings, strict=True))
        fields |= {self.caption: asked["sentence"], self.without: asked["without"]}
        return found | fields | {self.examples: self._offer_examples(asked["examples"])}


class UnreadableUpload(Exception):
    """An uploaded file that cannot be used; the message is for the visitor."""


class Found(NamedTuple):
    """What was asked, checked; the image that was uploaded; the hits; and how many images pass the filters."""

    asked: dict
    image: Image.Image | None
    hits: list
    number: int


@contextmanager
def archive_errors():
    """Log errors of reading the archive, which contain paths, and show a message without them."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        print(f"ieft-page: {error}", file=sys.stderr)
        message = "An image of the archive is gone or damaged, or the index is. The page's log tells which."
        if "nothing is left to look for" in str(error):  # of a query that asks for what it leaves out
            message = str(error)
        raise told(message) from None


def part_of(event, name):
    """What a browser sent with an event; None where it did not."""
    return event._data.get(name) if isinstance(event._data, dict) else None


def draw_thumbnail(image, side):
    image.thumbnail((side, side))
    return image


def name_of(hit):
    """The name of a hit's file, without the folders above it."""
    return Path(hit["file"]).name


def id_of(hit):
    """What stands for a row of the index in links and in the API: the digest of its content, and its window."""
    return f"{hit['content']}.{hit['col']}.{hit['row']}"


def split_id(identifier):
    """`id_of` back -> (digest, column, row)."""
    content, *place = str(identifier).rsplit(".", 2)
    whole = len(place) == 2 and all(part.isascii() and part.isdigit() and len(part) < 10 for part in place)
    if not whole or set(content) & set("'\\\0"):  # which no digest has, and no condition may hold
        raise told("The id of an image expected, as a search gives it.")
    return check_text(content, "id"), *map(int, place)


def label_hit(hit):
    likely = hit.get("probability")
    return f"{hit['rank']}.  {hit['score']:.2f}  {hit['stage']}" + ("" if likely is None else f"  {likely:.0%}")


def label_on_map(rank, hit):
    return f"{rank}. {name_of(hit)}"


def describe_words(words):
    """The words as HTML, on green if they raise the score, on red if they lower it."""
    largest = max((abs(part) for _, part in words), default=0) or 1
    spans = [
        f'<span class="word" style="background: rgba({"20, 184, 166" if part > 0 else "239, 68, 68"}, '
        f'{abs(part) / largest * 0.5:.2f})">{html.escape(word)} <small>{part:+.2f}</small></span>'
        for word, part in words
    ]
    return f"<p>Each word's part in the score:</p><p>{''.join(spans)}</p>" if words else ""


def list_captions(captions):
    """Sentences of the index as an HTML list, the best first."""
    items = "".join(f"<li>{html.escape(hit['caption'])} <small>{hit['score']:.2f}</small></li>" for hit in captions)
    return f"<p>Sentences of the archive that fit the image best:</p><ol>{items}</ol>" if captions else ""


def tell_number(found, shown):
    """How many images are shown, of how many that pass the filters; or why none is."""
    least, best = found.asked["min_probability"], found.hits.best_probability
    if not found.number:
        return "No image passes these filters."
    if not shown and least and best is not None:
        return f"Nothing in this archive fits: the best image has a probability of {best:.0%}, below {least:.0%}."
    return f"{shown} of {found.number:,} images."


def tell_unplaced(hits, drawn):
    """How many of the hits are on the map and why the others are not, where that is not all of them."""
    unknown = sum(hit["geometry"] is None for hit in hits)
    beyond = len(hits) - drawn - unknown
    reasons = []
    if unknown and beyond:
        reasons.append(f"the place of {unknown} is not known")
    elif unknown:
        reasons.append("the place of the others is not known" if drawn else "their places are not known")
    if beyond:
        reasons.append(f"{beyond} beyond {MAP_EDGE:.0f}° north or south, where the map ends")
    known = f"{drawn} of {len(hits)} images are on the map" if drawn else "None of these images is on the map"
    return f"{known}: {'; '.join(reasons)}." if reasons else ""


def describe_hit(hit):
    """The facts about a hit as an HTML table, with the name of its file but not the path."""
    facts = {"file": name_of(hit), "pixels": f"{hit['width']} x {hit['height']}"}
    if hit["tiling"]:
        facts["tile"] = f"{hit['tile_width']} x {hit['tile_height']}, from column {hit['col']}, row {hit['row']}"
    facts |= {"rank": hit["rank"], hit["stage"]: f"score {hit['score']:.3f}", "similarity": f"{hit['similarity']:.3f}"}
    if hit.get("probability") is not None:
        facts["probability"] = f"{hit['probability']:.1%}"
    if hit["geometry"]:
        facts["bounds"] = ", ".join(f"{side} {hit[side]:.6g}°" for side in SIDES)
    if hit["acquired"]:
        facts["acquired"] = f"{hit['acquired']:%Y-%m-%d %H:%M} UTC"
    rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(fact))}</td></tr>" for name, fact in facts.items())
    return f"<table>{''.join(rows)}</table>"


def describe_for_programs(hit):
    """A hit, or a row of the index, as JSON: what visitors may see of it."""
    found = {
        name: hit[name] for name in ("rank", "score", "similarity", "stage", "probability", "merged") if name in hit
    }
    size = {name: hit[name] for name in ("width", "height", "col", "row", "tile_width", "tile_height")}
    placed = hit["geometry"] and {"bbox": [hit[side] for side in SIDES], "geometry": json.loads(hit["geometry"])}
    acquired = hit["acquired"] and hit["acquired"].isoformat()
    return {"id": id_of(hit), "name": name_of(hit)} | found | size | (placed or {}) | {"acquired": acquired}


def launch(page, *, requests_per_minute):
    """Serve a page until it is stopped, on GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, or 127.0.0.1:7860."""
    theme = gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    for name, shade in (("fill", 700), ("fill_hover", 800)):  # white on them can be read
        for mode in ("", "_dark"):
            theme.set(**{f"button_primary_background_{name}{mode}": f"*primary_{shade}"})
    # In place of files, Gradio takes addresses, and would fetch whatever a visitor names.
    gradio.processing_utils.async_ssrf_protected_download = refuse_address
    page.queue(max_size=32).launch(
        theme=theme,
        css_paths=WEB / "page.css",
        head='<script src="web/page.js"></script>',
        max_file_size=LARGEST_UPLOAD,
        state_session_capacity=1000,
        footer_links=[],
        share=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        app_kwargs={
            "routes": [Mount("/web", StaticFiles(directory=WEB))],
            "middleware": [Middleware(Gate, requests_per_minute=requests_per_minute)],
        },
    )
