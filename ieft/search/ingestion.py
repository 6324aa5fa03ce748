"""Adding to an index: images are read, embedded and written, each stage while the others are at work."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from ieft.data.storage import is_address
from ieft.evaluation.embedders import unit_vectors
from ieft.search.archive_files import read_place_and_time
from ieft.search.feature_cache import bytes_per_token, encode_state
from ieft.search.filters import fetch, is_not_text
from ieft.search.geography import PLACE_COLUMNS, SIDES
from ieft.search.product_quantization import Codebooks
from ieft.search.read_ahead import (
    DIED,
    FILES_PER_TASK,
    TASKS_AHEAD,
    THREADS,
    FileRead,
    Job,
    ReadAhead,
    group_tiles,
    read_all_tiles,
    read_files,
    read_some_tiles,
    take_tiles,
)
from ieft.search.tables import KEY, any_of, columns_of_catalogues, retry
from ieft.search.tiles import Window, cut_windows
from processing_ieft import check_text

ROWS_AT_ONCE = 64
MOST_BATCHES = 8  # in a transaction
NAMES_AT_ONCE = 512  # that are looked up in the index, which takes about as long for a few as for these
OVERLAP = 0.25
FEWEST_TO_LEARN, IMAGES_TO_LEARN = 64, 256  # images or tiles from which codebooks are learnt
BAR = "Indexing: {percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"


def add_images(index, files, *, tile, overlap, bands, batch_size, num_workers, reader, progress):
    """`ImageIndex.add`."""
    overlap = check_tiles(tile, overlap)
    names, unreadable = names_in_index(index, files)
    report = {"added": 0, "unchanged": 0, "unreadable": unreadable}
    prepared = index.prepared
    at_once = FILES_PER_TASK if tile else NAMES_AT_ONCE  # a scene may have thousands of rows
    jobs = (
        (plan(name, index.path_of(name), rows, prepared, tile=tile, overlap=overlap, bands=bands), rows)
        for first in range(0, len(names), at_once)
        for name, rows in look_up(index.table, names[first : first + at_once]).items()
    )
    threads = THREADS if any(is_address(index.path_of(name)) for name in names) else 1
    with reader or ReadAhead(num_workers, threads=threads) as reader:
        learn_codebooks(index, names, reader, tile=tile, overlap=overlap, bands=bands)
        with _Writer(index, batch_size, report, reader.num_workers) as writer, Bar(len(names), progress) as bar:
            for job, rows, found in read_in_order(reader, jobs):
                _add_file(job, rows, found, reader, writer, bar, report)
    return report


def learn_codebooks(index, names, reader, *, tile, overlap, bands):
    """Learn the codebooks of an index that has none yet, from images that are spread evenly over those to be added.

    Raises:
        ValueError: if too few can be read, or are different, or the index has lost its codebooks.
    """
    if not names or not index.lacks_codebooks:
        return
    prepared = index.prepared
    chosen = _spread(names, IMAGES_TO_LEARN)
    jobs = (
        (plan(name, index.path_of(name), (), prepared, tile=tile, overlap=overlap, bands=bands), ()) for name in chosen
    )
    of_each, squares = -(-IMAGES_TO_LEARN // len(chosen)), []
    for job, rows, found in read_in_order(reader, jobs):
        found = found._replace(later=_spread(found.later, of_each))
        of_file = [square for some, _ in read_parts(job, rows, found, reader.map) for _, square in some]
        squares += _spread(of_file, of_each)
    if len(squares) < FEWEST_TO_LEARN:
        raise ValueError(
            f"{index.states} learns its codebooks from the first images that are added: at least {FEWEST_TO_LEARN} "
            f"images or tiles expected; {len(squares)} can be read. Add more of them at once, or make another index "
            "with int8 states."
        )
    with index.network() as network:
        parts = np.array_split(np.stack(squares), -(-len(squares) // ROWS_AT_ONCE))
        read = [network.read_keys_and_values(network.read_images(index.to_pixels(part))) for part in parts]
    vectors = torch.cat([part.float().cpu().flatten(0, 1) for part in read])
    index.keep_codebooks(Codebooks.learn(vectors, bytes_per_token(index.states)))


def _spread(items, count):
    """Up to `count` items, spread evenly over all."""
    if len(items) <= count:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def check_tiles(tile, overlap):
    """The overlap to cut tiles with.

    Raises:
        ValueError: for options that do not fit together.
    """
    if overlap is not None and not tile:
        raise ValueError("overlap needs tile: it is the overlap of the tiles.")
    overlap = OVERLAP if overlap is None else overlap
    if tile:
        cut_windows(1, 1, tile=tile, overlap=overlap)  # raises errors before any work
    return overlap


def names_in_index(index, files):
    """The name in the index of each file, once; and a dict of file -> reason of those that cannot have one."""
    names = list(dict.fromkeys(map(index.name_of, files)))
    unreadable = {index.path_of(name): "its name is not UTF-8: rename it" for name in filter(is_not_text, names)}
    return [name for name in names if not is_not_text(name)], unreadable


def look_up(table, names):
    """The rows that the index holds of each file."""
    columns = ["content", "tiling", "bands", *KEY, "tile_width", "tile_height", "west", "left", "acquired"]
    if of_catalogues := columns_of_catalogues(table):
        columns = dict.fromkeys([*columns, *of_catalogues, *SIDES, "geometry"])
    known = {name: [] for name in names}
    for row in fetch(table.search().select(list(columns)), any_of(names)):
        known[row["file"]].append(row)
    return known


def plan(name, file, rows, prepared, *, tile, overlap, bands):
    """The `Job` of a file.

    Args:
        name, file: in the index, and its path.
        rows: as from `look_up`.
        prepared: as `ImageIndex.prepared`.
    """
    known = frozenset((*_made_of(row), (row["col"], row["row"])) for row in rows)
    cut = (tile, overlap) if tile is not None else _cut_before(known)
    chosen = ",".join(map(str, bands)) if bands else max((made_of[2] for made_of in known), default="")
    return Job(name, file, *cut, chosen, known, **prepared)


def _made_of(row):
    return row["content"], row["tiling"], row["bands"] or ""


def _cut_before(known):
    """Tile and overlap with which a file was indexed; (None, 0) if it is whole or new."""
    found = [re.fullmatch(r"(\d+) pixels, overlap (\S+)", tiling) for _, tiling, *_ in sorted(known)]
    tile, overlap = next((match.groups() for match in found if match), (None, 0))
    return (int(tile), float(overlap)) if tile else (None, 0)


def read_in_order(reader, jobs):
    """Yield each job, the rows that the index holds of its file, and the `FileRead`."""
    waiting = []

    def tasks():
        while group := list(islice(jobs, FILES_PER_TASK)):
            waiting.append(group)
            yield ([job for job, _ in group],)

    for found in reader.map(read_files, tasks(), TASKS_AHEAD):
        group = waiting.pop(0)
        if isinstance(found, BrokenProcessPool):  # one of its files ends whatever reads it
            found = [_read_alone(reader, job) for job, _ in group]
        for (job, rows), of_file in zip(group, found, strict=True):
            yield job, rows, of_file


def _read_alone(reader, job):
    found = reader.run_alone(read_files, ([job],))
    return FileRead(error=f"{job.file}: {DIED}") if isinstance(found, BrokenProcessPool) else found[0]


def _add_file(job, rows, found, reader, writer, bar, report):
    """Hand on what was read of a file, and what is read of it now, to be embedded and written."""
    report["unchanged"] += len(found.unchanged)
    error, count = None, len(found.later) or len(found.rows)
    for some, error in read_parts(job, rows, found, reader.map):
        for row, square in some:
            writer.add(row, square)
        bar.add_tiles(len(some), count)
        if error:
            break
    bar.end_file()
    writer.then(*what_remains(job, rows, found, error))
    if error:
        report["unreadable"][job.file] = why_unreadable(error, rows)


def why_unreadable(error, rows):
    """An error, and what it means for the rows that the index holds of the file."""
    return error + (" (what was indexed of it before is kept)" if rows else "")


def what_remains(job, rows, found, error):
    """What is to be done with rows that the index held of a file before, once its new rows are written.

    Returns:
        tuple: the rows to add places and times to; an SQL condition for rows to delete, or None.
    """
    made_of = (found.content, found.tiling, job.bands)
    unplaced = [row for row in rows if _made_of(row) == made_of and _lacks_place(row)]
    return unplaced, _others(job.name, *made_of) if not error and len(rows) > len(found.unchanged) else None


def read_parts(job, known, found, run):
    """Rows of a file, some at a time, and with each the error that ended them, or None.

    Args:
        known: the rows that the index holds of the file, as from `look_up`.
        run: such as `itertools.starmap`.

    Yields:
        tuple: pairs of a row without its vector and an array (side, side, 3); the error.
    """
    constant = {"file": job.name, "content": found.content, "tiling": found.tiling, "bands": job.bands or None}
    item = next((row for row in known if row.get("item") is not None), None)
    for some, error in _parts(job, found, run):
        yield [(_keep_item(row | constant, item), square) for row, square in some], error


def _keep_item(row, item):
    """A new row of a file with what the catalogue told of the file: it describes the scene, whatever its pixels.

    Args:
        item: a row that the index holds of the file and that a catalogue has filled; None if there is none.
    """
    if item is None:
        return row
    of_row = {"content", "tiling", "bands", *KEY, "tile_width", "tile_height", "left", *SIDES, "geometry"}
    kept = {name: value for name, value in item.items() if name not in of_row and value is not None}
    if takes_place(row) and takes_place(item) and row.get("west") is None:
        kept |= {name: item[name] for name in (*SIDES, "geometry")}
    return row | kept


def takes_place(row):
    """Whether the place of a row may be that of a catalogue's item: the file is kept whole and has no georeference."""
    return not row["tiling"] and row.get("left") is None


