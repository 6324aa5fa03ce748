"""Reads every kind of image-caption collection as rows of `filename`, `split`, `captions` and `image`.

An image is a path, a URL, bytes, or None if it is missing. Only annotations are read: no image is decoded, no row is
validated, and no file of the user is changed.
"""

import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from os.path import abspath
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet  # noqa: F401 (pa.parquet)

from ieft.data.archives import ARCHIVE_ENDINGS, tar_members
from ieft.data.invalid_examples import AMBIGUOUS, show
from ieft.data.locate import SPLIT_NAMES, ImageFinder, is_junk, split_of_text
from ieft.data.tables import parse_cell, read_csv, read_json_lines, read_text

logger = logging.getLogger(__name__)

# Known file names; the first that exists is used, regardless of case.
ANNOTATION_NAMES = ("dataset.json", "dataset_{name}.json", "{name}.json")
IMAGE_FOLDER_NAMES = ("images", "imgs", "{name}_images", "image", ".")
IMAGE_COLUMNS = ("image", "image_path", "filepath", "path", "file_name", "filename", "file", "image_url", "url")
SPLIT_COLUMNS = ("split", "splits", "set", "subset", "partition", "phase")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "raw")
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2")
EXPECTED_SPLITS = f"expected one of {', '.join(SPLIT_NAMES)}"
CAPTION_ENDINGS = (".txt", ".json")  # of a WebDataset
# A few kilobytes of parquet or arrow can expand to more than fits in memory.
MAX_ROWS = 10_000_000
MAX_TABLE_RATIO = 200  # bytes in memory per byte of file, beyond the first 2 GiB: captions need about 10
CAPTIONS_OF_A_NAME = 5  # of the AMFMN family, whose *_filename.txt may name each image once
NWPU_SENTENCES = ("raw", "raw_1", "raw_2", "raw_3", "raw_4")


@dataclass
class Source:
    """A collection: its annotations, its image folder, and its rows."""

    annotations: Path | str
    image_folder: Path | str
    rows: list[dict]


def read_source(path, name, *, image_column=None, caption_column=None, image_root=None):
    """Read the rows of a folder or file of any known kind.

    Args:
        image_root: the folder that image names are relative to; None is the folder of the annotations.

    Raises:
        ValueError: if it is of no known kind, or malformed; says what was found.
    """
    path = Path(path)
    columns = {"image_column": image_column, "caption_column": caption_column}
    if path.is_file():
        return read_file(path, columns, root=image_root)
    root = image_root or path
    files = {each.name.lower(): each for each in sorted(path.iterdir()) if each.is_file() and not is_junk(each.name)}
    for each in ANNOTATION_NAMES:
        if each.format(name=name).lower() in files:
            return read_json(files[each.format(name=name).lower()], root, name, columns)
    pairs = find_caption_texts(path)
    if pairs:
        return join_sources(path, [read_caption_text(*pair, root) for pair in pairs])
    coco = [each for each in (*path.glob("captions_*.json"), *path.glob("annotations/captions_*.json"))]
    if coco:
        return join_sources(path, [read_json(each, root, name, columns) for each in sorted(coco)])
    for pattern in (("metadata.*", "*/metadata.*"), ("data/*.parquet",)):
        tables = sorted(each for one in pattern for each in path.glob(one))
        tables = [each for each in tables if each.suffix.lower() in TABLE_ENDINGS and not is_junk(each.name)]
        if tables:
            return read_tables(path, tables, columns, root=image_root)
    for endings in ((".arrow",), (".tar",), (".json",), TABLE_ENDINGS):
        found = [each for lower, each in files.items() if lower.endswith(endings)]
        if found and endings == TABLE_ENDINGS:
            return read_tables(path, found, columns, root=image_root)
        if found:
            return join_sources(path, [read_file(each, columns, root) for each in found])
    archives = [each.name for lower, each in files.items() if lower.endswith(ARCHIVE_ENDINGS)]
    present = ", ".join(sorted(each.name for each in path.iterdir()))[:300] or "nothing"
    raise ValueError(
        f"{path} holds no annotation file: expected one of {', '.join(ANNOTATION_NAMES).format(name=name)}, "
        "metadata.csv or metadata.jsonl, captions of COCO, *_caps.txt beside *_filename.txt, tables, tars of a "
        f"WebDataset or arrow files; found {present}."
        + (f" Pass {archives[0]} itself, or unpack it first." if archives else "")
    )


