"""Index an archive and look images up in it: the command `ieft-search`.

    ieft-search index ARCHIVE --model outputs/demo --index archive.lance
    ieft-search query "two white storage tanks beside a river" --model outputs/demo --index archive.lance
    ieft-search query --image photo.png --model outputs/demo --index archive.lance

In: a checkpoint, image files, queries. Out: an index; hits as a table, JSON, a contact sheet, GeoJSON. How images are
found is the business of `ieft.index`.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from transformers.utils import logging

from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.index import ImageIndex, find_images, read_picture

SHEET_COLUMNS, THUMB, GAP, LABEL = 5, 192, 12, 20


def main(arguments=None):
    args = build_parser().parse_args(arguments)
    logging.disable_progress_bar()  # of loading weights
    try:
        return args.command(args)
    except (OSError, ValueError) as error:
        sys.exit(f"ieft-search: {error}")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="index | query | info | export | delete")
    index = _add_command(commands, "index", index_archive, "add the images of an archive")
    index.add_argument("archive", help="a folder, searched to the bottom, or one image")
    query = _add_command(commands, "query", query_index, "find images for a sentence, or like an image")
    query.add_argument("caption", nargs="?", help="a sentence")
    query.add_argument("--image", help="an image file, instead of a sentence")
    query.add_argument("--top_k", type=int, default=10)
    query.add_argument("--rerank_top_k", type=int, default=32, help="hits that the network reads; 0 for none")
    query.add_argument(
        "--where", help="SQL over the columns that `info` names: \"width >= 256 AND file LIKE '%%port%%'\""
    )
    query.add_argument("--json", action="store_true", help="JSON instead of the table")
    query.add_argument("--sheet", help="a PNG file to draw the hits in")
    query.add_argument("--geojson", help="a file for the hits' outlines")
    _add_command(commands, "info", show_info, "what the index holds")
    export = _add_command(commands, "export", export_index, "the images' metadata as JSON lines")
    export.add_argument("--where", help="as for `query`")
    delete = _add_command(commands, "delete", delete_images, "take images out of the index")
    delete.add_argument("files", nargs="+")
    return parser


def _add_command(commands, name, function, text):
    command = commands.add_parser(name, help=text)
    command.set_defaults(command=function)
    command.add_argument("--model", required=True, help="folder or Hub id of a checkpoint with contrastive heads")
    command.add_argument("--index", required=True, help="a folder, or object storage such as s3://bucket/prefix")
    return command


def open_index(args, *, create=False):
    try:
        model = IeftForImageTextRetrieval.from_pretrained(args.model)
        processor = IeftProcessor.from_pretrained(args.model)
    except (OSError, ValueError):
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own
        raise ValueError(f"{args.model} cannot be loaded as a checkpoint: {type(error).__name__}: {error}") from error
    return ImageIndex(args.index, model, processor=processor, create=create)


def index_archive(args):
    files = find_images(args.archive)
    index = open_index(args, create=True)
    report = index.add(files)
    index.optimize()
    print(f"{report['added']:,} added, {report['unchanged']:,} unchanged, {len(index):,} images in {args.index}")
    for file, why in report["unreadable"].items():
        print(f"not indexed: {file}: {why}", file=sys.stderr)
    return 1 if report["unreadable"] else 0


def query_index(args):
    if (args.caption is None) == (args.image is None):
        raise ValueError("Either a sentence or --image expected.")
    index = open_index(args)
    if args.image is not None:
        hits = index.search_image(read_picture(args.image), top_k=args.top_k, where=args.where)
    else:
        options = {"top_k": args.top_k, "rerank_top_k": args.rerank_top_k, "where": args.where}
        hits = index.search(args.caption, **options)
    if args.sheet:
        draw_sheet(hits).save(args.sheet, format="PNG")
    if args.geojson:
        Path(args.geojson).write_text(json.dumps(to_geojson(hits), indent=1, default=str), encoding="utf-8")
    print(json.dumps(hits, indent=1, default=str) if args.json else hit_table(hits))
    return 0


def show_info(args):
    index = open_index(args)
    columns = [name for name in index.table.schema.names if name != "vector"]
    print(f"{len(index):,} images\ncheckpoint {index.checkpoint[:12]}\ncolumns {', '.join(columns)}")
    return 0


def export_index(args):
    for row in open_index(args).rows(args.where):
        print(json.dumps(row, default=str))
    return 0


def delete_images(args):
    print(f"{open_index(args).delete(args.files):,} deleted")
    return 0


def hit_table(hits):
    """Hits as text, one line each; a line that says so where there is none."""
    if not hits:
        return "No image fits."
    lines = [f"{'rank':>4}{'score':>9}  {'stage':<10} file"]
    lines += [f"{hit['rank']:>4}{hit['score']:>9.3f}  {hit['stage']:<10} {hit['file']}" for hit in hits]
    return "\n".join(lines)


def draw_sheet(hits):
    """Hits as thumbnails in rows of five, rank and score below each: PIL RGB."""
    rows = max(1, -(-len(hits) // SHEET_COLUMNS))
    step = THUMB + GAP
    sheet = Image.new("RGB", (SHEET_COLUMNS * step + GAP, rows * (step + LABEL) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, hit in enumerate(hits):
        left, top = GAP + place % SHEET_COLUMNS * step, GAP + place // SHEET_COLUMNS * (step + LABEL)
        sheet.paste(ImageOps.fit(read_picture(hit["file"]), (THUMB, THUMB)), (left, top))
        pen.text((left, top + THUMB + 4), f"{hit['rank']}.  {hit['score']:.2f}  {hit['stage']}", "black")
    return sheet


def to_geojson(hits):
    """Hits as a FeatureCollection in longitude and latitude (RFC 7946); without bounds the geometry is null."""
    features = []
    for hit in hits:
        properties = {name: value for name, value in hit.items() if name not in ("west", "south", "east", "north")}
        features.append({"type": "Feature", "geometry": _outline(hit), "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _outline(hit):
    if hit["crs"] is None:
        return None
    from rasterio.warp import transform_bounds  # the extra `geo`

    bounds = [hit[side] for side in ("west", "south", "east", "north")]
    west, south, east, north = transform_bounds(hit["crs"], "EPSG:4326", *bounds)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


if __name__ == "__main__":
    sys.exit(main())
