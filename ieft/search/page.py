"""The search page: its layout, and what happens when a visitor asks.

Visitors see thumbnails and file names, no paths and no files.
"""

import html
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import gradio.processing_utils
from PIL import ImageOps
from starlette.middleware import Middleware

from ieft.search.archive_files import read_hit, read_hits
from ieft.search.explain import draw_heat_map, explain_pair
from ieft.search.geography import to_geojson
from ieft.search.visitors import (
    LARGEST_UPLOAD,
    LONGEST_SIDE,
    MEGABYTE,
    MOST_CHARACTERS,
    MOST_RERANKED,
    MOST_SHOWN,
    Gate,
    check_settings,
    check_text,
    read_upload,
    refuse_address,
    told,
    write_filter,
)

HIDDEN_COLUMNS = ("vector", "state", "limits")
KEPT_SECONDS = 1800  # uploads, thumbnails, what a visitor was shown last
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
            with gr.Row():
                bbox = gr.Textbox(
                    label="Touches west, south, east, north (degrees)",
                    placeholder="7.5, 47.1, 8.9, 47.9",
                    min_width=160,
                )
                acquired = gr.Textbox(label="Acquired", placeholder="2021-06-01 or 2021-06/2021-08", min_width=160)
            where = gr.Textbox(
                label="SQL condition over the index's columns", placeholder="width >= 256 AND north > 48"
            )
            with gr.Row():
                top_k = gr.Slider(1, MOST_SHOWN, 12, step=1, label="Images to show")
                rerank_top_k = gr.Slider(0, MOST_RERANKED, 32, step=1, label="Images of the shortlist to re-rank")
        self.settings = [top_k, rerank_top_k, width, height, name, placed, where, bbox, acquired]
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

    def explain(self, query: str | None, hits: list | None, event: gr.SelectData) -> dict:
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


@contextmanager
def archive_errors():
    """Log errors of reading the archive, which contain paths, and show a message without them."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        message = "An image of the archive is gone or damaged, or the index is. The page's log tells which."
        raise told(message) from None


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
