"""An archive's images by their embeddings: shortlist from a vector store, re-rank with the network.

In: an IEFT checkpoint with contrastive heads, its processor, image files; then captions or images as queries. Out: a
LanceDB table, and hits as dicts. It knows nothing of terminals, pages or training.

The table's address goes to LanceDB as it is: a folder, or object storage such as `s3://bucket/prefix`. A batch of
images is one transaction, and a file that is there with the same content is not embedded again: an addition that was
killed is run again and goes on. Two-stage retrieval: Miech et al., "Thinking Fast and Slow: Efficient Text-to-Visual
Retrieval with Transformers", CVPR 2021.
"""

import hashlib
import re
from datetime import datetime, timezone
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import torch
from lancedb.index import IvfPq
from PIL import Image
from torch.utils.data import Dataset

from ieft.ranking import fingerprint, score_pairs
from processing_ieft import open_picture

TABLE = "images"
CHECKPOINT = b"ieft_checkpoint"  # in the table's schema: the fingerprint of the checkpoint that made it
GEOTIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp", *GEOTIFF_SUFFIXES)
IMAGES_AT_ONCE = 64
FEWEST_FOR_VECTOR_INDEX = 50_000  # below, every vector is compared, in milliseconds and exactly
PARTITION_ROWS = 1024
MAX_WHERE = 10_000  # characters
# What may stand before a bracket in a filter: no function that makes long strings, which would fill the memory.
WHERE_WORDS = frozenset(
    "abs and any between by cast ceil contains date date_part date_trunc else ends_with exists extract floor ilike in "
    "interval is length like lower not now or regexp_like round starts_with strpos then timestamp to_timestamp trim "
    "try_cast upper when".split()
)
PROBES, REFINE = 80, 10  # partitions looked into; candidates re-scored by their full vectors, per hit
METADATA = {
    "file": pa.string(), "content": pa.string(), "bytes": pa.int64(), "time": pa.timestamp("ms", "UTC"),
    "width": pa.int32(), "height": pa.int32(), "west": pa.float64(), "south": pa.float64(), "east": pa.float64(),
    "north": pa.float64(), "crs": pa.string(),
}  # fmt: skip


