"""Files of queries, images that queries name, and files of the hits of many queries."""

import csv
import json
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ieft.data.images import read_image
from ieft.data.storage import is_address
from ieft.data.tables import number_csv, number_json_lines, parse_cell, read_text
from ieft.search.archive_files import digest_file, open_file
from ieft.search.filters import is_not_text
from ieft.search.queries import Query, cut, read_vectors
from ieft.search.tables import KEY, quote

COLUMNS = ("id", "text", "like", "without", "unlike", "weights")
OUTPUTS = (".csv", ".jsonl", ".parquet")
MOST_NAMED = 10  # lines that an error names
IMAGES_AT_ONCE = 16  # decoded in memory
ROWS_AT_ONCE = 10_000  # of Parquet
# A tile as the table of hits names it.
TILE = re.compile(r"(?P<file>.+?)\s*\[(?P<window>\d+ \d+ \d+ \d+)(?:, and \d+ that overlap)?\]", re.DOTALL)


class Question(NamedTuple):
    """What a line of a file of queries, or a command, asks for.

    Attributes:
        name: its `id`.
        text, like, without, unlike: lists of sentences and of names of images, wanted and not wanted.
        weights: numbers in this order, or None.
        line: its number in the file.
    """

    name: str
    text: list
    like: Sequence = ()
    without: Sequence = ()
    unlike: Sequence = ()
    weights: list | None = None
    line: int = 1

    def to_query(self, images):
        """The `Query`, with the image or hit of each name in `images`."""
        wanted, unwanted = ([*texts, *(images[name] for name in names)]
                            for texts, names in ((self.text, self.like), (self.without, self.unlike)))  # fmt: skip
        return Query(wanted, unwanted, self.weights)

    @property
    def is_sentence(self):
        """Whether it is one sentence alone."""
        return len(self.text) == 1 and not (self.like or self.without or self.unlike)

    def check(self):
        """Raise a ValueError if it is no query; its images may be anything."""
        self.to_query(dict.fromkeys([*self.like, *self.unlike], "image"))

    def __str__(self):
        named = (("", self.text), ("like ", self.like), ("without ", self.without), ("unlike ", self.unlike))
        return "; ".join(f"{kind}{each}" for kind, several in named for each in several)


