"""Every caption dataset as one `DatasetDict`.

In: the name of a dataset and the folder it was distributed in, or any folder in that format. Out: the splits `train`,
`validation` and `test` with the columns `image`, `filename` and `captions`. It knows nothing of networks or tensors,
and never changes what the user has.

The distributed format (Karpathy's): a JSON file with `images`, each with `filename`, `split` and `sentences` of `raw`,
beside a folder of images.
"""

import hashlib
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ieft.scenes import SPLITS, draw_scene

logger = logging.getLogger(__name__)

SCENES_SEED = 2023
VALIDATION_SHARE = 0.1
ON_BAD_ROWS = ("stop", "skip")
# Name -> where the dataset is distributed.
DISTRIBUTED_AT = {
    "rsicd": "https://github.com/201528014227051/RSICD_optimal",
    "rsitmd": "https://github.com/xiaoyuan1996/AMFMN",
    "ucm": "https://github.com/201528014227051/RSICD_optimal (UCM-Captions)",
    "sydney": "https://github.com/201528014227051/RSICD_optimal (Sydney-Captions)",
}
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
FEATURES = {
    "image": datasets.Image(),
    "filename": datasets.Value("string"),
    "captions": datasets.List(datasets.Value("string")),
}


class BadRowsError(ValueError):
    """Rows that cannot be used, each with its reason; nothing was prepared."""


def load_retrieval_dataset(name_or_path, data_dir=None, *, seed=0, on_bad_rows="stop", scenes_seed=SCENES_SEED,
                           cache_dir=None):  # fmt: skip
    """The splits of a dataset.

    Args:
        name_or_path: scenes, rsicd, rsitmd, ucm, sydney, or a folder in their format.
        data_dir: the distributed folder of a named dataset.
        seed: draws the validation split where none is distributed.
        on_bad_rows: "stop" raises before anything is prepared; "skip" leaves such rows out and says so.
        scenes_seed: which synthetic scenes are drawn.
        cache_dir: where prepared splits are kept; None is the `datasets` library's own place.

    Returns:
        DatasetDict: `train`, `validation`, `test` with `image`, `filename`, `captions` (a list of sentences).

    Raises:
        ValueError: for an unknown name, a missing folder, or a file of another shape.
        BadRowsError: for rows without an image or captions.
    """
    if on_bad_rows not in ON_BAD_ROWS:
        raise ValueError(f"on_bad_rows must be one of {', '.join(ON_BAD_ROWS)}; got {on_bad_rows!r}.")
    if name_or_path == "scenes":
        builder = ScenesBuilder(config_name="scenes", scenes_seed=scenes_seed, cache_dir=cache_dir)
    else:
        name, folder = _find_folder(name_or_path, data_dir)
        source = read_caption_folder(folder, name)
        rows = usable_rows(source, on_bad_rows)
        if not any(row["split"] == "validation" for row in rows):
            carve_validation(rows, seed)
        builder = CaptionFolderBuilder(config_name=name, sources=fingerprint(rows), cache_dir=cache_dir)
        builder.rows = rows
    builder.download_and_prepare()
    return builder.as_dataset()


def _find_folder(name_or_path, data_dir):
    """The name of a dataset and its folder, or an error that says what to do."""
    if name_or_path in DISTRIBUTED_AT:
        if data_dir is None:
            raise ValueError(
                f"{name_or_path} has to be downloaded first, from {DISTRIBUTED_AT[name_or_path]}. Pass the folder "
                "that holds its annotation file and its images as --data_dir."
            )
        folder = Path(data_dir)
    else:
        folder = Path(name_or_path)
    if not folder.is_dir():
        names = ", ".join(["scenes", *DISTRIBUTED_AT])
        raise ValueError(f"A dataset's name ({names}) or an existing folder expected; got {str(folder)!r}.")
    name = name_or_path if name_or_path in DISTRIBUTED_AT else folder.resolve().name
    return name, folder.resolve()


# Reading a distributed folder --------------------------------------------------------------------------------------


@dataclass
class CaptionFolder:
    """A distributed folder as read: its annotation file, where images were looked for, and its rows."""

    annotations: Path
    image_folder: Path
    rows: list[dict]  # filename, split, captions, path (None where there is no such image)


def read_caption_folder(folder, name):
    """Read the annotation file of a distributed folder and find the image of each row.

    Raises:
        ValueError: where there is no annotation file, or it is not of the distributed shape.
    """
    annotations = _find(folder, [each.format(name=name) for each in ANNOTATION_NAMES], "annotation file")
    image_folder = _find(folder, [each.format(name=name) for each in IMAGE_FOLDER_NAMES], "image folder")
    paths = {path.name.lower(): path for path in sorted(image_folder.iterdir()) if path.is_file()}
    rows = []
    for position, entry in enumerate(_read_entries(annotations)):
        try:
            row = {
                "filename": str(entry["filename"]),
                "split": SPLIT_NAMES[entry["split"]],
                "captions": [str(sentence["raw"]).strip() for sentence in entry["sentences"]],
            }
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{annotations}: image {position} must have a `filename`, a `split` of {', '.join(SPLIT_NAMES)} and "
                f"`sentences` of `raw`; found {json.dumps(entry)[:200]}."
            ) from error
        rows.append(row | {"path": paths.get(Path(row["filename"]).name.lower())})
    return CaptionFolder(annotations, image_folder, rows)