def _parts(job, found, run):
    if not found.later:
        yield found.rows, found.error
    elif found.by_window:
        tasks = (
            (job, windows, found.limits, number == 0) for number, windows in enumerate(group_tiles(job, found.later))
        )
        for part in run(read_some_tiles, tasks):
            yield ((), f"{job.file}: {DIED}") if isinstance(part, BrokenProcessPool) else part
    else:  # what is decoded whole is so once, here
        tiles = read_all_tiles(job, found.later, found.limits)
        while any(part := take_tiles(tiles, ROWS_AT_ONCE)):
            yield part


def _lacks_place(row):
    """Whether a row has no place and time, and its file may tell them at little cost.

    Those of a PNG may stand behind the pixels, all of which would be decoded.
    """
    return row["west"] is row["left"] is row["acquired"] is None and not row["file"].lower().endswith(".png")


def _others(name, content, tiling, bands):
    """An SQL condition: the rows of a file that are of another content, or were cut or read otherwise."""
    differs = f"content != '{content}' OR tiling != '{tiling}' OR coalesce(bands, '') != '{bands}'"
    return f"({any_of([name])} AND ({differs}))"


class Bar:
    """A progress bar in images, of a scene in its tiles: as a context manager."""

    def __init__(self, count, progress):
        self.count, self.images, self.tiles = count, 0, 0
        self._bar = tqdm(total=self.count, bar_format=BAR, disable=not progress)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()

    def add_tiles(self, tiles, of_all):
        """Some of the tiles of an image, which may be the whole image."""
        self.tiles += tiles
        self._show(self.images + tiles / max(1, of_all))

    def end_file(self):
        self.images += 1
        self._show(self.images)

    def _show(self, images):
        of_all = f"{self.images:,} of {self.count:,} images, {self.tiles:,} tiles"
        self._bar.set_description_str(of_all, refresh=False)
        self._bar.update(images - self._bar.n)


