"""Prepares any image-caption collection as a `DatasetDict`.

    python prepare_datasets.py rsicd --data_dir RSICD --output_dir prepared/rsicd
    python prepare_datasets.py captions.csv --output_dir prepared/mine --push_to_hub user/mine

A collection is a named dataset with the folder or archive it was distributed in, any folder or file that
`ieft/data/sources.py` can read, or a dataset on the Hub. Its splits `train`, `validation` and `test` have the columns
`image`, `filename` and `captions`; the command writes them as parquet shards. Files of the user are never changed.
"""

import argparse
import errno
import hashlib
import json
import logging
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from ieft.data.archives import extract, is_archive, tar_members
from ieft.data.builders import SCENES_SEED, CaptionRowsBuilder, ScenesBuilder
from ieft.data.downloads import download
from ieft.data.duplicates import group_identical
from ieft.data.images import parse_bands, read_image
from ieft.data.invalid_examples import (
    MISSING,
    PACKED,
    UNREADABLE,
    BadRowsError,
    bad_rows_text,
    describe,
    known_faults,
    usable_rows,
)
from ieft.data.locate import is_junk
from ieft.data.prepared import PreparedFolder
from ieft.data.report import measure_collection, write_report
from ieft.data.sources import IMAGE_ENDINGS, Source, TableRows, read_source, read_webdataset
from ieft.data.streaming import LazyRows, load_from_hub, stream_hub_dataset, stream_rows

logger = logging.getLogger(__name__)

SHARE_SET_ASIDE = 0.1
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
ON_BAD_ROWS = ("stop", "skip")
SYNTHETIC = ("scenes", "twins")
# Name -> where the dataset is distributed, in which layout, its images and captions as published.
RSICD_PAGE = "https://github.com/201528014227051/RSICD_optimal"
BENCHMARKS = {
    "rsicd": (RSICD_PAGE, "dataset_rsicd.json beside RSICD_images/*.jpg", 10921, 54605),
    "rsitmd": ("https://github.com/xiaoyuan1996/AMFMN", "dataset_RSITMD.json beside images/*.tif", 4743, 23715),
    "ucm": (f"{RSICD_PAGE} (UCM-Captions)", "dataset.json beside imgs/*.tif", 2100, 10500),
    "sydney": (f"{RSICD_PAGE} (Sydney-Captions)", "dataset.json beside imgs/*.tif", 613, 3065),
    "nwpu": (
        "https://github.com/HaiyanHuang98/NWPU-Captions", "dataset_nwpu.json beside NWPU_images/CLASS/*.jpg",
        31500, 157500,
    ),
}  # fmt: skip
# Complete copies on the Hub, read without `data_dir`. Of the other benchmarks, none is known.
HUB_COPIES = {"rsicd": "arampacha/rsicd"}


def load_retrieval_dataset(
    name_or_path: str | os.PathLike, data_dir: str | os.PathLike | None = None, **options: Any
) -> datasets.DatasetDict:
    """Load the splits of a collection.

    Args:
        name_or_path: scenes, twins, rsicd, rsitmd, ucm, sydney, nwpu; a folder, file or archive; or a dataset on
            the Hub.
        data_dir: folder, zip or tar of a named dataset, as distributed; without it, rsicd comes from the Hub. For a
            folder or file of annotations, the folder that image names are relative to.
        options: as in `load_and_check`.

    Returns:
        DatasetDict: `train`, `validation`, `test` with `image`, `filename`, `captions` (a list of sentences).

    Raises:
        ValueError: for an unknown name, a missing folder, or a malformed file.
        BadRowsError: for invalid examples.
    """
    return load_and_check(name_or_path, data_dir, **options)[0]


