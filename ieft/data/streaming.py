"""Streams of collections that are larger than the disk; nothing is copied.

Rows with known captions, or the streams of a Hub dataset, become an `IterableDatasetDict` with the columns of a
prepared one, and each image is checked when it is read. For training, rows can also be read by number, in any order.
"""

import hashlib
import logging
from pathlib import Path

import datasets
from huggingface_hub.errors import HfHubHTTPError

from ieft.data.builders import FEATURES, make_example
from ieft.data.images import read_image
from ieft.data.invalid_examples import MISSING, BadRow, BadRowsError, describe, make_bad_rows, usable_rows
from ieft.data.locate import SPLIT_NAMES
from ieft.data.sources import split_of_value, table_source

logger = logging.getLogger(__name__)


class LazyRows:
    """A split of validated rows whose images are read from their source on every access.

    It has the part of `datasets.Dataset` that a trainer needs: rows by number, columns by name, `select` and
    `column_names`.
    """

    def __init__(self, rows, *, bands=None):
        self.rows, self.bands = rows, bands
        self.column_names = list(FEATURES)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, which):
        if isinstance(which, str):
            return [row[which] for row in self.rows]
        row = self.rows[which]
        return row | {"image": read_image(row["image"], bands=self.bands)}

    def __iter__(self):
        return (self[number] for number in range(len(self)))

    def __add__(self, other):
        return LazyRows(self.rows + other.rows, bands=self.bands)

    def select(self, numbers):
        """The rows with these numbers."""
        return LazyRows([self.rows[number] for number in numbers], bands=self.bands)

    def select_columns(self, names):
        """All of them: no image is read for a column."""
        return self


def stream_rows(rows, source, *, image_fault, on_bad_rows, bands=None):
    """Streams of rows that `usable_rows` has validated except for their images.

    Args:
        image_fault: function of a path or bytes and `bands` that returns a reason or None.
        on_bad_rows: "stop" raises `BadRowsError` at the first unreadable image; "skip" skips it with a warning.
    """
    splits = [name for name in ("train", "validation", "test") if any(row["split"] == name for row in rows)]
    own = {name: [row for row in rows if row["split"] == name] for name in splits}
    return _as_streams({name: (_checked_rows, own[name], source, image_fault, on_bad_rows, bands) for name in splits})


def load_from_hub(name, **options):
    """`datasets.load_dataset` with a single kind of error that says what was tried.

    Raises:
        ValueError: if there is no such dataset, or the Hub cannot be reached.
    """
    try:
        return datasets.load_dataset(name, **options)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} is no existing path, and cannot be loaded from the Hub ({reason}).") from error


def stream_hub_dataset(name, columns, *, image_fault, on_bad_rows, bands=None, **options):
    """Streams of the splits of a Hub dataset of parquet or tar files; `options` of `load_dataset`."""
    streams = load_from_hub(name, streaming=True, **options)
    ways = {}
    for split, stream in streams.items():
        if split_of_value(split) is None:
            raise ValueError(f"{name}: split {split!r} is not one of {', '.join(SPLIT_NAMES)}.")
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
        ways[split_of_value(split)] = (
            _checked_records,
            stream,
            (name, split, columns),
            image_fault,
            on_bad_rows,
            bands,
        )
    return _as_streams(ways)


def _as_streams(ways):
    features = datasets.Features(FEATURES)
    return datasets.IterableDatasetDict(
        {
            name: datasets.IterableDataset.from_generator(_run, features=features, gen_kwargs={"way": way})
            for name, way in ways.items()
        }
    )


def _run(way):
    generate, *arguments = way
    yield from generate(*arguments)


def _checked_rows(rows, source, image_fault, on_bad_rows, bands):
    for number, row in enumerate(rows):
        reason = row.get("missing", MISSING) if row["image"] is None else image_fault(row["image"], bands=bands)
        if reason:
            _leave_out(make_bad_rows(number, row, [reason], "image and captions"), source, on_bad_rows)
        else:
            yield make_example(row, bands=bands)[0]


def _checked_records(stream, origin, image_fault, on_bad_rows, bands):
    name, split, columns = origin
    rows = (
        (number, table_source(Path(name), [record | {"split": split}], columns, start=number).rows[0])
        for number, record in enumerate(stream)
    )
    for number, row in _grouped(rows, name):
        known = isinstance(row["image"], bytes)  # a path in a Hub dataset would be one on this machine
        reason = image_fault(row["image"], bands=bands) if known else MISSING
        rows, bad = usable_rows([row], {0: reason} if reason else {})
        if bad:
            _leave_out([BadRow(**(vars(each) | {"row": number})) for each in bad], name, on_bad_rows)
        for usable in rows:
            yield make_example(usable, bands=bands)[0]


def _grouped(rows, name):
    """Numbered rows; those of one caption each that follow one another with one image are joined.

    Raises:
        ValueError: where the rows of one image do not follow one another, so that a stream cannot join them.
    """
    group, seen = None, set()
    for number, row in rows:
        key = _image_key(row)
        if len(row["captions"]) != 1:
            yield from [group] if group else []
            group = None
            yield number, row
        elif group and _image_key(group[1]) == key:
            group[1]["captions"] += row["captions"]
        else:
            yield from [group] if group else []
            if key in seen:
                raise ValueError(
                    f"{name}: the captions of {row['filename']} do not follow one another (row {number}), and a "
                    "stream cannot join them. Load it without streaming."
                )
            seen.add(key)
            group = number, row
    yield from [group] if group else []


def _image_key(row):
    image = row["image"]
    return hashlib.sha256(image).digest() if isinstance(image, bytes) else (image, row["filename"])


def _leave_out(bad, source, on_bad_rows):
    if on_bad_rows == "stop":
        raise BadRowsError(bad, source)
    logger.warning(describe(bad, source))
