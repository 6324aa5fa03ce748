"""Adding to an index: images are read, embedded and written in batches."""

import re
from itertools import islice

import pyarrow as pa
import torch

from ieft.data.images import parse_bands
from ieft.search.archive_files import digest_file, plan_tiles, read_place_and_time, read_tiles, read_whole
from ieft.search.feature_cache import encode_state
from ieft.search.filters import is_not_text
from ieft.search.geography import PLACE_COLUMNS
from ieft.search.tables import KEY, any_of, retry
from ieft.search.tiles import Window, cut_windows
from processing_ieft import check_text

ROWS_AT_ONCE = 64
OVERLAP = 0.25


def add_images(index, files, *, tile, overlap, bands, batch_size):
    """`ImageIndex.add`."""
    if overlap is not None and not tile:
        raise ValueError("overlap needs tile: it is the overlap of the tiles.")
    overlap = OVERLAP if overlap is None else overlap
    if tile:
        cut_windows(1, 1, tile=tile, overlap=overlap)  # raises errors before any work
    files = {index.name_of(file): None for file in files}
    report = {"added": 0, "unchanged": 0, "unreadable": {}}
    for name in [name for name in files if is_not_text(name)]:
        report["unreadable"][index.path_of(name)] = "its name is not UTF-8: rename it"
        del files[name]
    names = list(files)
    files_at_once = 1 if tile else batch_size
    for first in range(0, len(names), files_at_once):
        stale, unplaced = [], []
        batch_names = names[first : first + files_at_once]
        rows = _read_missing(index, batch_names, tile, overlap, bands, report, stale, unplaced)
        while batch := list(islice(rows, batch_size)):
            _write(index, batch)
            report["added"] += len(batch)
        _add_places_and_times(index, unplaced)
        if stale:  # after what takes its place, so that a kill loses nothing
            retry(index.table.delete, " OR ".join(stale))
    return report


def _read_missing(index, names, tile, overlap, bands, report, stale, unplaced):
    """Rows without vectors, with images as the network reads them.

    SQL for rows to delete is added to `stale`; unchanged rows without place and time to `unplaced`, except those
    of PNG files, whose metadata may stand behind the pixels, which would all be decoded.
    """
    known, lacking = {name: set() for name in names}, {name: [] for name in names}
    columns = ["content", "tiling", "bands", *KEY, "tile_width", "tile_height", "west", "left", "acquired"]
    for row in index.select(any_of(names), columns):
        made_of = row["content"], row["tiling"], row["bands"] or ""
        known[row["file"]].add((*made_of, (row["col"], row["row"])))
        if row["west"] is row["left"] is row["acquired"] is None and not row["file"].lower().endswith(".png"):
            lacking[row["file"]].append((*made_of, row))
    for name in names:
        file = index.path_of(name)
        try:
            cut = (tile, overlap) if tile is not None else _cut_before(known[name])
            chosen = ",".join(map(str, bands)) if bands else max((made_of[2] for made_of in known[name]), default="")
            content, windows = digest_file(file), plan_tiles(file, *cut, bands=parse_bands(chosen or None))
            tiling = "{} pixels, overlap {}".format(*cut) if windows else ""
            there = {place for *made_of, place in known[name] if made_of == [content, tiling, chosen]}
            report["unchanged"] += len(there)
            unplaced += [row for *made_of, row in lacking[name] if made_of == [content, tiling, chosen]]
            missing = [window for window in windows if window[:2] not in there]
            options = {"bands": parse_bands(chosen or None)}
            pictures = read_tiles(file, missing, **options) if windows else []
            pictures = [read_whole(file, **options)] if not windows and not there else pictures
            for row, picture in pictures:
                square = index.processor.image_processor.fit_square(picture)
                yield row | {"file": name, "content": content, "tiling": tiling, "bands": chosen or None}, square
            if len(known[name]) > len(there):
                differs = f"content != '{content}' OR tiling != '{tiling}' OR coalesce(bands, '') != '{chosen}'"
                stale.append(f"({any_of([name])} AND ({differs}))")
        except (OSError, ValueError) as error:
            before = " (what was indexed of it before is kept)" if known[name] else ""
            report["unreadable"][file] = f"{error}{before}"


def _add_places_and_times(index, rows):
    """Add them to rows that have none: an earlier version read no time, and without rasterio there is no place."""
    of_file = {}
    for row in rows:
        of_file.setdefault(row["file"], []).append(row)
    for name, rows in of_file.items():
        sides = ("col", "row", "tile_width", "tile_height")
        windows = [Window(*(row[side] for side in sides)) for row in rows if row["tiling"]]
        try:
            found = list(read_place_and_time(index.path_of(name), windows))
        except (OSError, ValueError):  # it has just gone
            continue
        if any(found):
            empty = dict.fromkeys([*PLACE_COLUMNS, "acquired"])
            keys = ({name: row[name] for name in KEY} for row in rows)
            index.update([key | empty | columns for key, columns in zip(keys, found, strict=True)])


def _write(index, batch):
    squares = [square for _, square in batch]
    made = _read_states(index, squares) if index.states else [{"vector": each} for each in index.embed_images(squares)]
    rows = [row | columns for (row, _), columns in zip(batch, made, strict=True)]
    merge = index.table.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all()
    retry(merge.execute, pa.Table.from_pylist(rows, schema=index.table.schema))  # one transaction


@torch.no_grad()
def _read_states(index, images):
    """The embedding and the encoded features of each image, computed in one pass."""
    states = index.model.read_images(index.processor(images=images)["pixel_values"].to(index.model.device))
    vectors = index.model.get_image_features(image_states=states).float().cpu().numpy()
    encoded = [encode_state(state, index.states) for state in states]
    return [{"vector": vector, "state": state} for vector, state in zip(vectors, encoded, strict=True)]


def _cut_before(known):
    """Tile and overlap with which a file was indexed; (None, 0) if it is whole or new."""
    found = [re.fullmatch(r"(\d+) pixels, overlap (\S+)", tiling) for _, tiling, *_ in sorted(known)]
    tile, overlap = next((match.groups() for match in found if match), (None, 0))
    return (int(tile), float(overlap)) if tile else (None, 0)


def add_captions(index, captions, *, batch_size):
    """`ImageIndex.add_captions`."""
    captions = list(captions)
    if captions:
        check_text(captions)
    captions = list(dict.fromkeys(caption.strip() for caption in captions if caption.strip()))
    added = 0
    for first in range(0, len(captions), batch_size):
        batch = captions[first : first + batch_size]
        known = index.captions.search().where(any_of(batch, "caption")).select(["caption"]).to_list()
        new = sorted(set(batch) - {row["caption"] for row in known}, key=batch.index)
        if new:
            rows = [{"caption": c, "vector": v} for c, v in zip(new, index.embed_captions(new), strict=True)]
            merge = index.captions.merge_insert("caption").when_not_matched_insert_all()
            retry(merge.execute, pa.Table.from_pylist(rows, schema=index.captions.schema))
            added += len(new)
    return {"added": added, "unchanged": len(captions) - added}