class ImageIndex:
    """The images of an archive, one row each, that captions and images are looked up in."""

    def __init__(self, uri, model, *, processor, create=False, storage_options=None):
        """Open the index at `uri`, or with `create` begin one where there is none.

        Args:
            model: an `IeftForImageTextRetrieval` with contrastive heads.
            storage_options: credentials and settings of object storage, as LanceDB takes them.

        Raises:
            ValueError: for a model without contrastive heads, or another one than made the index.
            FileNotFoundError: where there is no index.
        """
        if not model.config.contrastive_dim:
            raise ValueError(
                "A checkpoint with contrastive heads expected (contrastive_dim above 0); this one has none. Train it "
                "with run_retrieval.py --contrastive_weight 1."
            )
        self.model, self.processor = model.eval(), processor
        self.checkpoint = fingerprint_checkpoint(model, processor)
        database = lancedb.connect(str(uri), storage_options=storage_options)
        if create:
            self.table = database.create_table(TABLE, schema=self._schema(), exist_ok=True)
        elif TABLE in database.list_tables().tables:
            self.table = database.open_table(TABLE)
        else:
            raise FileNotFoundError(f"No index at {uri}: make one with ieft-search index ARCHIVE --index {uri}.")
        made_by = (self.table.schema.metadata or {}).get(CHECKPOINT, b"").decode()
        if made_by != self.checkpoint:
            raise ValueError(
                f"The index at {uri} was made by the checkpoint {made_by[:12]}; this one is {self.checkpoint[:12]}. "
                "Their embeddings cannot be compared: take that checkpoint, or make another index."
            )

    def _schema(self):
        vector = pa.field("vector", pa.list_(pa.float32(), self.model.config.contrastive_dim))
        fields = [pa.field(name, kind) for name, kind in METADATA.items()]
        return pa.schema([*fields, vector], metadata={CHECKPOINT: self.checkpoint.encode()})

    def __len__(self):
        return self.table.count_rows()

    def add(self, files, *, batch_size=IMAGES_AT_ONCE):
        """Embed images and keep them, a batch at a time; a file whose content changed takes its old row's place.

        Returns:
            dict: `added` and `unchanged`, how many; `unreadable`, a dict of file -> why.
        """
        files = list(dict.fromkeys(str(Path(file).resolve()) for file in files))
        not_text = [file for file in files if _is_not_text(file)]
        files = [file for file in files if file not in not_text]
        report = {
            "added": 0,
            "unchanged": 0,
            "unreadable": dict.fromkeys(not_text, "its name is not UTF-8: rename it"),
        }
        for first in range(0, len(files), batch_size):
            self._add_batch(files[first : first + batch_size], report)
        return report

    def _add_batch(self, files, report):
        known = {row["file"]: row["content"] for row in self._select(_any_of(files), ["file", "content"])}
        rows, pictures = [], []
        for file in files:
            try:
                content = _digest(file)
                if known.get(file) == content:
                    report["unchanged"] += 1
                    continue
                picture = read_picture(file)
                rows.append({"content": content, **_describe(file, picture)})
                pictures.append(np.asarray(self.processor.image_processor.fit_square(picture)))
            except (OSError, ValueError) as error:
                report["unreadable"][file] = str(error)
        if rows:
            vectors = self.embed_images([Image.fromarray(square) for square in pictures])
            rows = [row | {"vector": vector} for row, vector in zip(rows, vectors, strict=True)]
            table = pa.Table.from_pylist(rows, schema=self.table.schema)
            merge = self.table.merge_insert("file").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(table)  # one transaction
            report["added"] += len(rows)

    def optimize(self):
        """Gather what small additions left scattered; from 50,000 images on, keep a vector index up to date."""
        if len(self) >= FEWEST_FOR_VECTOR_INDEX and not self.table.list_indices():
            width = self.model.config.contrastive_dim
            config = IvfPq(
                distance_type="dot",
                num_partitions=len(self) // PARTITION_ROWS,
                num_sub_vectors=width // 8 if width % 8 == 0 else 1,
            )
            self.table.create_index("vector", config=config)
        self.table.optimize()

    def delete(self, files):
        """Take files out of the index; the files themselves stay. Gives how many were there."""
        files = [file for file in (str(Path(file).resolve()) for file in files) if not _is_not_text(file)]
        return self.table.delete(_any_of(files)).num_deleted_rows if files else 0

    def rows(self, where=None, *, columns=tuple(METADATA)):
        """What is known of the images that `where`, an SQL expression over the columns, holds for; all without one.

        Raises:
            ValueError: for an expression that is none, or does more than compare.
        """
        return self._select(check_where(where), columns)

    def _select(self, where, columns):
        return _fetch(self.table.search().select(list(columns)), where)

    @torch.no_grad()
    def embed_images(self, images):
        """PIL images -> unit vectors (I, E)."""
        pixels = self.processor(images=images)["pixel_values"].to(self.model.device)
        return self.model.get_image_features(pixels).float().cpu().numpy()

    @torch.no_grad()
    def embed_caption(self, caption):
        """A sentence -> a unit vector (E,)."""
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("A caption to look for expected; got an empty one.")
        tokens = self.processor(text=[caption]).to(self.model.device)
        return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"])[0].float().cpu().numpy()

    def shortlist(self, vector, top_k=32, *, where=None):
        """The `top_k` nearest images, best first.

        Args:
            vector: (E,) of a caption or an image.
            where: an SQL expression over the columns, held before the search: `"north > 48 AND width >= 256"`.

        Returns:
            list: the columns but the vector, and `similarity`, in [-1, 1].
        """
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more; got {top_k}.")
        query = self.table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector")
        query = query.distance_type("dot").nprobes(PROBES).refine_factor(REFINE)
        query = query.select([*METADATA, "_distance"]).limit(top_k)
        hits = _fetch(query, check_where(where), prefilter=True)
        return [hit | {"similarity": 1 - hit.pop("_distance")} for hit in hits]

    def search(self, caption, *, top_k=10, rerank_top_k=32, where=None):
        """Images for a sentence: a shortlist by embedding, its first `rerank_top_k` re-ranked by the network.

        Returns:
            list: as `shortlist`, with `rank` from 1, `stage`, "re-ranked" or "shortlist", and `score`, the network's
            for re-ranked ones and the similarity for others, which always follow them.

        Raises:
            FileNotFoundError: for a file of the shortlist that is no longer there.
        """
        hits = self.shortlist(self.embed_caption(caption), max(top_k, rerank_top_k), where=where)
        first, rest = hits[:rerank_top_k], hits[rerank_top_k:]
        for hit, score in zip(first, self._score(caption, first), strict=True):
            hit.update(score=float(score), stage="re-ranked")
        first.sort(key=lambda hit: -hit["score"])
        return _ranked([*first, *rest])[:top_k]

    def search_image(self, image, *, top_k=10, where=None):
        """Images like a PIL image, by embedding alone: as `search`."""
        return _ranked(self.shortlist(self.embed_images([image])[0], top_k, where=where))

    def _score(self, caption, hits):
        tokens = self.processor(text=[caption])["input_ids"].tolist()
        pairs = [(row, 0) for row in range(len(hits))]
        images = FileImages([hit["file"] for hit in hits], self.processor)
        return score_pairs(self.model, images, tokens, pairs, progress=False)