def read_file(path, columns, root=None):
    """Read one file by its extension; image names are relative to `root`, or to the file's folder."""
    lower = path.name.lower()
    if lower.endswith(".json"):
        return read_json(path, root or path.parent, path.stem, columns)
    if lower.endswith(".arrow"):
        return read_legacy_arrow(path)
    if lower.endswith(".tar"):
        return read_webdataset(path)
    if lower.endswith(TABLE_ENDINGS):
        return read_tables(path, [path], columns, root=root)
    pair = next((pair for pair in find_caption_texts(path.parent) if path in pair), None)
    if pair:
        return read_caption_text(*pair, root or path.parent)
    raise ValueError(
        f"{path}: expected a file that ends in .json, .arrow, .tar or {', '.join(TABLE_ENDINGS)}, or *_caps.txt "
        "beside *_filename.txt."
    )


def join_sources(path, sources):
    """Join several files of one collection into one source."""
    return Source(path, sources[0].image_folder, [row for source in sources for row in source.rows])


def split_of_name(path):
    """The split that a file or its folder is named after, or None: "train-00000.parquet", "captions_val2017.json"."""
    return split_of_text(path.stem) or SPLIT_NAMES.get(path.parent.name.lower())


def split_of_value(value):
    """The split that an annotation names, whatever its spelling; None for other values."""
    return SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None


# Caption texts of the AMFMN family --------------------------------------------------------------------------------


def find_caption_texts(folder):
    """Pairs of `train_caps.txt` and `train_filename.txt`, by split.

    `train_caps_verify.txt` and `val_caps_verify.txt` are drawn from `train_caps.txt` for training and validation: if
    both exist, they are used instead of it.
    """
    names = {each.name.lower(): each for each in folder.iterdir() if each.is_file() and not is_junk(each.name)}
    pairs = {}
    for lower, captions in sorted(names.items()):
        match = re.fullmatch(r"(.+)_caps(_verify)?\.txt", lower)
        split = match and split_of_value(match[1])
        if split:
            filenames = names.get(f"{match[1]}_filename{match[2] or ''}.txt")
            if filenames is None:
                raise ValueError(f"{captions}: {match[1]}_filename{match[2] or ''}.txt is expected beside it.")
            pairs[split, bool(match[2])] = (captions, filenames, split)
    if ("train", True) in pairs and ("validation", True) in pairs:
        pairs.pop(("train", False), None), pairs.pop(("validation", False), None)
        logger.warning("%s: train and validation are read from *_verify.txt, which were drawn from train.", folder)
    else:
        pairs = {key: pair for key, pair in pairs.items() if not key[1]}
    return list(pairs.values())


def read_caption_text(captions, filenames, split, root):
    """Rows from a file with one caption per line, and one with an image name per caption or per five captions."""
    lines, names = (_lines(each) for each in (captions, filenames))
    if names and len(lines) == len(names):
        each = 1
    elif names and len(lines) == CAPTIONS_OF_A_NAME * len(names):
        each = CAPTIONS_OF_A_NAME
    else:
        raise ValueError(
            f"{captions} has {len(lines):,} lines, {filenames} has {len(names):,}: as many are expected, or "
            f"{CAPTIONS_OF_A_NAME} captions for each name. Lines may be blank, and none may be left out."
        )
    rows = {}
    finder = ImageFinder(root)
    for number, line in enumerate(lines):
        name = names[number // each].strip()
        if not name:
            raise ValueError(f"{filenames}, line {number // each + 1}: the name of an image is expected.")
        if name not in rows:
            rows[name] = {"filename": name, "split": split, "captions": []} | _find(finder, name)
        rows[name]["captions"].append(line)
    return Source(captions, root, list(rows.values()))


def _lines(path):
    text = read_text(path).replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n") if text else []


# JSON ------------------------------------------------------------------------------------------------------------


def read_json(path, folder, name, columns):
    """Karpathy's schema, NWPU-Captions', COCO captions, or a list of records, recognised by their structure."""
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if isinstance(content, list):
        return table_source(path, content, columns, root=folder)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return read_coco(path, content, folder)
    if isinstance(content, dict) and "images" not in content:
        if any(content.values()) and all(isinstance(each, list) for each in content.values()):
            return read_entries(path, _nwpu_entries(content, path), folder, name)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list) or not content["images"]:
        raise ValueError(f"{path} must be an object with a list `images` that is not empty.")
    return read_entries(path, content["images"], folder, name)