def load_and_check(name_or_path, data_dir=None, *, image_column=None, caption_column=None, seed=0, on_bad_rows="stop",
                   bands=None, num_proc=None, scenes_seed=SCENES_SEED, cache_dir=None, streaming=False):  # fmt: skip
    """Load the splits as `load_retrieval_dataset`, together with the invalid examples.

    Args:
        image_column: image column of tables and Hub datasets; None takes the first of the usual names.
        caption_column: the same for captions: one string, a list, or the columns caption_1, caption_2...
        seed: for drawing validation and test splits that are not distributed.
        on_bad_rows: "stop" raises before anything is prepared; "skip" skips invalid examples with a warning.
        bands: for images of several bands, the numbers, from 1, of those to use as red, green and blue, such as
            "3,2,1" or (3, 2, 1), or of a single grey band.
        num_proc: images read in parallel; None: one per CPU core.
        scenes_seed: selects the synthetic scenes.
        cache_dir: cache of prepared splits; None: the cache of the `datasets` library.
        streaming: return an `IterableDatasetDict` that stores nothing on disk and checks each image when it is read.
            For a Hub dataset, captions are checked then too, and missing splits are not set aside.

    Returns:
        DatasetDict, and a list of `BadRow`.
    """
    if on_bad_rows not in ON_BAD_ROWS:
        raise ValueError(f"on_bad_rows must be one of {', '.join(ON_BAD_ROWS)}; got {on_bad_rows!r}.")
    bands = parse_bands(bands) if isinstance(bands, str) else bands
    name_or_path = place_of(name_or_path, data_dir)
    if name_or_path in SYNTHETIC:
        hard = name_or_path == "twins"
        builder = ScenesBuilder(config_name=name_or_path, scenes_seed=scenes_seed, hard=hard, cache_dir=cache_dir)
        bad = []
    else:
        kept = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ieft"
        columns = {"image_column": image_column, "caption_column": caption_column}
        checks = {"image_fault": image_fault, "on_bad_rows": on_bad_rows, "bands": bands}
        if streaming and data_dir is None and is_hub_id(name_or_path):
            return stream_hub_dataset(name_or_path, columns, **checks), []
        name, source = find_source(str(name_or_path), data_dir, columns, kept)
        rows, bad = check_rows(name, source, on_bad_rows, kept, num_proc, seed=seed, bands=bands, decode=not streaming)
        if streaming:
            return stream_rows(rows, source.annotations, **checks), bad
        name = re.sub(r"[^\w.-]", "-", name)
        builder = CaptionRowsBuilder(config_name=name, sources=fingerprint(rows, bands), cache_dir=cache_dir)
        builder.rows, builder.bands = rows, bands
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:  # of a full disk, or of an image that is gone since
        if isinstance(error.__cause__, (OSError, ValueError)):
            raise error.__cause__ from None
        raise
    splits = builder.as_dataset()
    if streaming:  # scenes are small and drawn in seconds
        splits = datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    return splits, bad


def load_lazily(name_or_path, data_dir=None, *, image_column=None, caption_column=None, seed=0, on_bad_rows="stop",
                bands=None, num_proc=None, cache_dir=None):  # fmt: skip
    """As `load_and_check`, for collections larger than the disk: a dict of `LazyRows`, and invalid examples.

    Every image is read once for validation and again whenever it is used; none is copied. Images by URL are
    downloaded, and those inside tar, arrow and parquet files are held in memory.

    Raises:
        ValueError: for a dataset on the Hub, which has no random access.
    """
    name_or_path = place_of(name_or_path, data_dir)
    if data_dir is None and is_hub_id(name_or_path):
        raise ValueError(
            f"Training needs random access to images, but {name_or_path} on the Hub is a stream. Download it "
            "(hf download --repo-type dataset), or leave out --streaming."
        )
    if name_or_path in SYNTHETIC:
        return load_and_check(name_or_path, cache_dir=cache_dir)
    kept = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ieft"
    columns = {"image_column": image_column, "caption_column": caption_column}
    bands = parse_bands(bands) if isinstance(bands, str) else bands
    name, source = find_source(str(name_or_path), data_dir, columns, kept)
    rows, bad = check_rows(name, source, on_bad_rows, kept, num_proc, seed=seed, bands=bands)
    names = [name for name in ("train", "validation", "test") if any(row["split"] == name for row in rows)]
    return {name: LazyRows([row for row in rows if row["split"] == name], bands=bands) for name in names}, bad


# Finding a collection ------------------------------------------------------------------------------------------------


def place_of(name_or_path, data_dir):
    """The Hub id of a benchmark that is asked for without its folder; everything else as it is.

    Raises:
        ValueError: for a benchmark without a known copy on the Hub: says where it is distributed, and how.
    """
    if name_or_path not in BENCHMARKS or data_dir is not None:
        return name_or_path
    if name_or_path in HUB_COPIES:
        return HUB_COPIES[name_or_path]
    page, layout, images, captions = BENCHMARKS[name_or_path]
    raise ValueError(
        f"{name_or_path} has to be downloaded first: no complete copy on the Hub is known. It is distributed at "
        f"{page}, as {layout} ({images:,} images, {captions:,} captions). Pass that folder, or a zip or tar of it, as "
        f"--data_dir, or in place of {name_or_path} the name of a dataset on the Hub, user/name."
    )


