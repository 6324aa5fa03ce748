"""Writes a prepared dataset to disk or to the Hub: parquet shards, a dataset card, and a list of what was left out.

A folder or repository that holds anything else is refused before any work. A folder in preparation records its run, so
that the same run can resume after an interruption and another run does not replace it.
"""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

from datasets.table import embed_table_storage
from filelock import FileLock
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

MANIFEST = ".sources"
LOCK = ".lock"
UNFINISHED = ".unfinished"
ROWS_IN_A_SHARD = 5000
OWN_FILES = ("README.md", "bad_rows.json", "report.txt", "report.json", "report.png")
REPLACE = "Choose another --output_dir, or pass --overwrite to replace them."


class PreparedFolder:
    """The output folder of one run.

    Args:
        folder: created when something is written.
        run: text that identifies what the run prepares; equal text means the same run.
    """

    def __init__(self, folder, run):
        self.folder = Path(folder)
        self.run = hashlib.sha256(run.encode()).hexdigest()

    def check(self):
        """Check that the folder holds only files of this run, without changing it.

        Raises:
            ValueError: names the other files, and the option to pass.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: --output_dir must be a folder.")
        present = self._present()
        if not present:
            return
        manifest = self._manifest()
        if manifest is None:
            raise ValueError(
                f"{self.folder} holds files that this command did not make ({_shown(present)}). Nothing was changed. "
                f"{REPLACE}"
            )
        foreign = [name for name in present if name.startswith("data/") and name not in manifest["files"]]
        edited = [
            name for name, mark in manifest["files"].items() if name in present and _mark(self.folder / name) != mark
        ]
        if foreign or edited:
            what = "were added to it" if foreign else "were edited"
            raise ValueError(
                f"{self.folder} is a prepared dataset, and files of it {what} since ({_shown(foreign or edited)}). "
                f"Nothing was changed. {REPLACE}"
            )
        own = [name for name in present if name in OWN_FILES and name not in manifest["files"]]
        if own:
            raise ValueError(
                f"{self.folder} holds files that this command did not make ({_shown(own)}). Nothing was changed. "
                f"{REPLACE}"
            )
        begun = manifest["complete"] or any(name.startswith("data/") for name in present)
        if begun and manifest["run"] not in (None, self.run):
            raise ValueError(
                f"{self.folder} holds the dataset of another run: another source, or other options. Nothing was "
                f"changed. {REPLACE}"
            )

    def start(self, *, overwrite=False):
        """Record this run in the folder, before anything else is written to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self._manifest() or {"files": {}}
        if overwrite:
            known = {name: _mark(self.folder / name) for name in self._present() if _is_own(name)}
            manifest = {"files": known, "complete": manifest.get("complete")}
        self._save({"complete": None} | manifest | {"run": self.run})

    def is_complete(self):
        """Whether the folder holds a complete dataset."""
        return bool((self._manifest() or {}).get("complete"))

    def lock(self):
        """A lock, so that only one process at a time writes to the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / LOCK)

    def write(self, name, content):
        """Record a file of this run, and write it atomically: a killed run leaves it as recorded, or none."""
        path = self.folder / name
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.unlink(missing_ok=True)
        manifest = self._manifest() or {"run": self.run, "files": {}, "complete": None}
        manifest["files"][name] = _mark(unfinished)
        self._save(manifest)
        unfinished.replace(path)

    def save(self, splits, *, title, bad_rows=(), overwrite=False):
        """Write shards and card, unless the folder already holds exactly these splits.

        Returns:
            bool: whether anything was written.

        Raises:
            ValueError: if the folder holds other splits, because the source was edited.
        """
        key = " ".join([*splits, *(split._fingerprint for split in splits.values())])
        with self.lock():
            manifest = self._manifest() or {"files": {}, "complete": None}
            shards = [name for name in manifest["files"] if name.startswith("data/")]
            whole = all((self.folder / name).is_file() for name in shards)
            if manifest["complete"] == key and whole and not overwrite:
                return False
            if manifest["complete"] and manifest["complete"] != key and not overwrite:
                raise ValueError(
                    f"{self.folder} holds splits of other rows: the source or its images were edited since. Nothing "
                    f"was changed. {REPLACE}"
                )
            self._write_shards(splits)
            self.write("README.md", dataset_card(splits, title, bad_rows))
            manifest = self._manifest()
            self._save(manifest | {"run": self.run, "complete": key})
        return True

    def _write_shards(self, splits):
        """Write all shards, then move them into place: a killed run leaves the old ones or none."""
        unfinished, data = self.folder / UNFINISHED, self.folder / "data"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, split in splits.items():
            count = -(-len(split) // ROWS_IN_A_SHARD)
            for number in range(count):
                table = split.shard(count, number, contiguous=True).with_format("arrow")
                table = table.map(embed_table_storage, batched=True, batch_size=200, keep_in_memory=True)
                table.to_parquet(unfinished / f"{name}-{number:05d}-of-{count:05d}.parquet", batch_size=200)
        manifest = self._manifest() or {"run": self.run, "files": {}}
        others = {name: mark for name, mark in manifest["files"].items() if not name.startswith("data/")}
        new = {f"data/{path.name}": _mark(path) for path in sorted(unfinished.iterdir())}
        self._save(manifest | {"complete": None, "files": manifest["files"] | new})
        for path in data.glob("*.parquet"):
            path.unlink()
        data.mkdir(exist_ok=True)
        for path in sorted(unfinished.iterdir()):
            path.replace(data / path.name)
        unfinished.rmdir()
        self._save(manifest | {"complete": None, "files": others | new})

    def check_remote(self, repo_id):
        """Check that a repository on the Hub holds only files that this run pushed.

        Raises:
            ValueError: with the remedy.
        """
        api = HfApi()
        try:
            files = set(api.list_repo_files(repo_id, repo_type="dataset")) - {".gitattributes"}
        except RepositoryNotFoundError:
            return
        if not files:
            return
        fetch = partial(api.hf_hub_download, repo_id, repo_type="dataset")
        manifest = _read_manifest(Path(fetch(MANIFEST))) if MANIFEST in files else {"run": None, "files": {}}
        remedy = "Nothing was changed. Push to another repository, or pass --overwrite to replace its dataset."
        if manifest["run"] != self.run:
            raise ValueError(
                f"{repo_id} on the Hub holds files that this run did not push ({_shown(sorted(files))}). {remedy}"
            )
        edited = [
            name for name in OWN_FILES if name in files and _mark(Path(fetch(name))) != manifest["files"].get(name)
        ]
        edited += sorted(name for name in files if name.startswith("data/") and name not in manifest["files"])
        if edited:
            raise ValueError(
                f"{repo_id} on the Hub was edited since this run pushed to it ({_shown(edited)}). {remedy}"
            )

    def push(self, repo_id, *, private=None):
        """Push the files of this run as one commit, replacing `data`; returns the URL of the commit."""
        api = HfApi()
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        names = [*self._manifest()["files"], MANIFEST]
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=self.folder,
            allow_patterns=names,
            delete_patterns=["data/*", *OWN_FILES],
        )
        return commit.commit_url

    def _present(self):
        """Files of the folder, without those of the file system and of this class."""
        if not self.folder.is_dir():
            return []
        names = (path.relative_to(self.folder).as_posix() for path in sorted(self.folder.rglob("*")) if path.is_file())
        hidden = (MANIFEST, LOCK, f"{UNFINISHED}/", ".DS_Store")
        return [name for name in names if not name.startswith(hidden)]

    def _manifest(self):
        path = self.folder / MANIFEST
        return _read_manifest(path, self.folder) if path.is_file() else None

    def _save(self, manifest):
        unfinished = self.folder / f"{MANIFEST}.{os.getpid()}"
        unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / MANIFEST)


def _read_manifest(path, folder=None):
    """The content of a manifest; manifests of earlier versions hold only the key of the splits."""
    text = path.read_text(encoding="utf-8")
    try:
        manifest = json.loads(text)
        if {"run", "files", "complete"} <= set(manifest):
            return manifest
    except ValueError:
        pass
    names = [f"data/{each.name}" for each in (folder / "data").glob("*.parquet")] if folder else []
    names += [name for name in OWN_FILES if folder and (folder / name).is_file()]
    return {"run": None, "complete": text.strip(), "files": {name: _mark(folder / name) for name in names}}


def _mark(path):
    """A mark that detects edits: the hash of a small file, the size of a shard."""
    if path.suffix == ".parquet":
        return path.stat().st_size
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_own(name):
    return name in OWN_FILES or (name.startswith("data/") and name.endswith(".parquet"))


def _shown(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def dataset_card(splits, title, bad_rows=()):
    """The dataset card, with the metadata of the splits."""
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    metadata = DatasetCardData(
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["remote-sensing", "image-text-retrieval"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    sizes = "\n".join(
        f"| {name} | {len(split):,} | {sum(map(len, split['captions'])):,} |" for name, split in splits.items()
    )
    left_out = f"\n{len(bad_rows)} faults were left out; `bad_rows.json` lists them.\n" if bad_rows else ""
    return str(
        DatasetCard(
            f"---\n{metadata.to_yaml()}\n---\n\n# {title}\n\nImages and their captions, prepared for image-text "
            f"retrieval with IEFT.\n\n| split | images | captions |\n| --- | --- | --- |\n{sizes}\n{left_out}\n"
            "Columns: `image`, `filename`, `captions` (a list of sentences). The licence is that of the images and "
            "captions it was made from.\n"
        )
    )
