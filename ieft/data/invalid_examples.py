"""Finds the examples of a collection that cannot be used, and says why. Files of the user are never changed."""

import json
import re
import reprlib
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from os.path import abspath
from pathlib import Path

MAX_WORDS = 1000  # a hundred times the usual; the network reads about 40 tokens
SHOWN = 10
BLANK = "a blank caption"
PUNCTUATION = "a caption of punctuation only"
CONTROL = "a caption with control characters"
NOT_TEXT = "a caption that is not text"
TOO_LONG = f"a caption of more than {MAX_WORDS:,} words"
NO_CAPTIONS = "no captions"
NOT_A_NAME = "a file name that is not text"
NAMED_TWICE = "named before"
TWO_SPLITS = "named before in another split"
MISSING = "no such image file"
PACKED = f"{MISSING}, but an archive beside the annotations"
AMBIGUOUS = "which image file is meant is not known"
UNREADABLE = "unreadable image"
NOT_FETCHED = "cannot be downloaded"
# Beginning of a reason -> remedy.
REMEDIES = {
    BLANK: "write the caption, or delete it",
    PUNCTUATION: "write the caption, or delete it",
    CONTROL: "save the annotations as UTF-8 text without control characters",
    NOT_TEXT: "captions must be strings, or lists of strings",
    TOO_LONG: "one caption is one sentence: look for captions run together",
    NOT_A_NAME: "give the file a name in UTF-8, and save the annotations as UTF-8",
    NO_CAPTIONS: "write captions for the image, or leave it out of the annotations",
    TWO_SPLITS: "keep the image in one split, since it would be tested on what was trained on",
    NAMED_TWICE: "put all captions of an image into one entry",
    PACKED: "unpack the archive, or pass it with the annotations in it",
    MISSING: "annotations and images must come from one source (RSICD is in circulation under two naming schemes)",
    AMBIGUOUS: "name the image with its folder, in the annotations",
    f"{UNREADABLE}: it has": "choose bands that there are with --bands",
    f"{UNREADABLE}: images of this kind": "install what reads them",
    f"{UNREADABLE}: Image size": "cut the image into tiles, or save it as a TIFF of tiles",
    UNREADABLE: "download or export the image again",
    NOT_FETCHED: "check the URL, or fetch the image by hand and name the file",
    "": "look at the image",
}

# Known faults of published benchmarks: name -> kind of fault, and the images that have it.
KNOWN_FAULTS = {
    "rsicd": (PUNCTUATION, {"bridge_218.jpg", "parking_211.jpg", "bridge_59.jpg"}),
    "rsitmd": (
        BLANK,
        {"mountain_2378.tif", "railwaystation_3254.tif", "storagetanks_4367.tif", "viaduct_4635.tif"},
    ),
}


@dataclass(frozen=True)
class BadRow:
    """One fault. `row` is counted from 0 in the order of the annotations; `dropped` says what is left out."""

    row: int
    filename: str
    split: str
    reason: str
    dropped: str
    remedy: str


class BadRowsError(ValueError):
    """Some examples are invalid; they are listed in `bad_rows` with their reasons. Nothing was prepared."""

    def __init__(self, bad_rows, source):
        super().__init__(describe(bad_rows, source, shown=len(bad_rows)))
        self.bad_rows = bad_rows


def check_captions(captions):
    """The valid captions, stripped, and a reason for each of the others."""
    usable, reasons = [], []
    for caption in captions:
        reason = caption_fault(caption)
        if reason:
            reasons.append(reason)
        else:
            usable.append(caption.strip())
    return usable, reasons if captions else [NO_CAPTIONS]


def caption_fault(caption):
    """Why a caption cannot be used, or None."""
    if not isinstance(caption, str):
        return f"{NOT_TEXT}: {show(caption)!r}"
    if not caption.strip():
        return BLANK
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" for letter in caption):
        return f"{CONTROL}: {caption[:60]!r}"
    if not any(letter.isalnum() for letter in caption):
        return f"{PUNCTUATION}: {caption.strip()[:60]!r}"
    words = len(caption.split())
    return f"{TOO_LONG}: {words:,}" if words > MAX_WORDS else None