def find_source(name_or_path, data_dir, columns, kept):
    """The name of a collection and its rows, or an error with a remedy."""
    name, source = _read_collection(name_or_path, data_dir, columns, kept)
    shorten_names(source.rows)
    return name, source


def shorten_names(rows):
    """Cut absolute file names to what tells them apart: they are published, and the user's folders are not.

    Names stay as they are where short ones would not be unique.
    """
    names = {row["filename"] for row in rows}
    parts = {name: re.split(r"[/\\]+", name) for name in names if re.match(r"[/\\~]|[A-Za-z]:[/\\]", name)}
    common = os.path.commonprefix([each[:-1] for each in parts.values()])
    short = {name: "/".join(each[len(common) :]) for name, each in parts.items()}
    if len({short.get(name, name) for name in names}) == len(names):
        for row in rows:
            row["filename"] = short.get(row["filename"], row["filename"])


def _read_collection(name_or_path, data_dir, columns, kept):
    name_or_path = place_of(name_or_path, data_dir)
    path, root = Path(data_dir or name_or_path), None
    if data_dir and name_or_path not in BENCHMARKS and Path(name_or_path).exists():
        path, root = Path(name_or_path), Path(os.path.abspath(data_dir))
        if not root.is_dir():
            raise ValueError(f"--data_dir {data_dir}: the folder of the images of {name_or_path} expected.")
    path = Path(os.path.abspath(path))  # links keep their own names, which determine the file type
    name = name_or_path if name_or_path in BENCHMARKS else Path(os.path.abspath(name_or_path)).name
    if path.is_file() and is_archive(path):
        if _is_webdataset(path):
            return name, read_webdataset(path)
        folder = unpack(path, kept)
        allowed = [folder, *([root] if root else [])]
        return name, keep_inside(read_source(folder, name, image_root=root, **columns), allowed, path)
    if path.exists():
        return name, read_source(path, name, image_root=root, **columns)
    if data_dir is None and is_hub_id(name_or_path):
        return name_or_path, read_hub_dataset(name_or_path, columns, kept)
    names = ", ".join([*SYNTHETIC, *BENCHMARKS])
    raise ValueError(
        f"A dataset's name ({names}), an existing folder or file, or user/name expected; got "
        f"{str(data_dir or name_or_path)!r}."
    )


def keep_inside(source, folders, origin):
    """The source, where every image that is a file lies in one of the folders.

    Raises:
        ValueError: for another: what comes from elsewhere could name files of this machine, to be published with it.
    """
    folders = [Path(folder).resolve() for folder in folders]
    for row in source.rows:
        if isinstance(row["image"], Path) and not any(row["image"].resolve().is_relative_to(each) for each in folders):
            raise ValueError(f"{origin} names an image outside itself, {row['filename']!r}: such files are not read.")
    return source


