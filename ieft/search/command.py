"""Index an archive and search for images in it: the command `ieft-search`.

    ieft-search index ARCHIVE --model outputs/demo --index archive.lance
    ieft-search index SCENE.tif --tile 256 --overlap 0.25 --model outputs/demo --index archive.lance
    ieft-search query "two white storage tanks beside a river" --model outputs/demo --index archive.lance
    ieft-search query "storage tanks" --like photo.png --without clouds --model outputs/demo --index archive.lance
    ieft-search query --image photo.png --model outputs/demo --index archive.lance
    ieft-search query --queries questions.txt --output hits.csv --model outputs/demo --index archive.lance

Hits are printed as a table or JSON, or written as a contact sheet or GeoJSON.
"""

import argparse
import codecs
import json
import os
import re
import sys
import time
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm
from transformers.utils import logging

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.data.images import parse_bands, read_image
from ieft.data.storage import is_address
from ieft.evaluation.devices import DTYPES
from ieft.search.archive_files import find_images, open_file, read_hits, root_of
from ieft.search.catalogues import add_catalogue, is_catalogue, to_item_collection
from ieft.search.explain import draw_heat_map, explain_pair
from ieft.search.feature_cache import bytes_per_token
from ieft.search.filters import without_place_in_code
from ieft.search.geography import to_geojson
from ieft.search.query_files import (
    Question,
    check_faults,
    check_output,
    find_example,
    parse_weights,
    read_questions,
    to_queries,
    write_hits,
)
from ieft.search.read_ahead import THREADS, ReadAhead, default_workers

SHEET_COLUMNS, THUMB, GAP, LABEL = 5, 192, 12, 20


def main(arguments=None):
    args = build_parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show loses no hit
        sys.stdout.reconfigure(errors="backslashreplace")
    hide_loading_bar()
    try:
        code = args.command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: the vector store's and torch's
        place = f"{args.index}: " if "lance error" in str(error) else ""
        sys.exit(f"ieft-search: {place}{without_place_in_code(error)}")
    except KeyboardInterrupt:
        sys.exit("ieft-search: interrupted; what was added is kept, and the same command resumes.")


def hide_loading_bar():
    """Hide the bar of loading weights, which takes a moment; the bars of downloads stay as they are."""
    hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()  # those of the Hub too
    if not hidden:
        enable_progress_bars()


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        required=True, metavar="index | query | info | export | delete | prune | relocate"
    )
    _add_index(commands)
    _add_query(commands)
    _add_command(commands, "info", show_info, "show what the index contains")
    export = _add_command(commands, "export", export_index, "print the metadata of the images as JSON lines")
    export.add_argument("--where", help="as for `query`")
    _add_place_and_time(export, "only images")
    export.add_argument("--geojson", action="store_true", help="print outlines instead, as one FeatureCollection")
    delete = _add_command(commands, "delete", delete_images, "remove images from the index")
    delete.add_argument("files", nargs="+")
    prune = _add_command(commands, "prune", prune_index, "remove missing files from the index, and list them")
    prune.add_argument("--force", action="store_true", help="even if all files of a folder are gone")
    relocate = _add_command(commands, "relocate", relocate_index, "update the location of an archive that was moved")
    relocate.add_argument("folder", help="new location of the archive, a folder or an address")
    relocate.add_argument("--former", help="former location, if it is not the root shown by `info`")
    return parser