def _nwpu_entries(content, path):
    """The entries of `dataset_nwpu.json`, in Karpathy's schema, their images in the folder of their class."""
    entries = []
    for land_use, images in content.items():
        for position, image in enumerate(images):
            if not isinstance(image, dict) or not {"filename", "split", "raw"} <= set(image):
                raise ValueError(
                    f"{path}: image {position} of class {land_use!r} must have `filename`, `split`, `raw` and "
                    f"`raw_1` to `raw_4`; found {show(image)}."
                )
            sentences = [{"raw": image[key]} for key in NWPU_SENTENCES if key in image]
            filename = f"{land_use}/{Path(_name(image['filename'])).name}"
            entries.append({"filename": filename, "split": image["split"], "sentences": sentences})
    return entries


def read_entries(path, entries, folder, name):
    """Rows of Karpathy's schema: each image with its split and its `sentences` of `raw`."""
    children = {each.name.lower(): each for each in sorted(folder.iterdir()) if each.is_dir()} | {".": folder}
    image_folder = next(
        children[each.format(name=name).lower()]
        for each in IMAGE_FOLDER_NAMES
        if each.format(name=name).lower() in children
    )
    finders = [ImageFinder(image_folder)] + ([ImageFinder(folder)] if image_folder != folder else [])
    rows = []
    for position, entry in enumerate(entries):
        try:
            filename, captions = _name(entry["filename"]), [sentence["raw"] for sentence in entry["sentences"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: image {position} must have a `filename`, a `split` of {', '.join(SPLIT_NAMES)} and "
                f"`sentences` of `raw`; found {show(entry)}."
            ) from error
        split = split_of_value(entry.get("split"))
        if split is None:
            raise ValueError(
                f"{path}: image {position} must have a `filename`, a `split` of {', '.join(SPLIT_NAMES)} and "
                f"`sentences` of `raw`; found the split {show(entry.get('split'))}."
            )
        below = entry.get("filepath")  # of COCO in this schema: the folder of the image
        place = f"{below}/{filename}" if isinstance(below, str) and below else filename
        rows.append({"filename": filename, "split": split, "captions": captions} | _find_in(finders, place))
    return Source(path, image_folder, rows)


def _find(finder, name):
    """`image`, the file of a name or None, and `missing`, the reason for None if it is known."""
    image, reason = finder.find(name)
    return {"image": image, "missing": f"{AMBIGUOUS}: {reason}"} if reason else {"image": image}


def _find_in(finders, name):
    found = {"image": None}
    for finder in finders:
        found = _find(finder, name)
        if found["image"] or "missing" in found:
            break
    return found


def _name(value):
    """A file name as text; numbers are accepted as names."""
    if not isinstance(value, str | int):
        raise TypeError(f"a file name that is {show(value)}")
    return str(value)


def read_coco(path, content, folder):
    """Rows of COCO captions: `images` of `id` and `file_name`, `annotations` of `image_id` and `caption`."""
    finder = ImageFinder(folder.parent if folder.name == "annotations" else folder)
    own_folder = path.stem.removeprefix("captions_")
    try:
        captions = {image["id"]: [] for image in content["images"]}
        if len(captions) != len(content["images"]):
            raise KeyError("an `id` of its own for each image")
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        default = split_of_name(path) or "train"
        rows = []
        for image in content["images"]:
            name = _name(image["file_name"])
            split = default if image.get("split") is None else split_of_value(image["split"])
            if split is None:
                raise ValueError(f"{path}: image {show(name)} has split {show(image['split'])}; {EXPECTED_SPLITS}.")
            found = _find(finder, f"{own_folder}/{name}")
            rows.append({"filename": name, "split": split, "captions": captions[image["id"]]} | found)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be COCO captions: `images` of `id` and `file_name`, and `annotations` of `caption` and the "
            f"`image_id` of one of them; lacks {str(error)[:200]}."
        ) from error
    return Source(path, folder, rows)