def is_hub_id(name_or_path):
    """Whether this is a Hub id (user/name) and not an existing path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path))) and not Path(name_or_path).exists()


def _is_webdataset(path):
    """Whether a tar has captions of the same name beside some image."""
    if not path.name.lower().endswith(".tar"):
        return False
    names = {name.lower() for name, _, _ in tar_members(path)}
    images = {name.rpartition(".")[0] for name in names if name.endswith(IMAGE_ENDINGS)}
    images |= {_first_dot(name) for name in names if name.endswith(IMAGE_ENDINGS)}
    texts = {name for name in names if name.endswith((".txt", ".json"))}
    return any(name.rpartition(".")[0] in images or _first_dot(name) in images for name in texts)


def _first_dot(name):
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def unpack(archive, kept):
    """The folder to which an archive was extracted, once; if it has just one folder, the innermost such folder."""
    state = archive.stat()
    key = hashlib.sha256(f"{archive} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:32]
    folder = kept / "extracted" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # another process may be extracting it
        if not folder.is_dir():
            logger.warning("%d files unpacked from %s.", extract(archive, folder), archive)
    while True:
        children = [each for each in folder.iterdir() if not is_junk(each.name)]
        if len(children) != 1 or not children[0].is_dir():
            return folder
        folder = children[0]


def read_hub_dataset(name, columns, kept):
    """All splits of a dataset on the Hub, or of a local parquet folder."""
    try:
        splits = load_from_hub(name, cache_dir=str(kept / "hub"))
    except ValueError as error:
        for benchmark in (each for each, copy in HUB_COPIES.items() if copy == name):
            raise ValueError(
                f"{error} {benchmark} is also distributed at {BENCHMARKS[benchmark][0]}, as "
                f"{BENCHMARKS[benchmark][1]}: pass that folder, or a zip or tar of it, as --data_dir."
            ) from error
        raise
    table = TableRows(columns)
    for split, data in splits.items():
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        records = [{"split": split} | record if len(splits) == 1 else record | {"split": split} for record in data]
        table.add(Path(name), records)
    rows = table.as_list()
    fetched = [kept, datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    return keep_inside(Source(name, name, rows), [*fetched, Path(name)], name)


# Checking ------------------------------------------------------------------------------------------------------------


def check_rows(name, source, on_bad_rows, kept, num_proc, *, seed, bands=None, decode=True):
    """The valid rows of a source in their splits, and all faults; without `decode`, images are only searched for.

    Known faults of a published benchmark of this name are skipped and do not raise an error.

    Raises:
        BadRowsError: with `on_bad_rows` "stop", where there are faults; or where no row is left.
    """
    reasons = missing_images(source, kept, num_proc)
    if decode:
        reasons = image_faults(source.rows, kept, num_proc, bands=bands) | reasons
    rows, bad = usable_rows(source.rows, reasons)
    known = known_faults(name, bad)
    others = [each for each in bad if each not in known]
    if others and (on_bad_rows == "stop" or not rows):
        raise BadRowsError(others, source.annotations)
    if known:
        logger.warning(
            "%s: %d captions that are known to be faulty as published are skipped (%s, of %s).", name, len(known),
            known[0].reason.split(":")[0], ", ".join(sorted({each.filename for each in known})),
        )  # fmt: skip
    if others:
        logger.warning(describe(others, source.annotations))
    if not rows:
        raise ValueError(f"{source.annotations} holds no rows.")
    groups = group_identical([row["image"] for row in rows])
    warn_of_shared_images(rows, groups)
    carve_missing_splits(rows, {row["split"] for row in source.rows}, seed, groups)
    return rows, bad


def missing_images(source, kept, num_proc):
    """Row number -> why there is no image file; URLs are downloaded."""
    not_fetched = fetch_urls(source.rows, kept, num_proc)
    place = Path(source.annotations)
    folder = place if place.is_dir() else place.parent
    archives = sorted(each.name for each in folder.iterdir() if is_archive(each)) if folder.is_dir() else []
    reason = f"{PACKED}: {archives[0]}" if archives and not is_archive(place) else MISSING
    missing = {number: row.get("missing", reason) for number, row in enumerate(source.rows) if row["image"] is None}
    return missing | not_fetched


def fetch_urls(rows, kept, num_proc):
    """Replace each URL by a downloaded file; row number -> reason for those that failed."""
    remote = [(number, row) for number, row in enumerate(rows) if isinstance(row["image"], str)]
    urls = list(dict.fromkeys(row["image"] for _, row in remote))
    fetched = _parallel(lambda url: download(url, kept / "downloads"), urls, num_proc, "downloading")
    results = dict(zip(urls, fetched, strict=True))
    reasons = {}
    for number, row in remote:
        row["image"], reason = results[row["image"]]
        if reason:
            reasons[number] = reason
    return reasons


def image_faults(rows, kept, num_proc, *, bands=None):
    """Row number -> why its image cannot be used. Every image is decoded once; later calls use cached results."""
    present = [number for number, row in enumerate(rows) if row["image"] is not None]
    states = [_state(rows[number]["image"]) for number in present]
    how = [bands, find_spec("rasterio") is not None, states]
    path = kept / "checked" / f"{hashlib.sha256(json.dumps(how).encode()).hexdigest()}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        images = [rows[number]["image"] for number in present]
        found = list(_parallel(partial(image_fault, bands=bands), images, num_proc, "checking images"))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found), encoding="utf-8")
        unfinished.replace(path)
    return {number: fault for number, fault in zip(present, found, strict=True) if fault}


def image_fault(image, *, bands=None):
    """Why an image cannot be used, or None. PIL's `verify` misses truncated files; reading the pixels finds them."""
    try:
        read_image(image, bands=bands)
    except (OSError, ValueError) as error:
        reason = str(error.__cause__)
        return f"{UNREADABLE}: {reason.replace(str(image), image.name) if isinstance(image, Path) else reason}"
    return None