def _add_index(commands):
    index = _add_command(commands, "index", index_archive, "add the images of an archive")
    index.add_argument(
        "archive",
        nargs="?",
        help="a folder, searched recursively; other storage such as s3://bucket/prefix, gs://, az:// or https://; one "
        "image; a text file with a path or an address in each line; or a STAC catalogue, item collection or API",
    )
    index.add_argument(
        "--tile",
        type=int,
        help="cut larger images into tiles of this side length in pixels; 0 keeps them whole; by default, images stay "
        "tiled as in the index",
    )
    index.add_argument("--overlap", type=float, help="with --tile, the fraction shared with the next tile (0.25)")
    index.add_argument(
        "--bands",
        help="bands to use as red, green and blue, from 1, such as 4,3,2; by default those that an image was indexed "
        "with, or that the file declares",
    )
    index.add_argument(
        "--states",
        type=_states,
        metavar="bf16 | int8 | pq96 | ...",
        help="also store image features for re-ranking, for checkpoints with first_joint_layer above 0: two bytes or "
        "one for each number, or by product quantisation such as pq96, 96 bytes for each token",
    )
    index.add_argument("--asset", help="of a STAC catalogue, the key of the asset to index, such as visual")
    index.add_argument(
        "--collection", action="append", help="of a STAC catalogue, a collection to take; may be repeated"
    )
    index.add_argument(
        "--property",
        action="append",
        help="of a STAC catalogue, a property that becomes a column, such as view:off_nadir; may be repeated",
    )
    _add_place_and_time(index, "of a STAC catalogue, only items")
    index.add_argument(
        "--num_workers",
        type=int,
        help="processes that read images, besides a thread; by default as many as leave one processor to the network",
    )
    index.add_argument(
        "--cluster",
        nargs="?",
        const="auto",
        type=_some_text,
        metavar="ADDRESS",
        help="work on the machines of a Ray cluster, by default the one that `ray start` started; they must see index "
        "and archive under the same paths or addresses",
    )
    index.add_argument("--captions", help="a text file, one sentence per line, to be found by `query --image`")


def _add_query(commands):
    query = _add_command(commands, "query", query_index, "find images for a sentence, or images similar to an image")
    query.add_argument("caption", nargs="?", help="a sentence")
    query.add_argument("--image", help="an image file or its address, instead of a sentence")
    example = "an image file, its address, or a tile of the index such as 'city.tif [576 0 96 96]'"
    parts = {
        "--with": "another sentence that the image should fit; may be repeated",
        "--like": f"{example}, that the image should be like; may be repeated",
        "--without": "a sentence that the image should not fit; may be repeated",
        "--unlike": f"{example}, that the image should not be like; may be repeated",
    }
    for name, text in parts.items():
        query.add_argument(name, dest=name[2:] + "_", action="append", default=[], help=text)
    query.add_argument(
        "--weights",
        help="positive numbers such as 1,2,0.5 for the sentence and each --with, --like, --without and --unlike, in "
        "this order; by default 1, and 0.25 for what is not wanted",
    )
    query.add_argument(
        "--queries",
        help="a file of queries: a sentence in each line; or .csv or .jsonl with text, like, without, unlike, weights",
    )
    query.add_argument("--output", help="write the hits to this file: .csv, .jsonl or .parquet")
    query.add_argument("--bands", help="bands of --image, --like and --unlike to use as red, green and blue, from 1")
    query.add_argument("--top_k", type=int, default=10)
    query.add_argument("--offset", type=int, default=0, help="hits to leave out, for further pages")
    query.add_argument("--rerank_top_k", type=int, default=32, help="hits to re-rank with the network; 0: none")
    query.add_argument(
        "--where", help="SQL filter over the columns listed by `info`: \"width >= 256 AND file LIKE '%%port%%'\""
    )
    _add_place_and_time(query, "only images")
    query.add_argument(
        "--similarity_weight",
        type=float,
        default=0.0,
        help="weight of the embeddings' similarity in the score; run_retrieval.py --rerank_top_k finds one",
    )
    query.add_argument(
        "--min_probability",
        type=float,
        help="only hits of at least this probability, from 0 to 1; of a calibrated checkpoint",
    )
    query.add_argument("--explain", help="a folder for heat maps that explain each hit")
    query.add_argument("--json", action="store_true", help="JSON instead of the table")
    query.add_argument("--sheet", help="write a contact sheet of the hits to this PNG file")
    query.add_argument("--geojson", help="write the outlines of the hits to this GeoJSON file")
    query.add_argument("--stac", help="write the hits to this file as a STAC ItemCollection")
    query.add_argument(
        "--overwrite", action="store_true", help="replace files of --output, --sheet, --geojson, --stac and --explain"
    )