def _find(folder, names, what):
    existing = {path.name.lower(): path for path in sorted(folder.iterdir())} | {".": folder}
    for name in names:
        if name.lower() in existing:
            return existing[name.lower()]
    raise ValueError(
        f"{folder} holds no {what}: expected one of {', '.join(names)}; found {', '.join(existing)[:300]}."
    )


def _read_entries(annotations):
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{annotations} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list) or not content["images"]:
        raise ValueError(f"{annotations} must be an object with a list `images` that is not empty.")
    return content["images"]


def usable_rows(source, on_bad_rows):
    """Rows with an image and captions that can be read.

    Raises:
        BadRowsError: with `on_bad_rows` "stop", where there are others; the message counts them, and names some.
    """
    bad, rows = [], []
    seen = set()
    for row in source.rows:
        reasons = _faults(row, seen)
        bad += [(row["filename"], reason) for reason in reasons]
        captions = [caption for caption in row["captions"] if caption]
        if captions and not any(reason != BLANK for reason in reasons):
            rows.append(row | {"captions": captions})
    if bad and (on_bad_rows == "stop" or not rows):
        raise BadRowsError(_report(source, bad))
    if bad:
        logger.warning(_report(source, bad))
    return rows


BLANK = "a blank caption"


def _faults(row, seen):
    faults = [BLANK] * sum(not caption for caption in row["captions"])
    if not row["captions"]:
        faults.append("no captions")
    if row["filename"] in seen:
        faults.append("named before in the annotation file")
    seen.add(row["filename"])
    if row["path"] is None:
        faults.append("no such image file")
    else:
        faults += _image_fault(row["path"])
    return faults


def _image_fault(path):
    """PIL's `verify` misses truncated files; reading the pixels finds them."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return [f"unreadable image: {error}"]
    return []


def _report(source, bad, shown=10):
    missing = sum(reason == "no such image file" for _, reason in bad)
    lines = [f"{len(bad)} rows of {source.annotations} cannot be used as they are:"]
    lines += [f"  {filename}: {reason}" for filename, reason in bad[:shown]]
    if len(bad) > shown:
        lines.append(f"  and {len(bad) - shown} more")
    if missing:
        lines.append(
            f"{missing} of {len(source.rows)} images are missing from {source.image_folder}. Annotation file and "
            "images must come from one source (RSICD is in circulation under two naming schemes)."
        )
    return "\n".join([*lines, "Mend them, or leave them out with --on_bad_rows skip."])


def carve_validation(rows, seed):
    """Move a seeded tenth of the training rows to a validation split, and say so."""
    train = [row for row in rows if row["split"] == "train"]
    chosen = np.random.default_rng(seed).permutation(len(train))[: max(1, round(len(train) * VALIDATION_SHARE))]
    for row in chosen:
        train[row]["split"] = "validation"
    logger.warning(
        "No validation split is distributed: %d of %d training images are set aside for it (seed %d).",
        len(chosen), len(train), seed,
    )  # fmt: skip


def fingerprint(rows):
    """A hash of the annotations, the splits and the image files' sizes and times: an edit is a new dataset."""
    digest = hashlib.sha256()
    for row in rows:
        state = row["path"].stat()
        digest.update(json.dumps([*map(str, row.values()), state.st_size, state.st_mtime_ns]).encode())
    return digest.hexdigest()


# Builders ------------------------------------------------------------------------------------------------------------


@dataclass
class CaptionFolderConfig(datasets.BuilderConfig):
    """`sources` is the fingerprint of the rows: part of the cache's key, which the library would not make of it."""

    sources: str = ""


class CaptionFolderBuilder(datasets.GeneratorBasedBuilder):
    """Rows read from a distributed folder. Images stay where they are, referred to by absolute path."""

    BUILDER_CONFIG_CLASS = CaptionFolderConfig
    rows: list[dict]

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(FEATURES))

    def _split_generators(self, dl_manager):
        present = {row["split"] for row in self.rows}
        names = [name for name in ("train", "validation", "test") if name in present]
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name in names]

    def _generate_examples(self, split):
        for key, row in enumerate(row for row in self.rows if row["split"] == split):
            yield key, {"image": str(row["path"]), "filename": row["filename"], "captions": row["captions"]}


@dataclass
class ScenesConfig(datasets.BuilderConfig):
    """`scenes_seed` chooses the scenes."""

    scenes_seed: int = SCENES_SEED


class ScenesBuilder(datasets.GeneratorBasedBuilder):
    """Synthetic aerial scenes, drawn on the spot."""

    VERSION = datasets.Version("1.0.1")  # raise it when scenes change, so that no old ones come from the cache
    BUILDER_CONFIG_CLASS = ScenesConfig

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(FEATURES))

    def _split_generators(self, dl_manager):
        starts = np.cumsum([0, *SPLITS.values()])
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"start": int(start), "count": count})
            for start, (name, count) in zip(starts, SPLITS.items(), strict=False)
        ]

    def _generate_examples(self, start, count):
        for index in range(start, start + count):
            scene = draw_scene(self.config.scenes_seed, index)
            encoded = io.BytesIO()
            scene.image.save(encoded, "PNG")
            image = {"path": None, "bytes": encoded.getvalue()}
            yield index, {"image": image, "filename": f"scene_{index:05d}.png", "captions": scene.captions}
