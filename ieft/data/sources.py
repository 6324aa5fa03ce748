"""Every kind of image-caption collection as rows.

In: a folder, file or archive. Out: a `Source`: rows of `filename`, `split`, `captions` and `image`, where the image is
a path, bytes, or None where it is missing. It reads annotations only, decodes no image, judges no row, and changes
nothing of the user's.
"""

import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet  # noqa: F401 (pa.parquet)

from ieft.data.archives import tar_members
from ieft.data.invalid_examples import show

# Spellings in circulation; the first that exists is taken, whatever its case.
ANNOTATION_NAMES = ("dataset.json", "dataset_{name}.json", "{name}.json")
IMAGE_FOLDER_NAMES = ("images", "imgs", "{name}_images", "image", ".")
SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
IMAGE_COLUMNS = ("image", "image_path", "filepath", "path", "file_name", "filename", "file", "image_url", "url")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "raw")
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2")
# A few kilobytes of parquet or arrow can stand for more than any memory holds.
MAX_ROWS = 10_000_000
MAX_TABLE_RATIO = 200  # bytes of a table for each of its file, beyond the first 2 GiB: captions need about 10
NWPU_SENTENCES = ("raw", "raw_1", "raw_2", "raw_3", "raw_4")


@dataclass
class Source:
    """A collection as read: where its annotations and images are, and its rows."""

    annotations: Path | str
    image_folder: Path | str
    rows: list[dict]


def read_source(path, name, *, image_column=None, caption_column=None):
    """The rows of a folder or file, whatever of the known kinds it is.

    Raises:
        ValueError: where it is of no known kind, or not of the shape of its kind; says what was found.
    """
    path = Path(path)
    columns = {"image_column": image_column, "caption_column": caption_column}
    if path.is_file():
        return read_file(path, columns)
    files = {each.name.lower(): each for each in sorted(path.iterdir()) if each.is_file()}
    annotations = next(
        (
            files[each.format(name=name).lower()]
            for each in ANNOTATION_NAMES
            if each.format(name=name).lower() in files
        ),
        None,
    )
    if annotations:
        return read_json(annotations, path, name, columns)
    tables = sorted(path.glob("metadata.*")) + sorted(path.glob("*/metadata.*"))
    tables = [each for each in tables if each.suffix.lower() in TABLE_ENDINGS]
    if tables:
        return join_sources(path, [read_table(each, columns) for each in tables])
    parquet = sorted(path.glob("data/*.parquet"))
    if parquet:
        return join_sources(path, [read_table(each, columns) for each in parquet])
    for endings in ((".arrow",), (".tar",), (".json",), TABLE_ENDINGS):
        found = [each for lower, each in files.items() if lower.endswith(endings)]
        if found:
            return join_sources(path, [read_file(each, columns, path) for each in found])
    raise ValueError(
        f"{path} holds no annotation file: expected one of {', '.join(ANNOTATION_NAMES).format(name=name)}, "
        "metadata.csv or metadata.jsonl, captions of COCO, tables, tars of a WebDataset or arrow files; found "
        f"{', '.join(sorted(each.name for each in path.iterdir()))[:300] or 'nothing'}."
    )


def read_file(path, columns, folder=None):
    """The rows of one file, by its ending."""
    lower = path.name.lower()
    if lower.endswith(".json"):
        return read_json(path, folder or path.parent, path.stem, columns)
    if lower.endswith(".arrow"):
        return read_legacy_arrow(path)
    if lower.endswith(".tar"):
        return read_webdataset(path)
    if lower.endswith(TABLE_ENDINGS):
        return read_table(path, columns)
    raise ValueError(f"{path}: expected a file that ends in .json, .arrow, .tar or {', '.join(TABLE_ENDINGS)}.")


def join_sources(path, sources):
    """Several files of one collection as one source."""
    return Source(path, sources[0].image_folder, [row for source in sources for row in source.rows])


def split_of_name(path):
    """The split that a file or its folder is named after, or None: "train-00000.parquet", "captions_val2017.json"."""
    for word in re.findall(r"[a-z]+", path.stem.lower()) + [path.parent.name.lower()]:
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


# JSON ------------------------------------------------------------------------------------------------------------