def _add_command(commands, name, function, text):
    command = commands.add_parser(name, help=text)
    command.set_defaults(command=function)
    command.add_argument(
        "--model",
        required=True,
        help="folder or Hub id of a checkpoint, with contrastive heads unless the index has another embedder",
    )
    command.add_argument("--index", required=True, help="a folder, or object storage such as s3://bucket/prefix")
    command.add_argument(
        "--embedder",
        type=_some_text,
        help="what embeds images and sentences for the shortlist instead of the checkpoint's heads: a CLIP or SigLIP "
        "of transformers (folder or user/name), or of open_clip hf-hub:user/name or ARCHITECTURE:FILE such as "
        "ViT-B-32:RemoteCLIP-ViT-B-32.pt; by default what the index was made with",
    )
    command.add_argument("--device", default="auto", help="cuda, cuda:1, mps or cpu; by default the best there is")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of the matrix products; by default one of 16 bits where it is faster",
    )
    return command


def _some_text(text):
    """An option's value, which is not empty: that of a shell's variable that is not set asks for nothing."""
    if not text:
        raise argparse.ArgumentTypeError("a value expected; it is empty")
    return text


def _states(kind):
    try:
        bytes_per_token(kind)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return kind


def _add_place_and_time(command, which):
    names = ("WEST", "SOUTH", "EAST", "NORTH")
    text = f"{which} that touch this box in degrees; west above east across the antimeridian"
    command.add_argument("--bbox", nargs=4, type=float, metavar=names, help=text)
    text = f"{which} acquired then, such as 2021-06-01, 2021-06/2021-08 or 2021-06-15/.."
    command.add_argument("--datetime", help=text)


def open_index(args, **options):
    from ieft.search.index import ImageIndex  # imported here, so that a missing lancedb is reported like other errors

    if not os.path.isdir(args.model) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", args.model):
        raise FileNotFoundError(f"--model {args.model}: a checkpoint's folder or a Hub id (user/name) expected.")
    try:
        model = IeftForImageTextRetrieval.from_pretrained(args.model)
        processor = IeftProcessor.from_pretrained(args.model)
    except (OSError, ValueError):
        raise
    except Exception as error:  # safetensors and tokenizers raise their own errors
        raise ValueError(f"{args.model} cannot be loaded as a checkpoint: {type(error).__name__}: {error}") from error
    options |= {"embedder": args.embedder, "device": args.device, "dtype": args.dtype}
    return ImageIndex(args.index, model, processor=processor, **options)


def index_archive(args):
    if args.archive is None and args.captions is None:
        raise ValueError("An archive of images, --captions or both expected.")
    if args.overlap is not None and not args.tile:
        raise ValueError("--overlap needs --tile: it is the overlap of the tiles.")
    bands = parse_bands(args.bands)
    unreadable, catalogue = {}, None
    of_catalogue = {
        "asset": args.asset, "collections": args.collection, "properties": args.property or (), "bbox": args.bbox,
        "datetime": args.datetime,
    }  # fmt: skip
    if args.archive is not None and is_catalogue(args.archive):
        catalogue = args.archive
    elif any(of_catalogue.values()):
        raise ValueError(
            "--asset, --collection, --property, --bbox and --datetime are of a STAC catalogue: a file or an address "
            f"of JSON expected; got {args.archive}."
        )
    files = find_images(args.archive, unreadable) if args.archive is not None and not catalogue else []
    captions = read_lines(args.captions) if args.captions else []
    root = root_of(args.archive) if files else None
    if args.cluster and args.num_workers:
        raise ValueError("--num_workers are processes on this machine: leave it away with --cluster.")
    num_workers = default_workers() if args.num_workers is None else args.num_workers
    if num_workers < 0:
        raise ValueError(f"--num_workers from 0 expected; got {num_workers}.")
    is_remote = catalogue is not None or any(map(is_address, files))
    num_workers = num_workers if files and not args.cluster else 0
    with ReadAhead(num_workers, threads=THREADS if is_remote else 1) as reader:  # before other threads
        index = open_index(args, create=True, states=args.states, root=root)
        options = {"tile": args.tile, "overlap": args.overlap, "bands": bands}
        options |= {"reader": reader, "cluster": args.cluster, "progress": sys.stderr.isatty()}
        start = time.perf_counter()
        if catalogue:
            report = add_catalogue(index, catalogue, **of_catalogue, **options)
        else:
            report = index.add(files, **options)
        seconds = time.perf_counter() - start
    of_captions = index.add_captions(captions)
    index.optimize()
    if args.archive is not None:
        kind = "tiles" if args.tile else "images"
        print(f"{report['added']:,} added, {report['unchanged']:,} unchanged, {len(index):,} {kind} in {args.index}")
        print(summarize(len(files), report, len(unreadable | report["unreadable"]), seconds))
    if args.captions:
        count = index.captions.count_rows()
        print(f"{of_captions['added']:,} added, {of_captions['unchanged']:,} unchanged, {count:,} captions")
    unreadable |= report["unreadable"]
    for file, why in unreadable.items():
        print(f"not indexed: {file}: {why}", file=sys.stderr)
    return 1 if unreadable else 0