def _parallel(work, items, num_proc, what):
    """Map with threads, in order: decoding and downloading release the GIL."""
    if not items:
        return []
    with ThreadPoolExecutor(num_proc or os.cpu_count()) as pool:
        shown = tqdm(pool.map(work, items), total=len(items), desc=what, disable=len(items) < 1000)
        return list(shown)


def _state(image):
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    state = image.stat()
    return f"{image} {state.st_size} {state.st_mtime_ns}"


def fingerprint(rows, bands=None):
    """A hash of annotations, splits and images (files by size and time), so that any edit gives a new dataset."""
    digest = hashlib.sha256(repr(bands).encode() if bands else b"")
    for row in rows:
        digest.update(json.dumps([row["filename"], row["split"], row["captions"], _state(row["image"])]).encode())
    return digest.hexdigest()


def warn_of_shared_images(rows, groups):
    """Warn of files that are in several splits under different names: they leak training images into the test."""
    members = defaultdict(list)
    for row, group in zip(rows, groups, strict=True):
        members[group].append(row)
    shared = [each for each in members.values() if len({row["split"] for row in each}) > 1]
    if shared:
        first, *_, last = sorted(shared[0], key=lambda row: row["split"])
        logger.warning(
            "%d images are in more than one split under different names, such as %s (%s) and %s (%s): the files are "
            "the same. They are kept as they are distributed.",
            len(shared), first["filename"], first["split"], last["filename"], last["split"],
        )  # fmt: skip


def carve_missing_splits(rows, distributed, seed, groups):
    """Move a seeded tenth of the training rows to each missing test or validation split, with a warning.

    Rows of the same image (`groups`, a number for each row) stay together. A split that is distributed but has
    no valid row is not replaced.
    """
    total = sum(row["split"] == "train" for row in rows)
    for name in sorted(distributed - {row["split"] for row in rows}):
        logger.warning("No row of the %s split can be used: there is no such split.", name)
    for name in ("validation", "test"):
        train = defaultdict(list)
        for row, group in zip(rows, groups, strict=True):
            if row["split"] == "train":
                train[group].append(row)
        if name in distributed or len(train) < 2:
            continue
        images = list(train.values())
        wanted, count = max(1, round(total * SHARE_SET_ASIDE)), 0
        for chosen in np.random.default_rng(seed).permutation(len(images))[:-1]:
            if count >= wanted:
                break
            for row in images[chosen]:
                row["split"] = name
            count += len(images[chosen])
        logger.warning(
            "No %s split is distributed: %d of %d training images are set aside for it (seed %d).",
            name, count, total, seed,
        )  # fmt: skip


def published_counts(name, splits):
    """Differences from the published counts of a named benchmark; empty for other names."""
    if name not in BENCHMARKS:
        return []
    found = (
        sum(map(len, splits.values())),
        sum(len(of_one) for rows in splits.values() for of_one in rows["captions"]),
    )
    return [
        f"{name}: {count:,} {what}, as published."
        if count == published
        else f"{name}: {count:,} {what}; {published:,} are published: {count - published:+,}."
        for what, count, published in zip(("images", "captions"), found, BENCHMARKS[name][2:], strict=True)
    ]


# The command -------------------------------------------------------------------------------------------------------


def save_parquet(splits, folder, *, title, bad_rows=()):
    """Save parquet shards with the images' bytes, and a dataset card, for `datasets.load_dataset(folder)`.

    Returns:
        bool: whether anything was written; False if the folder already holds exactly these splits.

    Raises:
        ValueError: if the folder holds files that this function did not write.
    """
    output = PreparedFolder(folder, title)
    output.check()
    output.start()
    return output.save(splits, title=title, bad_rows=bad_rows)