def read_questions(path):
    """The questions of a file: a text file (.txt) with a sentence in each line, CSV, or JSON lines.

    The columns of CSV and the names in JSON are `COLUMNS`; several sentences or images are a list. Paths of images are
    relative to the file. Without an id, the number of the line is taken.

    Raises:
        ValueError: if there are none; for lines that are no queries, with their numbers.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    is_table = suffix in (".csv", ".tsv")
    if is_table:
        numbered = number_csv(path, COLUMNS, lambda names: _check_columns(path, names))
        _check_columns(path, numbered[0][1] if numbered else ())
    elif suffix in (".jsonl", ".ndjson"):
        numbered = number_json_lines(path)
    elif suffix not in ("", ".txt"):
        raise ValueError(f"A file of queries is .txt, with a sentence in each line, .csv, .tsv or .jsonl; got {path}.")
    else:
        lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        numbered = [(number, {"text": line.strip()}) for number, line in enumerate(lines, start=1) if line.strip()]
    questions, faults, names = [], {}, {}
    for line, record in numbered:
        try:
            record = {name.lower(): _from_cell(cell) for name, cell in record.items()} if is_table else record
            question = _make_question(line, record, path.parent)
            if names.setdefault(question.name, line) != line:
                raise ValueError(f"the id {question.name!r} stands in line {names[question.name]} too.")
            questions.append(question)
        except ValueError as error:
            faults[line] = str(error)
    check_faults(path, faults, len(numbered))
    if not questions:
        raise ValueError(f"{path} holds no queries: a sentence in each line expected, or CSV or JSON lines.")
    return questions


def check_faults(path, faults, number):
    """Raise a ValueError that names lines of a file and what is wrong with them, if there are any."""
    if faults:
        named = "".join(f"\n  line {line}: {why}" for line, why in list(faults.items())[:MOST_NAMED])
        more = f"\n  and {len(faults) - MOST_NAMED:,} more" if len(faults) > MOST_NAMED else ""
        raise ValueError(f"{path}: {len(faults):,} of {number:,} queries cannot be used:{named}{more}")


def _check_columns(path, names):
    unknown = [name for name in names if name.lower() not in COLUMNS]
    if unknown:
        raise ValueError(
            f"{path}: the columns {', '.join(COLUMNS)} expected, or some of them; got {', '.join(unknown)}. A file "
            "with a sentence in each line, without columns, is named .txt."
        )


def _from_cell(cell):
    return parse_cell(cell) if cell and cell.strip() else None


def _make_question(line, record, folder):
    if not isinstance(record, dict):
        raise ValueError(f'an object such as {{"text": "a river"}} expected; got {json.dumps(record)[:80]}.')
    unknown = [name for name in record if name not in COLUMNS]
    if unknown:
        raise ValueError(f"the names {', '.join(COLUMNS)} expected; got {', '.join(unknown)[:80]}.")
    text, like, without, unlike = (_as_texts(record, name) for name in COLUMNS[1:5])
    like, unlike = ([_beside(folder, name) for name in names] for names in (like, unlike))
    weights = record.get("weights")
    name = record.get("id")
    if isinstance(name, bool | float | list | dict):
        raise ValueError(f"an id that is text or a whole number expected; got {json.dumps(name)[:80]}.")
    name = str(line if name is None or not str(name).strip() else name)
    question = Question(name, text, like, without, unlike, parse_weights(weights), line)
    question.check()
    return question


def _as_texts(record, name):
    value = record.get(name)
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str) or not each.strip():
            raise ValueError(f"{name} must be text, or a list of texts; got {json.dumps(each)[:80]}.")
    return [each.strip() for each in values]


def parse_weights(weights):
    """Numbers as a list, or as text with commas or blanks between them, also in brackets; None as it is.

    Raises:
        ValueError: for anything else.
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        listed = re.fullmatch(r"\s*\[(.*)\]\s*", weights, re.DOTALL)
        weights = (listed[1] if listed else weights).replace(",", " ").split()
    parts = weights if isinstance(weights, list) else [weights]
    try:
        if any(isinstance(part, bool) for part in parts):
            raise TypeError
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        raise ValueError(f"weights must be numbers such as 1,2,0.5; got {str(weights)[:80]!r}.") from None


def _beside(folder, name):
    return name if is_address(name) or os.path.isabs(name) else str(folder / name)


# Images that queries name --------------------------------------------------------------------------------------------


def find_example(index, name, *, bands=None):
    """The image that a query names: a hit if it is in the index, where nothing is read; or else a PIL image.

    Args:
        name: a path or an address; for a tile in the index with its window, as the table of hits names it:
            "city.tif [576 0 96 96]". A file of this machine that was replaced since it was indexed is read.
        bands: of a file that is read; with them, only tiles are looked up in the index.

    Raises:
        ValueError, OSError: for a tile that is not in the index, a scene of which only tiles are, and a file that
            cannot be read, or was replaced since its tile was indexed.
    """
    found = TILE.fullmatch(name) if is_address(name) or not os.path.lexists(name) else None
    file, window = (found["file"], found["window"]) if found else (name, None)
    if (bands is None or window is not None) and not is_not_text(file):
        columns = [*KEY, "tile_width", "tile_height", "content", "bytes", "time"]
        rows = index.select(f"file = {quote(index.name_of(file))}", columns)
        if rows and _is_replaced(file, rows[0]):
            if window is not None or len(rows) > 1:
                raise ValueError(f"{file} has changed since it was indexed: index it again to name its tiles.")
            rows = []
        windows = {" ".join(str(row[column]) for column in ("col", "row", *columns[3:5])): row for row in rows}
        if window in windows or len(rows) == 1 and window is None:
            row = rows[0] if window is None else windows[window]
            return row | {"file": index.path_of(row["file"])}
        if rows:
            raise ValueError(
                f"{file} is in the index as {len(rows):,} tiles: name one of them, such as "
                f"'{file} [{min(windows, key=lambda name: [int(number) for number in name.split()])}]'."
            )
    if window is not None:
        raise ValueError(f"{file} is not in the index, of which a tile is named: {name}.")
    return read_image(open_file(file), bands=bands)


