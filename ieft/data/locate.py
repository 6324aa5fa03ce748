"""Finds the image file that an annotation names, even if it was written on another system or in another folder."""

import logging
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

logger = logging.getLogger(__name__)

JUNK_NAMES = {".ds_store", "thumbs.db", "desktop.ini", "__macosx", ".spotlight-v100", ".trashes"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",  # of Karpathy's COCO: the rest of val, used for training in all publications
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
SHOWN = 3


def is_junk(name):
    """Whether a file or folder is metadata of macOS or Windows instead of content."""
    return name.lower() in JUNK_NAMES or name.startswith("._")


def split_of_text(text):
    """The split that a text names, or None if it names none or more than one."""
    found = {SPLIT_NAMES[word] for word in re.findall(r"[a-z]+", text.lower()) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def walk_files(folder):
    """Files below a folder. Linked folders are followed, after all others, and no folder is read twice."""
    folders, links, seen = [Path(folder)], [], set()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            logger.warning("%s cannot be searched for files: %s. What it holds is left out.", current, error.strerror)
            continue
        for entry in entries:
            if is_junk(entry.name):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself
                logger.warning("%s is left out: %s.", entry.path, error.strerror)
                continue
            if is_folder:
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif is_file:
                yield Path(entry.path)


class ImageFinder:
    """Finds files below a folder by the names in annotations.

    A name may have Windows separators, other case, another Unicode normal form, or leading folders that do not exist
    (a path on another machine). Ambiguous names are refused.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self._by_name = None
        self._folders = set()

    def find(self, name):
        """The file or None, and the reason for None, if there is another than that the file does not exist.

        Args:
            name: as in the annotation, relative to the folder or absolute.
        """
        if not name.strip() or "\0" in name:
            return None, None
        for exact in (name, name.replace("\\", "/")):
            path = file_at(self.folder / exact)
            if path:
                return path, None
        wanted = [part for part in name.strip().replace("\\", "/").split("/") if part not in ("", ".")]
        if not wanted or ".." in wanted:
            return None, None
        if self._by_name is None:
            self._index()
        return self._find_suffix(wanted)

    def _index(self):
        self._by_name = defaultdict(list)
        for path in walk_files(self.folder):
            parts = path.relative_to(self.folder).parts
            self._by_name[_key(parts[-1])].append(parts)
            self._folders.update(_key(part) for part in parts[:-1])

    def _find_suffix(self, wanted):
        candidates = self._by_name.get(_key(wanted[-1]), [])
        keys = [_key(part) for part in wanted]
        for start in range(len(wanted)):
            found = [parts for parts in candidates if [_key(part) for part in parts[-len(keys) :]] == keys]
            whole = [parts for parts in found if len(parts) == len(keys)]
            exact = [parts for parts in found if list(parts[-len(keys) :]) == wanted[start:]]
            for chosen in (whole, exact, found):
                if len(chosen) == 1:
                    if _other_split(wanted[:start], chosen[0][: -len(keys)]):
                        return None, None
                    return self.folder.joinpath(*chosen[0]), None
            if found:
                shown = ", ".join(sorted("/".join(parts) for parts in found)[:SHOWN])
                return None, f"{len(found)} files could be meant: {shown}"
            if len(keys) > 1 and keys[0] in self._folders:
                return None, None  # the folder exists without the file: a file of another folder would be a guess
            keys = keys[1:]
        return None, None


def file_at(path):
    """The path if it is a file, else None; also None for invalid paths."""
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):
        return None


def _key(name):
    return unicodedata.normalize("NFC", name).casefold()


def _other_split(named, found):
    """Whether the folders in the annotation and those of the found file name different splits."""
    ours, theirs = split_of_text("/".join(named)), split_of_text("/".join(found))
    return bool(ours and theirs and ours != theirs)