# Tables ------------------------------------------------------------------------------------------------------------


def read_tables(folder, paths, columns, *, root=None):
    """Rows of CSV, JSONL or Parquet files; paths in them are taken from `root`, or from each file's folder."""
    rows = TableRows(columns)
    for path in paths:
        rows.add(path, _read_records(path, columns), root=root)
    return Source(folder, root or paths[0].parent, rows.as_list())


def _read_records(path, columns):
    lower = path.name.lower()
    if lower.endswith(".parquet"):
        try:
            records = _read_parquet(path)
        except (ValueError, RecursionError, OverflowError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read as a table: {error}.") from error
    elif lower.endswith((".jsonl", ".ndjson")):
        records = read_json_lines(path)
    else:
        wishes = [wish.lower() for wish in columns.values() if wish]
        known = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, *SPLIT_COLUMNS, *wishes}
        records = read_csv(path, known, lambda names: choose_columns(path, names, columns))
    return records


def _read_parquet(path):
    """Records of a Parquet file, read in pieces, since the size that it declares cannot be trusted."""
    records, size = [], 0
    with pa.parquet.ParquetFile(path) as file:
        _check_table_size(path, file.metadata.num_rows, 0)
        for batch in file.iter_batches(batch_size=64, use_threads=False):
            batch.validate(full=True)
            batch = _plain(batch)
            size += batch.nbytes
            _check_table_size(path, len(records) + batch.num_rows, size)
            records += batch.to_pylist()
    return records


def _plain(batch):
    """A batch whose size in bytes is that of its records: one text may stand for many rows otherwise."""
    columns = [each.dictionary_decode() if pa.types.is_dictionary(each.type) else each for each in batch.columns]
    shared = [str(each.type) for each in columns if re.search("dictionary|view|run_end", str(each.type))]
    if shared:
        raise ValueError(f"plain columns expected; one is of type {shared[0][:100]}")
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _check_table_size(path, rows, size):
    limit = max(2 * 2**30, MAX_TABLE_RATIO * path.stat().st_size)
    if rows > MAX_ROWS or size > limit:
        raise ValueError(f"it holds more than {MAX_ROWS:,} rows, or {limit:,} bytes once unpacked")


def table_source(path, records, columns, *, start=0, root=None):
    """Rows of records, numbered from `start`; their images are searched below `root`, or the table's folder."""
    rows = TableRows(columns, start=start)
    rows.add(path, records, root=root)
    return Source(path, root or path.parent, rows.as_list())


