"""A web page to search an image archive by sentences and images, and on a map: the command `ieft-page`.

    ieft-page --model outputs/demo --index outputs/scenes.lance --archive outputs/scenes
    IEFT_MODEL=user/ieft-scenes IEFT_INDEX=archive.lance IEFT_ARCHIVE=archive ieft-page

The index is made first from `--archive` where that is given. In a clone of the repository it is also `python app.py`,
which runs as a Hugging Face Space.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from ieft import IeftForImageTextRetrieval, IeftProcessor, draw_scene
from ieft.data.images import parse_bands
from ieft.search.archive_files import find_images, root_of
from ieft.search.command import hide_loading_bar

SCENES_SEED, SCENES_SIZE = 1, 192  # not the seed of training


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (
        ("model", "folder or Hub id of a checkpoint, with contrastive heads unless there is an embedder"),
        ("embedder", "a CLIP or SigLIP for the shortlist, as for ieft-search"),
        ("index", "a folder, or object storage such as s3://bucket/prefix"),
        ("archive", "a folder or an address of images to index first: what is new there"),
    ):
        variable = f"IEFT_{name.upper()}"
        parser.add_argument(f"--{name}", default=os.environ.get(variable), help=f"{text}; or the variable {variable}")
    parser.add_argument(
        "--draw_scenes", type=int, default=0, help="draw so many synthetic scenes into the archive first"
    )
    parser.add_argument("--bands", help="bands of the archive's images that become red, green and blue, such as 4,3,2")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; by default the best there is")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16; by default the fastest")
    parser.add_argument("--requests_per_minute", type=int, default=60, help="that one visitor may send")
    parser.add_argument(
        "--base_map",
        default=os.environ.get("IEFT_BASE_MAP"),
        help="address of map tiles, such as https://host/{z}/{x}/{y}.png, which visitors' browsers then load from "
        "that host; by default coastlines that come with the page; or the variable IEFT_BASE_MAP",
    )
    parser.add_argument(
        "--base_map_credit",
        default=os.environ.get("IEFT_BASE_MAP_CREDIT", ""),
        help="who made those tiles, as HTML; or the variable IEFT_BASE_MAP_CREDIT",
    )
    return parser


def main(arguments=None):
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not args.model or not args.index:
        parser.error("--model and --index expected, or IEFT_MODEL and IEFT_INDEX in the environment.")
    if args.base_map and not is_tile_address(args.base_map):
        parser.error(f"--base_map: an http address with {{z}}, {{x}} and {{y}} expected; got {args.base_map!r}.")
    try:
        from ieft.page.page import SearchPage, launch
    except ImportError as error:
        sys.exit(f"ieft-page: {error.name or error}: the page needs the extra `app`: pip install 'ieft[app]'.")
    hide_loading_bar()
    try:
        index = open_index(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"ieft-page: {error}")
    with tempfile.TemporaryDirectory(prefix="ieft-page-") as folder:
        # Gradio's own folder is shared by all its pages on a machine, and each serves all of it.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": f"{folder}/examples"}
        if os.environ.get("SPACE_ID"):  # there, visitors come through proxies of this network
            os.environ.setdefault("FORWARDED_ALLOW_IPS", "10.0.0.0/8")
        page = SearchPage(index, base_map=args.base_map, base_map_credit=args.base_map_credit)
        launch(page.page, requests_per_minute=args.requests_per_minute)


def is_tile_address(address):
    return address.startswith(("https://", "http://")) and all(part in address for part in ("{z}", "{x}", "{y}"))


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
    from ieft.search.index import ImageIndex

    archive = args.archive
    if args.draw_scenes:
        draw_archive(Path(archive), args.draw_scenes)
    unreadable = {}
    files = find_images(archive, unreadable) if archive else []
    model = IeftForImageTextRetrieval.from_pretrained(args.model)
    index = ImageIndex(
        args.index,
        model,
        processor=IeftProcessor.from_pretrained(args.model),
        create=bool(files),
        root=root_of(archive) if archive else None,
        device=args.device,
        dtype=args.dtype,
        embedder=args.embedder,
    )
    if files:
        report = index.add(files, bands=parse_bands(args.bands))
        index.optimize()
        print(f"{report['added']:,} images added, {len(index):,} in {args.index}", flush=True)
        for file, why in (unreadable | report["unreadable"]).items():
            print(f"not indexed: {file}: {why}", file=sys.stderr)
    return index


if __name__ == "__main__":
    main()