def summarize(images, report, skipped, seconds):
    """A line on how long indexing took; images that were skipped are named one by one elsewhere.

    Args:
        images: their number, or 0 where the catalogue told them.
    """
    rows = report["added"] + report["unchanged"]
    counted = f"{images:,} images" if images else f"{rows:,} images or tiles"
    of_rows = f" ({rows:,} rows)" if images and rows + skipped != images else ""
    named = f", {skipped:,} not indexed, for the reasons below" if skipped else ""
    return f"{counted}{of_rows} in {seconds:,.1f} s, {(images or rows) / seconds:,.1f} images/s{named}"


def read_lines(file):
    """Lines of a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        ValueError: for other text, with the file's name.
    """
    content = Path(file).read_bytes()
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
             codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: text in UTF-8 expected, or with a byte order mark: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def check_outputs(args):
    """Check that no output would be replaced.

    Raises:
        FileExistsError: if a file or a non-empty folder exists already.
    """
    given = [output for output in (args.output, args.sheet, args.geojson, args.stac, args.explain) if output]
    outputs = [os.path.abspath(output) for output in given]
    if len(set(outputs)) < len(outputs):
        raise ValueError(
            "--output, --sheet, --geojson, --stac and --explain write to different places; two of them name the same."
        )
    for output in given:
        path = Path(output)
        taken = any(path.iterdir()) if path.is_dir() and output == args.explain else path.exists()
        if taken and not args.overwrite:
            raise FileExistsError(f"{output} exists already: pass --overwrite to replace it, or name another one.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{output} cannot be written: there is no folder {path.parent}.")


def query_index(args):
    check_query(args)
    check_outputs(args)
    if args.queries:
        return query_many(args)
    index = open_index(args)
    index.needs_files |= bool(args.sheet or args.explain)
    found = look_up_image(index, args) if args.image is not None else look_up_question(index, args)
    hits = found["images"]
    if args.output:
        write_hits(args.output, [(question_of(args), hits)], index)
    if args.sheet:
        draw_sheet(hits).save(args.sheet, format="PNG")
    if args.geojson:
        Path(args.geojson).write_text(json.dumps(to_geojson(hits), indent=1, default=str), encoding="utf-8")
    if args.stac:
        Path(args.stac).write_text(json.dumps(to_item_collection(hits), indent=1, default=str), encoding="utf-8")
    if args.json:
        print(json.dumps(found if args.image is not None else hits, indent=1, default=str))
    else:
        tables = [caption_table(found["captions"])] if found.get("captions") else []
        print("\n\n".join([*tables, hit_table(hits, args.min_probability, args.offset)]))
    return 0


def check_query(args):
    """Check that the options of `query` ask for one thing.

    Raises:
        ValueError: for two that exclude each other, one that lacks another, and what is no query.
    """
    is_asked = bool(args.caption is not None or args.with_ or args.like_ or args.without_ or args.unlike_)
    if args.queries:
        others = (args.image is not None, args.weights, args.sheet, args.geojson, args.stac, args.explain, args.json)
        if is_asked or any(others) or not args.output:
            raise ValueError(
                "--queries takes all queries from its file, and needs --output FILE; no sentence, --image, --with, "
                "--like, --without, --unlike, --weights, --json, --sheet, --geojson, --stac or --explain beside it."
            )
        if os.path.realpath(args.queries) == os.path.realpath(args.output):
            raise ValueError(f"--output would replace the queries in {args.queries}: name another file.")
    elif is_asked == (args.image is not None):
        raise ValueError(
            "Either a sentence or --image expected, or parts of a query such as --like."
            + " To combine a sentence and an image, use --like instead of --image." * is_asked
        )
    elif args.image is not None and (args.output or args.weights):
        raise ValueError("--output and --weights are for queries by sentences, --like and --unlike, not for --image.")
    elif is_asked:
        question = question_of(args)
        question.check()
        if args.explain and len(question.text) != 1:
            raise ValueError(f"--explain explains one sentence that is wanted; there are {len(question.text)}.")
    if args.min_probability is not None and not args.queries and not (is_asked and question_of(args).is_sentence):
        raise ValueError("--min_probability needs a sentence alone: combinations and similar images have none.")
    if args.output:
        check_output(args.output)
    if args.bands and not (args.image is not None or args.like_ or args.unlike_ or args.queries):
        raise ValueError(
            "--bands needs --image, --like or --unlike: the images of the index keep the bands that they were indexed "
            "with."
        )


