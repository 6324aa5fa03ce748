"""The tables of an index in LanceDB: columns, primary keys, and transactions that are repeated on conflict."""

import random
import re
import time

import pyarrow as pa
import pyarrow.compute as pc

IMAGES, CAPTIONS, SETTINGS = "images", "captions", "settings"  # the tables
CODEBOOKS = "codebooks"  # the table of those of product quantisation, in indexes whose features need them
MOST_ATTEMPTS = 20  # at a transaction that conflicts with others
# `file` is relative to the archive's root where it lies below it; `time` is the file's, `acquired` the image's.
# `width` and `height` are the file's; `col`, `row`, `tile_width`, `tile_height` the window of it that the row stands
# for; `tiling` says how it was cut, empty where the row is the whole image; `limits` are those of
# `ieft.search.tiles.Scene`; `bands` the bands that were chosen, such as "4,3,2". `west` to `north` are degrees
# (WGS84), west > east across the antimeridian; `left` to `top` the raster's own coordinates in `crs`; `geometry` the
# outline as GeoJSON.
METADATA = {
    "file": pa.string(), "content": pa.string(), "bytes": pa.int64(), "time": pa.timestamp("ms", "UTC"),
    "width": pa.int32(), "height": pa.int32(), "col": pa.int32(), "row": pa.int32(), "tile_width": pa.int32(),
    "tile_height": pa.int32(), "tiling": pa.string(), "limits": pa.list_(pa.float64()), "west": pa.float64(),
    "south": pa.float64(), "east": pa.float64(), "north": pa.float64(), "crs": pa.string(),
    "acquired": pa.timestamp("ms", "UTC"), "left": pa.float64(), "bottom": pa.float64(), "right": pa.float64(),
    "top": pa.float64(), "geometry": pa.string(), "bands": pa.string(),
}  # fmt: skip
KEY = ["file", "col", "row"]
# This metadata marks the columns of a primary key for LanceDB: of two transactions that insert the same key, the later
# one is repeated and finds the row of the other.
PRIMARY_KEY, POSITION = b"lance-schema:unenforced-primary-key", b"lance-schema:unenforced-primary-key:position"


def columns_of_catalogues(table):
    """Names of the columns that STAC catalogues have filled, of a table of images."""
    return [name for name in table.schema.names if name not in METADATA and name not in ("vector", "state")]


def with_key(schema, key):
    """A schema with its primary key, a list of columns, marked."""
    for place, name in enumerate(key, start=1):
        metadata = {PRIMARY_KEY: b"true", POSITION: str(place).encode()}
        field = pa.field(name, schema.field(name).type, nullable=False, metadata=metadata)
        schema = schema.set(schema.get_field_index(name), field)
    return schema


def set_key(table, key):
    """Give a table of an earlier version its primary key."""
    table.alter_columns(*({"path": name, "nullable": False} for name in key))
    metadata = [{PRIMARY_KEY.decode(): "true", POSITION.decode(): str(place)} for place in range(1, len(key) + 1)]
    table.update_field_metadata(
        *({"path": name, "metadata": of_name} for name, of_name in zip(key, metadata, strict=True))
    )


def retry(transaction, *args, **options):
    """Run a transaction, and repeat it if it conflicts with that of another process."""
    for attempt in range(MOST_ATTEMPTS):
        try:
            return transaction(*args, **options)
        except (OSError, RuntimeError, ValueError) as error:
            others = re.search("conflict|concurrent|already exists", str(error), re.IGNORECASE)
            if not others or attempt == MOST_ATTEMPTS - 1:
                raise
            time.sleep(random.random() * min(0.05 * 2**attempt, 2))  # so that processes do not retry at the same time


def remove_doubles(table, key):
    """Keep only the last added row of each key."""
    rows = table.search().select(key).with_row_id(True).limit(None).to_arrow()
    last = rows.group_by(key).aggregate([("_rowid", "max"), ("_rowid", "count")])
    if last.num_rows == rows.num_rows:
        return
    kept = last.column("_rowid_max")
    doubles = pc.filter(rows.column("_rowid"), pc.invert(pc.is_in(rows.column("_rowid"), kept))).to_pylist()
    for first in range(0, len(doubles), 1000):
        # Row ids are never reused: a row that another process has removed is simply not found.
        condition = f"_rowid IN ({', '.join(map(str, doubles[first : first + 1000]))})"
        retry(table.delete, condition)


def quote(text):
    """A string as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def any_of(values, column="file"):
    """An SQL condition: the column is one of the strings."""
    return f"{column} IN ({', '.join(map(quote, values))})"