def read_json(path, folder, name, columns):
    """Karpathy's schema, NWPU-Captions', COCO captions, or a list of records, told apart by their shape."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if isinstance(content, list):
        return table_source(path, content, columns)
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
    paths = index_images(image_folder)
    rows = []
    for position, entry in enumerate(entries):
        try:
            filename, captions = _name(entry["filename"]), [sentence["raw"] for sentence in entry["sentences"]]
            split = SPLIT_NAMES[entry["split"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: image {position} must have a `filename`, a `split` of {', '.join(SPLIT_NAMES)} and "
                f"`sentences` of `raw`; found {show(entry)}."
            ) from error
        image = _look_up(paths, filename) or _look_up(paths, Path(filename).name)
        rows.append({"filename": filename, "split": split, "captions": captions, "image": image})
    return Source(path, image_folder, rows)


def index_images(folder):
    """Files below a folder by relative path, and by that or the bare name in lower case where only one has it."""
    exact, paths, names = {}, {}, {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        relative = path.relative_to(folder).as_posix()
        exact[relative] = path
        paths[relative.lower()] = None if relative.lower() in paths else path
        names[path.name.lower()] = None if path.name.lower() in names else path
    return {name: path for name, path in (names | paths).items() if path} | exact


def _look_up(paths, name):
    return paths.get(name) or paths.get(name.lower())


def _name(value):
    """A file name as text; annotations that number their images are right too."""
    if not isinstance(value, str | int):
        raise TypeError(f"a file name that is {show(value)}")
    return str(value)


def read_coco(path, content, folder):
    """Rows of COCO captions: `images` of `id` and `file_name`, `annotations` of `image_id` and `caption`."""
    paths = index_images(folder)
    try:
        captions = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        split = split_of_name(path) or "train"
        rows = [
            {
                "filename": _name(image["file_name"]),
                "split": SPLIT_NAMES.get(image.get("split"), split),
                "captions": captions[image["id"]],
                "image": _look_up(paths, _name(image["file_name"]))
                or _look_up(paths, f"{path.stem.removeprefix('captions_')}/{image['file_name']}"),
            }
            for image in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be COCO captions: `images` of `id` and `file_name`, and `annotations` of `caption` and the "
            f"`image_id` of one of them; lacks {str(error)[:200]}."
        ) from error
    return Source(path, folder, rows)


# Tables ------------------------------------------------------------------------------------------------------------


def read_table(path, columns):
    """Rows of a CSV, JSONL or Parquet file; paths in it are taken from the file's folder."""
    lower = path.name.lower()
    try:
        if lower.endswith(".parquet"):
            records = _read_parquet(path)
        elif lower.endswith((".jsonl", ".ndjson")):
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        else:
            csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
            with path.open(encoding="utf-8-sig", newline="") as file:
                records = list(csv.DictReader(file, delimiter="\t" if lower.endswith(".tsv") else ","))
    except (ValueError, csv.Error, RecursionError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}.") from error
    return table_source(path, records, columns)


def _read_parquet(path):
    """Records of a Parquet file, read piece by piece: its own word on how much it holds proves nothing."""
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


def table_source(path, records, columns, *, start=0):
    """Rows of records, numbered from `start`.

    Where a record holds one caption, records of one image in one split are one row.
    """
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must hold records with an image and captions each; found {show(records)}.")
    image_column, caption_columns = choose_columns(path, records[0], columns)
    rows = {}
    for position, record in enumerate(records, start):
        captions = _captions(record, caption_columns)
        split = _split(record, path, position)
        image, filename = _locate(record.get(image_column), path.parent, f"{split}_{position}")
        if isinstance(image, bytes) and record.get("filename"):
            filename = record["filename"] if isinstance(record["filename"], str) else show(record["filename"])
        key = (filename, split) if isinstance(record.get(caption_columns[0]), str) else position
        row = rows.setdefault(key, {"filename": filename, "split": split, "captions": [], "image": image})
        row["captions"] += captions
    return Source(path, path.parent, list(rows.values()))