def check_where(where):
    """The filter as it is, or None.

    Raises:
        ValueError: for anything that is not a short comparison of columns.
    """
    if where is None or where == "":
        return None
    if not isinstance(where, str) or len(where) > MAX_WHERE or _is_not_text(where):
        raise ValueError(
            f"where must be an SQL expression of up to {MAX_WHERE:,} characters; got {ascii(where)[:200]}."
        )
    outside = re.sub(r"'(?:[^']|'')*'", "''", where)
    found = re.search(r"\\'|[;?$]|--|/\*|\|\||[\"`\]]\s*\(", outside if "\\'" not in where else "\\'")
    words = [word for word in re.findall(r"(\w+)\s*\(", outside) if word.lower() not in WHERE_WORDS]
    if found or words:
        wrong = words[0] if words else found.group()
        raise ValueError(
            f'where must be a comparison such as "width >= 256 AND north > 48", and {wrong!r} cannot stand in one. '
            f"Functions: {', '.join(sorted(WHERE_WORDS))}."
        )
    return where


def _fetch(query, where, **options):
    """Rows of a LanceDB query as dicts; where a filter is at fault, an error that shows it."""
    if not where:
        return query.to_list()
    try:
        return query.where(where, **options).to_list()
    except OSError:
        raise
    except Exception as error:  # LanceDB's: ValueError, RuntimeError, a panic of its parser
        reason = re.split(r", \S+\.rs:\d+", str(error))[0][:500]  # where in LanceDB's own code
        raise ValueError(f"where={where[:200]!r} cannot filter images by {', '.join(METADATA)}: {reason}") from error


def _is_not_text(text):
    """Whether it holds half a character, as the names of files that are not UTF-8 do."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


class FileImages(Dataset):
    """Image files by row as the network reads them: (3, image_size, image_size) in [-1, 1]."""

    def __init__(self, files, processor):
        self.files, self.image_processor = files, processor.image_processor

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        square = self.image_processor.fit_square(read_picture(self.files[row]))
        return torch.from_numpy(self.image_processor.scale_pixels(np.asarray(square)))


def fingerprint_checkpoint(model, processor):
    """A digest of weights, configuration and preprocessing: embeddings of equal ones can be compared."""
    images = processor.image_processor
    settings = [images.image_size, images.fit, processor.max_caption_tokens, processor.tokenizer.get_vocab()]
    return fingerprint(model, settings).hexdigest()


def find_images(archive):
    """Image files under a folder, in order; or the one file given.

    Raises:
        FileNotFoundError: where there is none.
    """
    archive = Path(archive)
    paths = sorted(archive.rglob("*")) if archive.is_dir() else [archive]
    found = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not found:
        raise FileNotFoundError(f"Images ({', '.join(IMAGE_SUFFIXES)}) expected at {archive}; there are none.")
    return found


def read_picture(file):
    """An image file as PIL RGB.

    Raises:
        FileNotFoundError, ValueError: for a file that is gone, or cannot be decoded.
    """
    try:
        return open_picture(file)
    except FileNotFoundError as error:
        message = f"{file} is in the index, or was asked for, but is not there: put it back, or delete it by name."
        raise FileNotFoundError(message) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def _describe(file, picture):
    state = Path(file).stat()
    time = datetime.fromtimestamp(state.st_mtime, timezone.utc)
    row = {"file": file, "bytes": state.st_size, "time": time, "width": picture.width, "height": picture.height}
    return row | (_read_bounds(file) if file.lower().endswith(GEOTIFF_SUFFIXES) else {})


def _read_bounds(file):
    """Bounds in the image's own coordinates, and their reference system; nothing for a TIFF without any."""
    import rasterio  # the extra `geo`

    with rasterio.open(file, driver="GTiff") as scene:  # by its content, GDAL would follow what other formats refer to
        if scene.crs is None:
            return {}
        west, south, east, north = scene.bounds
        return {"west": west, "south": south, "east": east, "north": north, "crs": scene.crs.to_string()}


def _digest(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _any_of(files):
    quoted = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
    return f"file IN ({quoted})"


def _ranked(hits):
    return [
        {"stage": "shortlist", "score": hit["similarity"], **hit, "rank": rank} for rank, hit in enumerate(hits, 1)
    ]