def _is_replaced(file, row):
    """Whether a file of this machine, if it is there, has another content than a row of the index was made of."""
    if is_address(file) or not os.path.isfile(file):
        return False
    state = os.stat(file)
    indexed = round(row["time"].timestamp() * 1000) if row["time"] else None  # the index keeps milliseconds
    is_as_before = state.st_size == row["bytes"] and indexed in (
        state.st_mtime_ns // 10**6,
        round(state.st_mtime * 1000),
    )
    return not is_as_before and digest_file(file) != row["content"]


def to_queries(index, questions, path, *, bands=None):
    """The `Query` of each question, with the embeddings of the images that they name.

    Raises:
        ValueError: for images that cannot be used, with the numbers of the lines of the file `path`.
    """
    names = list(dict.fromkeys(name for question in questions for name in [*question.like, *question.unlike]))
    vectors, faults = {}, {}
    for some in cut(names, IMAGES_AT_ONCE):
        examples = {}
        for name in some:
            try:
                examples[name] = find_example(index, name, bands=bands)
            except (OSError, ValueError) as error:
                faults[name] = str(error)
        hits = {name: example for name, example in examples.items() if isinstance(example, dict)}
        images = {name: example for name, example in examples.items() if name not in hits}
        vectors |= zip(hits, read_vectors(index, list(hits.values())), strict=True)
        if images:
            vectors |= zip(images, index.embed_images(list(images.values())), strict=True)
    of_lines = {
        question.line: faults[name]
        for question in questions
        for name in [*question.like, *question.unlike]
        if name in faults
    }
    check_faults(path, of_lines, len(questions))
    return [question.to_query(vectors) for question in questions]


# Hits ----------------------------------------------------------------------------------------------------------------


def check_output(output):
    """Check that a file of hits has a known kind.

    Raises:
        ValueError: for another one.
    """
    if Path(output).suffix.lower() not in OUTPUTS:
        raise ValueError(f"--output writes {', '.join(OUTPUTS)} by the end of the name; got {output}.")


def write_hits(path, pairs, index):
    """Write the hits of queries to a file, by its name as CSV, JSON lines or Parquet.

    The file appears when it is complete; if that fails, a file that was there stays as it was.

    Args:
        pairs: an iterable of pairs of a question and its hits.
        index: the `ImageIndex` that the hits are of.

    Returns:
        tuple: the number of hits, and the names of the questions without any.
    """
    path = Path(path)
    text, number, integer = pa.string(), pa.float64(), pa.int32()
    first = {"id": text, "query": text, "rank": integer, "score": number, "probability": number}
    first |= {"stage": text, "similarity": number, "merged": integer}
    fields = [pa.field(name, kind) for name, kind in first.items()]
    schema = pa.schema([*fields, *(index.table.schema.field(name).remove_metadata() for name in index.columns)])
    count, empty = 0, []
    with _complete(path) as beside, _WRITERS[path.suffix.lower()](beside, schema) as write:
        for question, hits in pairs:
            write([{"id": question.name, "query": str(question), **hit} for hit in hits])
            count += len(hits)
            if not hits:
                empty.append(question.name)
    return count, empty


@contextmanager
def _complete(path):
    """A name beside `path`, whose file takes its place when all is written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _write_csv(path, schema):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, schema.names, extrasaction="ignore")
        writer.writeheader()
        yield lambda rows: writer.writerows({name: _to_cell(row.get(name)) for name in schema.names} for row in rows)


def _to_cell(value):
    return json.dumps(value) if isinstance(value, list | dict) else value


@contextmanager
def _write_json_lines(path, schema):
    with open(path, "w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(
            json.dumps({name: row.get(name) for name in schema.names}, default=str) + "\n" for row in rows
        )


@contextmanager
def _write_parquet(path, schema):
    waiting = []
    with pq.ParquetWriter(path, schema) as writer:

        def write(rows):
            waiting.extend({name: row.get(name) for name in schema.names} for row in rows)
            if len(waiting) >= ROWS_AT_ONCE:
                flush()

        def flush():
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        yield write
        flush()


_WRITERS = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": _write_parquet}