def choose_columns(where, names, columns):
    """The image column and the caption columns: those asked for, or the first of the usual names that is there.

    Raises:
        ValueError: that names the columns there are.
    """
    chosen = []
    for option, usual in (("image_column", IMAGE_COLUMNS), ("caption_column", CAPTION_COLUMNS)):
        wish = columns.get(option)
        chosen.append(wish if wish else next((name for name in usual if name in names), None))
    numbered = sorted((name for name in names if re.fullmatch(r"(caption|sentence|text|raw)_?\d+", str(name))),
                      key=lambda name: int(re.sub(r"\D", "", name)))  # fmt: skip
    captions = [chosen[1]] if chosen[1] in names else []
    if not captions and (not columns.get("caption_column")) and numbered:
        captions = numbered
    if chosen[0] not in names or not captions:
        raise ValueError(
            f"{where}: which column holds images, and which captions? Its columns are "
            f"{', '.join(map(str, names))[:1000]}. Pass --image_column and --caption_column."
        )
    return chosen[0], captions


def _captions(record, columns):
    """The captions of one record: one string, a list, or several columns; empty further columns are none."""
    captions = []
    for column in columns:
        value = record.get(column)
        if value is None:
            continue
        for each in value if isinstance(value, list) else [value]:
            captions.append(each["raw"] if isinstance(each, dict) and "raw" in each else each)
    return captions


def _locate(value, folder, unnamed):
    """An image cell as a path, bytes, URL or None, and a file name for it: `unnamed` where it has none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value, unnamed
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return None, unnamed
    if re.match(r"https?://", value):
        return value, value
    return _file_at(folder / value), value


def _file_at(path):
    """The path where a file is there, or None; None too for what no system could have as a path."""
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):
        return None


def _split(record, path, position):
    split = record.get("split") or split_of_name(path) or "train"
    if not isinstance(split, str) or split not in SPLIT_NAMES:
        raise ValueError(f"{path}: row {position} has split {show(split)}; expected one of {', '.join(SPLIT_NAMES)}.")
    return SPLIT_NAMES[split]


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
        split = record.get("split") if isinstance(record.get("split"), str) else None
        split = SPLIT_NAMES.get(split) or split_of_name(path) or "train"
        filename = record.get("image_id", f"row_{position}")
        filename = filename if isinstance(filename, str) else show(filename)
        captions = _captions(record, ["caption"])
        rows.append({"filename": filename, "split": split, "captions": captions, "image": record["image"]})
    return Source(path, path, rows)


def _read_arrow(path):
    """The table of an arrow file, each batch checked before anything follows its offsets, which lead anywhere."""
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
    """One record after another, so that images are not in memory twice."""
    try:
        for batch in table.to_batches(max_chunksize=64):
            yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not an arrow file of ViLT or IEFT: {error}.") from error


def read_webdataset(path):
    """Rows of one tar of a WebDataset: members of one key are an image and .txt or .json captions."""
    samples = {}
    for name, offset, size in tar_members(path):
        stem, _, ending = name.rpartition("/")[2].partition(".")
        key = name.removesuffix(f".{ending}")
        parts = samples.setdefault(key, {})
        if f".{ending.lower()}" in parts:
            raise ValueError(f"{path} holds {show(name)} twice, and which of the two is meant is not known.")
        parts[f".{ending.lower()}"] = (offset, size)
    rows = []
    with path.open("rb") as file:
        for key, parts in samples.items():
            ending = next((each for each in IMAGE_ENDINGS if each in parts), None)
            if ending or {".txt", ".json"} & set(parts):
                image = _read_at(file, *parts[ending]) if ending else None
                split = split_of_name(path) or "train"
                captions = _tar_captions(file, parts, path, key)
                rows.append({"filename": f"{key}{ending or ''}", "split": split, "captions": captions, "image": image})
    if not rows:
        raise ValueError(f"{path} must hold images beside .txt or .json files of the same name; found none.")
    return Source(path, path, rows)


def _tar_captions(file, parts, path, key):
    if ".txt" in parts:
        return _read_at(file, *parts[".txt"]).decode("utf-8", "replace").splitlines()
    if ".json" not in parts:
        return []
    try:
        record = json.loads(_read_at(file, *parts[".json"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {key}.json is not JSON: {error}.") from error
    if not isinstance(record, dict) or not set(CAPTION_COLUMNS) & set(record):
        raise ValueError(f"{path}: {key}.json must have one of {', '.join(CAPTION_COLUMNS)}; found {show(record)}.")
    return _captions(record, [next(name for name in CAPTION_COLUMNS if name in record)])


def _read_at(file, offset, size):
    file.seek(offset)
    return file.read(size)