class _Writer:
    """Embeds rows, and writes them in a thread while the next are embedded: as a context manager.

    A transaction writes the batches that were embedded while the one before was under way: one, unless the network is
    very fast.
    """

    def __init__(self, index, batch_size, report, num_readers):
        self.index, self.batch_size, self.report = index, batch_size, report
        self.network, self._opened = None, ExitStack()
        self._thread, self._writing = ThreadPoolExecutor(1), None
        self._all_threads = torch.get_num_threads()
        self._num_threads = self._all_threads if index.model.device.type == "cpu" else 1
        self._fewest_threads = max(1, self._num_threads - num_readers)
        self._computing = ThreadPoolExecutor(self._num_threads)
        self._waits, self._last = False, time.perf_counter()
        torch.set_num_threads(max(1, self._all_threads // self._num_threads))
        self._to_write = [], [], []
        self._start_batch()

    def _start_batch(self):
        self._rows, self._squares, self._unplaced, self._stale = [], [], [], []

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        try:
            with self._opened, self._thread, self._computing:
                if kind is None:
                    self._flush()
                    self._start_writing()
                    self._wait()
        finally:
            torch.set_num_threads(self._all_threads)

    def add(self, row, square):
        """A row without its vector, and the image of it as an array, as in a `FileRead`."""
        self._rows.append(row)
        self._squares.append(square)
        self._flush_if_full()

    def then(self, unplaced, stale):
        """What is to be done when all rows before are written, so that a kill loses nothing.

        Args:
            unplaced: rows of the index to add places and times to.
            stale: an SQL condition for rows to delete, or None.
        """
        self._unplaced += unplaced
        self._stale += [stale] if stale else []
        self._flush_if_full()

    def _flush_if_full(self):
        if max(map(len, (self._rows, self._unplaced, self._stale))) >= self.batch_size:
            self._flush()

    def _flush(self):
        start = time.perf_counter()
        columns = self._embed() if self._rows else []
        self._compare(waited=start - self._last, computed=time.perf_counter() - start)
        rows = [row | of_row for row, of_row in zip(self._rows, columns, strict=True)]
        for waiting, new in zip(self._to_write, (rows, self._unplaced, self._stale), strict=True):
            waiting.extend(new)
        if self._writing is None or self._writing.done() or len(self._to_write[0]) >= MOST_BATCHES * self.batch_size:
            self._start_writing()
        self._start_batch()

    def _start_writing(self):
        self._wait()
        self._writing = self._thread.submit(self._write, *self._to_write)
        self._to_write = [], [], []

    def _compare(self, waited, computed):
        """Find out whether the network waits for the readers: then it leaves processors to them."""
        self._waits = waited > (0.1 if self._waits else 0.5) * computed
        self._last = time.perf_counter()

    def _embed(self):
        """The columns of the batch, on a CPU a part of it in each thread.

        One thread computes each part: threads that share each step of the network wait for each other actively, and
        take the processors from the workers.
        """
        if self.network is None:  # which takes a moment, in which images are read already
            self.network = self._opened.enter_context(self.index.network())
        count = self._fewest_threads if self._waits else self._num_threads
        parts = np.array_split(np.stack(self._squares), min(count, len(self._squares)))
        return [row for rows in self._computing.map(self._embed_part, parts) for row in rows]

    @torch.no_grad()
    def _embed_part(self, squares):
        dtype = self.index.dtype if self.network is self.index.model else None  # others choose their type themselves
        with torch.autocast(self.index.model.device.type, dtype=dtype, enabled=dtype is not None):  # of this thread
            return embed(self.index, self.network, squares)

    def _wait(self):
        if self._writing is not None:
            self._writing.result()

    def _write(self, rows, unplaced, stale):
        if rows:
            write(self.index, rows)
            self.report["added"] += len(rows)
        add_places_and_times(self.index, unplaced)
        if stale:
            retry(self.index.table.delete, " OR ".join(stale))


def embed(index, network, squares):
    """The columns of images that the network computes: `vector`, and `state` if the index keeps it.

    Args:
        network: as from `index.network()`.
        squares: uint8 (I, side, side, 3), or what the embedder's `preprocess` made.
    """
    if index.embedder:
        return [{"vector": vector} for vector in network.embed_pixels(squares)]
    pixels = index.to_pixels(squares)
    if not index.states:
        return [{"vector": vector} for vector in unit_vectors(network.get_image_features(pixels))]
    states = network.read_images(pixels)
    vectors = unit_vectors(network.get_image_features(image_states=states))
    features = network.read_keys_and_values(states) if index.codebooks else states
    encoded = [encode_state(each, index.states, index.codebooks) for each in features]
    return [{"vector": vector, "state": state} for vector, state in zip(vectors, encoded, strict=True)]


def write(index, rows):
    """Insert rows, or replace those of the same key, in one transaction."""
    merge = index.table.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all()
    retry(merge.execute, pa.Table.from_pylist(rows, schema=index.table.schema))


def add_places_and_times(index, rows):
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