class TableRows:
    """The rows of one table, or of the parts of one.

    Where a record holds one caption, records of one image in one split are one row, whatever holds the image and in
    whichever part they are.
    """

    def __init__(self, columns, *, start=0):
        self._columns, self._count = columns, start
        self._rows = {}
        self._names = {}  # name of an image in bytes -> its hash; different images of one name get new names

    def as_list(self):
        """The rows in the order of their first records."""
        return list(self._rows.values())

    def add(self, path, records, *, root=None):
        """The records of a file; `path` is named in errors, and its name and folder may tell the split."""
        if not records or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path} must hold records with an image and captions each; found {show(records)}.")
        names = list(dict.fromkeys(name for record in records for name in record))
        image_column, caption_columns = choose_columns(path, names, self._columns)
        split_column = _split_column(names, records)
        if not split_column:
            _check_no_other_splits(path, [n for n in names if n not in (image_column, *caption_columns)], records)
        find = lru_cache(maxsize=None)(ImageFinder(root or path.parent).find)  # called once per caption
        for position, record in enumerate(records, self._count):
            try:
                captions, single = _captions(record, caption_columns)
            except ValueError as error:
                raise ValueError(f"{path}: row {position} holds {error}.") from error
            split = _split(record.get(split_column), path, position, bool(split_column))
            image, label, identity, reason = _locate(record.get(image_column), find)
            given = record.get("filename")
            if isinstance(image, bytes) and given and image_column != "filename":
                label = given if isinstance(given, str) else show(given)
            key = (identity, label if isinstance(image, bytes) else None, split) if single and identity else position
            if key not in self._rows:
                filename = label or f"{split}_{position}"
                if isinstance(image, bytes) and self._names.setdefault(filename, identity) != identity:
                    filename = f"{filename} (row {position})"
                self._rows[key] = {"filename": filename, "split": split, "captions": [], "image": image}
                if reason:
                    self._rows[key]["missing"] = f"{AMBIGUOUS}: {reason}"
            self._rows[key]["captions"] += captions
        self._count += len(records)


def choose_columns(where, names, columns):
    """The image column and the caption columns: the requested ones, or the first of the usual names that exists.

    Columns of one name and a number, such as `caption`, `caption_1` and `caption.2`, hold captions together.

    Raises:
        ValueError: that names the columns there are.
    """
    names = [name for name in names if isinstance(name, str)]
    lower = {name.lower(): name for name in reversed(names)}
    chosen = {}
    for option, usual in (("image_column", IMAGE_COLUMNS), ("caption_column", CAPTION_COLUMNS)):
        wish = columns.get(option)
        chosen[option] = (wish if wish in names else lower.get(wish.lower())) if wish else None
        if not wish:
            chosen[option] = next((lower[name] for name in usual if name in lower), None)
    image, caption = chosen["image_column"], chosen["caption_column"]
    captions = [caption] if caption else []
    if not columns.get("caption_column"):
        base = caption.lower().rstrip("s") if caption else r"(?:caption|sentence|text|raw)"
        numbered = [name for name in names if re.fullmatch(rf"{base}s?[_. ]?\d+", name.lower())]
        captions += sorted(numbered, key=lambda name: int(re.search(r"\d+$", name)[0]))
    if not image or not captions:
        raise ValueError(
            f"{where}: which column holds images, and which captions? Its columns are "
            f"{', '.join(map(str, names))[:1000]}. Pass --image_column and --caption_column, or name the columns in "
            "the first line."
        )
    unread = [lower[name] for name in CAPTION_COLUMNS if name in lower and lower[name] not in (*captions, image)]
    if unread and not columns.get("caption_column"):
        logger.warning("%s: captions are read from %s, not from %s (--caption_column chooses another).",
                       where, ", ".join(captions), ", ".join(unread))  # fmt: skip
    return image, captions


def _captions(record, columns):
    """The captions of a record, and whether it is a single caption; empty cells of further columns are ignored.

    A cell holds one string, or a list, which may be written as text.
    """
    captions, single = [], len(columns) == 1
    for column in columns:
        value = record.get(column)
        if value is None:
            continue
        value = parse_cell(value) if isinstance(value, str) else value
        if isinstance(value, list):
            single = False
        elif len(columns) > 1 and isinstance(value, str) and not value.strip():
            continue
        for each in value if isinstance(value, list) else [value]:
            captions.append(each["raw"] if isinstance(each, dict) and "raw" in each else each)
    return captions, single


def _locate(value, find):
    """An image cell as a path, bytes, URL or None; its name or None; a key that identifies the image; and a reason.

    A dict of `bytes` and `path`, as the datasets library has it, is known by both.
    """
    name = None
    if isinstance(value, dict):
        path = value.get("path")
        name = path if isinstance(path, str) and path.strip() and "\0" not in path else None
        value = value.get("bytes") or path
    if isinstance(value, bytes):
        return value, name, sha256(value).digest(), None
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return None, None, None, None
    if re.match(r"https?://", value, re.IGNORECASE):
        return value, value, value, None
    image, reason = find(value)
    return image, value, (abspath(image) if image else value), reason