def show(value):
    """A value from a file, shortened for a message, whatever its size or depth of nesting."""
    return reprlib.repr(value)[:200].encode("utf-8", "backslashreplace").decode()


def name_fault(row):
    """Why the name or path of a row's image cannot be stored as text, or None."""
    name = f"{row['filename']}{row['image'] if isinstance(row.get('image'), Path) else ''}"
    bad = any(unicodedata.category(letter) == "Cs" or letter == "\0" for letter in name)
    return f"{NOT_A_NAME}: {ascii(row['filename'])[:60]}" if bad else None


def usable_rows(rows, image_reasons):
    """The rows with a valid image and at least one valid caption, and all faults.

    Args:
        rows: dicts with `filename`, `split`, `captions`.
        image_reasons: row number -> why its image cannot be used.
    """
    usable, bad, seen = [], [], {}
    for number, row in enumerate(rows):
        captions, caption_reasons = check_captions(row["captions"])
        image_reason = image_reasons.get(number) or name_fault(row) or _named_before(row, seen)
        dropped = "caption" if captions else "image and captions"
        bad += make_bad_rows(number, row, caption_reasons, dropped)
        if image_reason:
            bad += make_bad_rows(number, row, [image_reason], "image and captions")
        elif captions:
            usable.append(row | {"captions": captions})
    return usable, bad


def _named_before(row, seen):
    """A reason if an earlier row has the same file name, or the same file under another name; else None."""
    image = row.get("image")
    keys = [row["filename"], *([Path(abspath(image))] if isinstance(image, Path) else [])]
    before = next((seen[key] for key in keys if key in seen), None)
    if before is None:
        seen.update(dict.fromkeys(keys, row))
        return None
    other = f", as {before['filename']}" if before["filename"] != row["filename"] else ""
    if before["split"] == row["split"]:
        return f"{NAMED_TWICE}{other}"
    return f"{TWO_SPLITS}: {before['split']} and {row['split']}{other}"


def known_faults(name, bad_rows):
    """The faults that a published benchmark is known to have; only others stop a run.

    Args:
        name: the benchmark, or a path or Hub id that ends with its name.
    """
    kind, images = KNOWN_FAULTS.get(re.split(r"[/\\]", str(name))[-1].lower(), ("", ()))
    return [bad for bad in bad_rows if Path(bad.filename).name in images and bad.reason.split(":")[0] == kind]


def make_bad_rows(number, row, reasons, dropped):
    """One `BadRow` for each reason, with its remedy."""
    remedies = [next(remedy for start, remedy in REMEDIES.items() if reason.startswith(start)) for reason in reasons]
    return [
        BadRow(number, row["filename"], row["split"], reason, dropped, remedy)
        for reason, remedy in zip(reasons, remedies, strict=True)
    ]


def describe(bad_rows, source, *, shown=SHOWN):
    """The report: a line for each of the first `shown` faults, then counts by reason with remedies."""
    lines = [f"{len({bad.row for bad in bad_rows})} rows of {source} cannot be used as they are:"]
    lines += [f"  row {bad.row}, {bad.filename}: {bad.reason}" for bad in bad_rows[:shown]]
    if len(bad_rows) > shown:
        lines.append(f"  and {len(bad_rows) - shown} more")
    kinds = Counter((bad.reason.split(":")[0], bad.remedy) for bad in bad_rows)
    lines += [f"{count} x {kind}: {remedy}." for (kind, remedy), count in kinds.most_common()]
    return "\n".join([*lines, "Fix them, or leave them out with --on_bad_rows skip."])


def bad_rows_text(bad_rows):
    """The text of `bad_rows.json`: a list of objects, empty if there are no faults."""
    return json.dumps([asdict(bad) for bad in bad_rows], indent=2) + "\n"


def save_bad_rows(bad_rows, folder):
    """Write `bad_rows.json` to a folder and return its path."""
    path = Path(folder) / "bad_rows.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bad_rows_text(bad_rows), encoding="utf-8")
    return path