def question_of(args):
    """The query of a command as a `Question`."""
    text = [*([] if args.caption is None else [args.caption]), *args.with_]
    return Question("1", text, args.like_, args.without_, args.unlike_, parse_weights(args.weights))


def search_options(args):
    """The options of `query` as `ImageIndex.search` takes them."""
    names = ("top_k", "offset", "rerank_top_k", "similarity_weight", "min_probability", "where", "bbox", "datetime")
    return {name: getattr(args, name) for name in names}


def query_many(args):
    """Write the hits of a file of queries."""
    questions = read_questions(args.queries)
    if args.min_probability is not None:
        why = "--min_probability needs a sentence alone."
        faults = {question.line: why for question in questions if not question.is_sentence}
        check_faults(args.queries, faults, len(questions))
    index = open_index(args)
    start = time.perf_counter()
    queries = to_queries(index, questions, args.queries, bands=parse_bands(args.bands))
    found = index.search_many(queries, **search_options(args))
    found = tqdm(found, "Searching", len(queries), unit=" queries", disable=not sys.stderr.isatty())
    count, empty = write_hits(args.output, zip(questions, found, strict=True), index)
    seconds = time.perf_counter() - start
    print(f"{len(questions):,} queries, {count:,} hits in {args.output}, {seconds:,.1f} s")
    if empty:
        named = ", ".join(empty[:10]) + (f" and {len(empty) - 10:,} more" if len(empty) > 10 else "")
        print(f"{len(empty):,} without a hit: {named}", file=sys.stderr)
    return 0


def look_up_question(index, args):
    """Search images for a sentence or a combination and, with --explain, explain the hits: {"images": hits}."""
    question = question_of(args)
    bands = parse_bands(args.bands)
    images = {name: find_example(index, name, bands=bands) for name in [*question.like, *question.unlike]}
    hits = index.search(question.to_query(images), **search_options(args))
    for hit, picture in read_hits(hits) if args.explain else ():
        save_explanation(index, args.explain, picture, question.text[0], hit)
    return {"images": hits}


def look_up_image(index, args):
    """Search captions (explained with --explain) and similar images: {"captions": hits, "images": hits}."""
    image = read_image(open_file(args.image), bands=parse_bands(args.bands))
    options = search_options(args)
    filters = {name: options.pop(name) for name in ("where", "bbox", "datetime")}
    del options["min_probability"]
    captions = index.search_captions(image, **options)
    for hit in captions if args.explain else ():
        save_explanation(index, args.explain, image, hit["caption"], hit)
    similar = index.search_image(image, top_k=args.top_k, offset=args.offset, **filters)
    return {"captions": captions, "images": similar}