def _split_column(names, records):
    """The column of splits: `split`, or another of the usual names whose values are all splits."""
    lower = {name.lower(): name for name in reversed(names) if isinstance(name, str)}
    for usual in SPLIT_COLUMNS:
        values = [record.get(lower[usual]) for record in records] if usual in lower else []
        if any(values) and (usual == "split" or all(split_of_value(value) for value in values)):
            return lower[usual]
    return None


def _check_no_other_splits(path, names, records):
    """Raise a ValueError for a column that holds names of splits: other splits would be drawn in their place."""
    for name in names:
        splits = {split_of_value(record.get(name)) for record in records}
        if len(splits) > 1 and None not in splits:
            raise ValueError(
                f"{path}: the column {show(name)} holds the names of splits. Rename it `split`, or delete it if they "
                "are not to be used."
            )


def _split(value, path, position, told):
    if not told:
        return split_of_name(path) or "train"
    split = split_of_value(value)
    if split is None:
        raise ValueError(f"{path}: row {position} has split {show(value)}; {EXPECTED_SPLITS}.")
    return split


# Containers of image bytes -----------------------------------------------------------------------------------------


def read_legacy_arrow(path):
    """Rows of the arrow files of ViLT and IEFT: columns `image` (bytes), `caption` (list), `image_id`, `split`."""
    try:
        table = _read_arrow(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not an arrow file of ViLT or IEFT: {error}.") from error
    names = table.column_names
    columns = [name for name in ("image", "caption", "image_id", "split") if names.count(name) == 1]
    if not {"image", "caption"} <= set(columns) or not _is_binary(table.schema.field("image").type):
        raise ValueError(
            f"{path} must have columns image (bytes), caption, image_id and split, each once; it has "
            f"{', '.join(map(str, table.schema))[:1000]}."
        )
    rows = []
    for position, record in enumerate(_records(path, table.select(columns))):
        split = _split(record.get("split"), path, position, bool(record.get("split")))
        filename = record.get("image_id", f"row_{position}")
        filename = filename if isinstance(filename, str) else show(filename)
        captions, _ = _captions(record, ["caption"])
        rows.append({"filename": filename, "split": split, "captions": captions, "image": record["image"]})
    return Source(path, path, rows)


def _read_arrow(path):
    """The table of an arrow file, each batch validated before its offsets, which cannot be trusted, are followed."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    if any(pa.types.is_dictionary(kind) for kind in file.schema.types):
        raise ValueError("plain columns expected; one is of a dictionary")
    batches, rows, size = [], 0, 0
    for number in range(file.num_record_batches):
        batch = file.get_batch(number)
        batch.validate(full=True)
        batch = _plain(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        _check_table_size(path, rows, size)
        batches.append(batch)
    return pa.Table.from_batches(batches, pa.schema([*zip(file.schema.names, file.schema.types, strict=True)]))


def _is_binary(kind):
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def _records(path, table):
    """Iterate over records, so that images are not in memory twice."""
    try:
        for batch in table.to_batches(max_chunksize=64):
            yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not an arrow file of ViLT or IEFT: {error}.") from error


def read_webdataset(path):
    """Rows of one tar of a WebDataset: members of one key are an image and .txt or .json captions.

    A key ends at the first dot of the name, as WebDataset has it, where that gives each image its captions; else at
    the last dot, for names such as `tile_0.5m.png` beside `tile_0.5m.txt`.

    Raises:
        ValueError: if neither does, so that no image or caption is skipped silently.
    """
    members = [(name, *place) for name, *place in tar_members(path) if not any(map(is_junk, Path(name).parts))]
    samples, by_last_dot = _webdataset_samples(path, members), _webdataset_samples(path, members, at_last_dot=True)
    strays, others = _strays(members, samples, by_last_dot), _strays(members, by_last_dot, by_last_dot)
    if len(others) < len(strays):
        samples, strays = by_last_dot, others
    dotted = [name for name in strays if "." in Path(name).stem]
    if dotted:
        raise ValueError(
            f"{path}: {len(dotted)} members with further dots in their names belong to no sample, such as "
            f"{show(dotted[0])}. Names are read up to the first dot, or up to the last: give each image and its "
            "captions one name without dots."
        )
    rows = []
    with path.open("rb") as file:
        for key, parts in samples.items():
            ending = next((each for each in IMAGE_ENDINGS if each in parts), None)
            if ending or set(CAPTION_ENDINGS) & set(parts):
                image = _read_at(file, *parts[ending]) if ending else None
                split = split_of_name(path) or "train"
                captions = _tar_captions(file, parts, path, key)
                rows.append({"filename": f"{key}{ending or ''}", "split": split, "captions": captions, "image": image})
    if not rows:
        raise ValueError(f"{path} must hold images beside .txt or .json files of the same name; found none.")
    return Source(path, path, rows)


def _webdataset_samples(path, members, *, at_last_dot=False):
    """Key -> its members by ending, as (offset, size)."""
    samples = {}
    for name, offset, size in members:
        key, ending = _key_and_ending(name, at_last_dot)
        parts = samples.setdefault(key, {})
        if ending in parts:
            raise ValueError(f"{path} holds {show(name)} twice, and which of the two is meant is not known.")
        parts[ending] = (offset, size)
    return samples


def _key_and_ending(name, at_last_dot):
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.rpartition(".") if at_last_dot else base.partition(".")
    return f"{folder}{slash}{stem}", f".{ending.lower()}"


def _strays(members, samples, by_last_dot):
    """Images without captions, captions without an image, and what would be a sample if its last dot counted."""
    strays = []
    for name, _, _ in members:
        key, last = _key_and_ending(name, True)
        parts = samples[key if samples is by_last_dot else _key_and_ending(name, False)[0]]
        own = samples is by_last_dot or key in samples or not _is_sample(by_last_dot[key])
        if last in (*IMAGE_ENDINGS, *CAPTION_ENDINGS) and not (own and _is_sample(parts)):
            strays.append(name)
    return strays


def _is_sample(parts):
    return any(each in parts for each in IMAGE_ENDINGS) and any(each in parts for each in CAPTION_ENDINGS)


def _tar_captions(file, parts, path, key):
    if ".txt" in parts:
        content = _read_at(file, *parts[".txt"])
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {key}.txt is not UTF-8 text ({error}). Write it as UTF-8.") from error
        lines = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
        captions = lines.split("\n") if lines else []
        _check_json_has_no_more(file, parts, captions, path, key)
        return captions
    if ".json" not in parts:
        return []
    try:
        record = json.loads(_read_at(file, *parts[".json"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {key}.json is not JSON: {error}.") from error
    if isinstance(record, list):
        record = {"captions": record}
    if not isinstance(record, dict) or not set(CAPTION_COLUMNS) & set(record):
        raise ValueError(f"{path}: {key}.json must have one of {', '.join(CAPTION_COLUMNS)}; found {show(record)}.")
    return _captions(record, [next(name for name in CAPTION_COLUMNS if name in record)])[0]


def _check_json_has_no_more(file, parts, captions, path, key):
    """Raise a ValueError if a sample's .json has more captions than its .txt, which is the one that is read."""
    try:
        record = json.loads(_read_at(file, *parts[".json"])) if ".json" in parts else {}
    except (ValueError, RecursionError):  # metadata in another form
        return
    found = record.get("captions") or record.get("sentences") if isinstance(record, dict) else record
    if isinstance(found, list) and len(found) > len(captions):
        raise ValueError(
            f"{path}: {key}.json holds {len(found)} captions and {key}.txt {len(captions)}; which are meant is not "
            "known. Delete the one or the other."
        )


def _read_at(file, offset, size):
    file.seek(offset)
    return file.read(size)