def main(arguments=None):
    """Read, check, write and push; returns 0, or 1 after printing the reason."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("name_or_path", help="scenes, twins, a benchmark, a folder, file or archive, or user/name")
    parser.add_argument("--data_dir", help="folder, zip or tar of a named benchmark, as distributed; for a file of "
                        "annotations, the folder that image names are relative to")  # fmt: skip
    parser.add_argument("--output_dir", required=True, help="for parquet shards, dataset card and bad_rows.json")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output_dir, and the repository of "
                        "--push_to_hub, hold of a dataset: shards, card, bad_rows.json, report")  # fmt: skip
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="also push the dataset to this repository")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--image_column")
    parser.add_argument("--caption_column")
    parser.add_argument("--report", action="store_true", help="first write report.txt, report.json and report.png")
    parser.add_argument("--bands", help="bands to use as red, green and blue, from 1, such as 3,2,1")
    parser.add_argument("--on_bad_rows", default="stop", choices=ON_BAD_ROWS)
    parser.add_argument("--seed", type=int, default=0, help="for drawing splits that are not distributed")
    parser.add_argument("--num_proc", type=int, help="images read in parallel (default: all CPU cores)")
    parser.add_argument("--cache_dir")
    args = vars(parser.parse_args(arguments))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        prepare(**args)
    except (ValueError, OSError, HfHubHTTPError) as error:
        print(f"{error}{_writing_advice(error)}", file=sys.stderr)
        return 1
    return 0


def _writing_advice(error):
    """What to do about a full disk or a folder that is another user's; empty for other errors."""
    if not isinstance(error, OSError) or error.errno not in NOT_WRITTEN:
        return ""
    return (
        f". --output_dir and the cache ({datasets.config.HF_DATASETS_CACHE}, or that of --cache_dir) must be writable "
        "and have room; then repeat the command. Nothing unfinished is taken for complete."
    )


def report_collection(name_or_path, data_dir, *, title, image_column=None, caption_column=None, bands=None,
                      num_proc=None, cache_dir=None, **_):  # fmt: skip
    """Report on a collection as distributed, with its invalid examples: name of a file -> its content."""
    kept = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ieft"
    bands = parse_bands(bands) if isinstance(bands, str) else bands
    if name_or_path in SYNTHETIC:
        splits = load_retrieval_dataset(name_or_path, cache_dir=cache_dir)
        rows = [row | {"split": name, "image": row["image"]["bytes"]} for name, split in splits.items()
                for row in split.cast_column("image", datasets.Image(decode=False))]  # fmt: skip
        reasons = {}
    else:
        columns = {"image_column": image_column, "caption_column": caption_column}
        source = find_source(str(name_or_path), data_dir, columns, kept)[1]
        rows, reasons = source.rows, missing_images(source, kept, num_proc)
    _, bad = usable_rows(rows, image_faults(rows, kept, num_proc, bands=bands) | reasons)
    facts = measure_collection(rows, bad, bands=bands, num_proc=num_proc)
    return write_report(title, rows, facts)


def prepare(name_or_path, data_dir, *, output_dir, push_to_hub=None, private=None, report=False, overwrite=False,
            **options):  # fmt: skip
    """Run the command; arguments as its options. Nothing is read or written if something would be lost."""
    place = data_dir or name_or_path
    source = [name_or_path, os.path.abspath(place) if Path(place).exists() else place]
    told = {name: value for name, value in options.items() if name not in ("num_proc", "cache_dir")}
    output = PreparedFolder(output_dir, json.dumps([source, told], sort_keys=True))
    if not overwrite:
        output.check()
        if push_to_hub:
            output.check_remote(push_to_hub)
    title = Path(name_or_path).name
    files = report_collection(name_or_path, data_dir, title=title, **options) if report else {}
    if report:
        print(files["report.txt"].decode())
    try:
        splits, bad_rows = load_and_check(name_or_path, data_dir, **options)
    except BadRowsError as error:
        if output.is_complete():  # an earlier dataset is kept
            raise
        output.start(overwrite=overwrite)
        for name, content in (files | {"bad_rows.json": bad_rows_text(error.bad_rows)}).items():
            output.write(name, content)
        raise ValueError(f"{error}\nListed in {output.folder / 'bad_rows.json'}.") from error
    output.start(overwrite=overwrite)
    title = (push_to_hub or title).split("/")[-1]
    written = output.save(splits, title=title, bad_rows=bad_rows, overwrite=overwrite)
    for name, content in (files | {"bad_rows.json": bad_rows_text(bad_rows)}).items():
        output.write(name, content)
    for name, split in splits.items():
        print(f"{name}: {len(split):,} images, {sum(map(len, split['captions'])):,} captions")
    for line in published_counts(name_or_path, splits):
        print(line)
    print(f"{len(bad_rows)} bad rows; {output_dir} {'written' if written else 'holds these splits already'}")
    if push_to_hub:
        print(f"Pushed: {output.push(push_to_hub, private=private)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    sys.exit(main())