def save_explanation(index, folder, image, caption, hit):
    """Save the heat map of a hit to a folder, and add its path and the word contributions to the hit."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = explain_pair(index.model, index.processor, image, caption)
    file = Path(folder, f"{hit['rank']:03}.png")
    draw_heat_map(image, found.heat, fit=index.processor.image_processor.fit).save(file)
    hit.update(heat_map=str(file), words=found.words)


def show_info(args):
    index = open_index(args)
    columns = [name for name in index.table.schema.names if name not in ("vector", "state")]
    print(f"{len(index):,} images or tiles\n{index.captions.count_rows():,} captions")
    made_by = f"embedder {index.embedder.name} " if index.embedder else "checkpoint "
    print(f"{made_by}{index.checkpoint[:12]}\nstates {index.states or 'none'}\nroot {index.root or 'none'}")
    print(f"columns {', '.join(columns)}")
    return 0


def export_index(args):
    rows = open_index(args).rows(args.where, bbox=args.bbox, datetime=args.datetime)
    if args.geojson:
        print(json.dumps(to_geojson(rows), indent=1, default=str))
    else:
        for row in rows:
            print(json.dumps(row, default=str))
    return 0


def delete_images(args):
    index = open_index(args)
    missing = index.missing(args.files)
    print(f"{index.delete(args.files):,} deleted")
    for file in missing:
        print(f"not in the index: {file}", file=sys.stderr)
    return 1 if missing else 0


def prune_index(args):
    index = open_index(args)
    gone = index.prune(force=args.force)
    for file in gone:
        print(f"taken out: {file}")
    index.optimize()
    print(f"{len(gone):,} files taken out, {len(index):,} images or tiles left")
    return 0


def relocate_index(args):
    index = open_index(args)
    found, count = index.relocate(args.folder, former=args.former)
    print(f"root {index.root}: {found:,} of {count:,} files found")
    return 0


def hit_table(hits, min_probability=None, offset=0):
    """Hits as text, one line each, or a line that says that there are none."""
    if not hits:
        best = getattr(hits, "best_probability", None)
        if min_probability is not None and best is not None and best < min_probability:
            return f"Nothing in this archive fits: the best image has a probability of {best:.2f}."
        return "No further image matches." if offset else "No image matches."
    lines = [f"{_head_of_line(hits)} file"]
    lines += [f"{_start_of_line(hit, hits)} {hit['file']}{_name_window(hit)}{_name_words(hit)}" for hit in hits]
    return "\n".join(lines)


def caption_table(hits):
    """Captions as text, one line each."""
    lines = [f"{_head_of_line(hits)} caption"]
    return "\n".join([*lines, *(f"{_start_of_line(hit, hits)} {hit['caption']}{_name_words(hit)}" for hit in hits)])


def _head_of_line(hits):
    return f"{'rank':>4}{'score':>9}{'  prob.' if _have_probability(hits) else ''}  {'stage':<10}"


def _start_of_line(hit, hits):
    probability = f"{hit['probability']:7.2f}" if hit["probability"] is not None else " " * 7
    return f"{hit['rank']:>4}{hit['score']:>9.3f}{probability * _have_probability(hits)}  {hit['stage']:<10}"


def _have_probability(hits):
    """Whether the table has a column of probabilities."""
    return any(hit["probability"] is not None for hit in hits)


def _name_window(hit):
    """The window of a tile in GDAL's order: column, row, width, height."""
    if not hit["tiling"]:
        return ""
    others = f", and {hit['merged'] - 1} that overlap" if hit["merged"] > 1 else ""
    return f"  [{hit['col']} {hit['row']} {hit['tile_width']} {hit['tile_height']}{others}]"


def _name_words(hit):
    """A second line with the words that contribute most to an explained hit."""
    strongest = sorted(hit.get("words", ()), key=lambda pair: -abs(pair[1]))[:4]
    return "\n" + " " * 27 + ", ".join(f"{word} {share:+.2f}" for word, share in strongest) if strongest else ""


def draw_sheet(hits):
    """A contact sheet (PIL RGB) of the readable hits: thumbnails in rows of five, rank and score below each."""
    pairs = read_hits(hits)
    rows = max(1, -(-len(pairs) // SHEET_COLUMNS))
    step = THUMB + GAP
    sheet = Image.new("RGB", (SHEET_COLUMNS * step + GAP, rows * (step + LABEL) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (hit, picture) in enumerate(pairs):
        left, top = GAP + place % SHEET_COLUMNS * step, GAP + place // SHEET_COLUMNS * (step + LABEL)
        sheet.paste(ImageOps.fit(picture, (THUMB, THUMB)), (left, top))
        pen.text((left, top + THUMB + 4), f"{hit['rank']}.  {hit['score']:.2f}  {hit['stage']}", "black")
    return sheet


if __name__ == "__main__":
    sys.exit(main())
