"""Index of an image archive: a shortlist from a vector store (LanceDB), re-ranked by the network.

The tables' address is passed to LanceDB unchanged: a folder, or object storage such as `s3://bucket/prefix`. An image
is one row, a large scene one row for each of its tiles. A batch is one transaction, and rows whose content has not
changed are not embedded again: an interrupted addition resumes when it is run again. Two-stage retrieval: Miech et
al., "Thinking Fast and Slow: Efficient Text-to-Visual Retrieval with Transformers", CVPR 2021.
"""

import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import torch
from lancedb.index import IvfSq

from ieft.evaluation.ranking import fingerprint, score_pairs
from ieft.search.archive_files import HitImages, digest_file, plan_tiles, read_tiles, read_whole
from ieft.search.feature_cache import decode_state, encode_state
from ieft.search.filters import check_where, fetch, is_not_text
from ieft.search.tiles import cut_windows
from processing_ieft import check_text

IMAGES, CAPTIONS = "images", "captions"  # the tables
# In the tables' schema: the fingerprint of the checkpoint that made them; the kind of states kept, empty for none.
CHECKPOINT, STATES = b"ieft_checkpoint", b"ieft_states"
ROWS_AT_ONCE = 64
FEWEST_FOR_VECTOR_INDEX = 50_000  # below, every vector is compared, in milliseconds and exactly
PARTITION_ROWS = 1024
PROBES, REFINE = 40, 2  # partitions looked into; candidates re-scored by their full vectors, per hit
# `width` and `height` are the file's; `col`, `row`, `tile_width`, `tile_height` the window of it that the row stands
# for; `tiling` says how it was cut, empty where the row is the whole image; `limits` are those of
# `ieft.search.tiles.Scene`.
METADATA = {
    "file": pa.string(), "content": pa.string(), "bytes": pa.int64(), "time": pa.timestamp("ms", "UTC"),
    "width": pa.int32(), "height": pa.int32(), "col": pa.int32(), "row": pa.int32(), "tile_width": pa.int32(),
    "tile_height": pa.int32(), "tiling": pa.string(), "limits": pa.list_(pa.float64()), "west": pa.float64(),
    "south": pa.float64(), "east": pa.float64(), "north": pa.float64(), "crs": pa.string(),
}  # fmt: skip
KEY = ["file", "col", "row"]


class Hits(list):
    """Hits as dicts, best first.

    Attributes:
        seconds: what each stage took: "embed", "shortlist", and "re-rank" where there was one.
    """

    def __init__(self, hits=(), seconds=None):
        super().__init__(hits)
        self.seconds = {} if seconds is None else seconds


class ImageIndex:
    """The images of an archive, and captions if there are any, that captions and images are looked up in."""

    def __init__(self, uri, model, *, processor, create=False, states=None, storage_options=None):
        """Open the index at `uri`, or with `create` begin one where there is none.

        Args:
            model: an `IeftForImageTextRetrieval` with contrastive heads.
            states: with `create`, keep beside each vector what re-ranking needs to know of the image, as "bf16" or
                "int8" (see `ieft.search.feature_cache`): it then reads no file. For models with `first_joint_layer`
                above 0.
            storage_options: credentials and settings of object storage, as LanceDB takes them.

        Raises:
            ValueError: for a model without contrastive heads, or another one than made the index; for states of a
                model that joins at 0, or other than those of the index.
            FileNotFoundError: where there is no index.
        """
        if not model.config.contrastive_dim:
            raise ValueError(
                "A checkpoint with contrastive heads expected (contrastive_dim above 0); this one has none. Train it "
                "with run_retrieval.py --contrastive_weight 1."
            )
        self.model, self.processor = model.eval(), processor
        self.checkpoint = fingerprint_checkpoint(model, processor)
        if states and not model.config.first_joint_layer:
            raise ValueError(
                "A checkpoint with first_joint_layer above 0 expected, to keep states of its images; this one reads "
                "them with the caption from block 0 on. Train one with run_retrieval.py --first_joint_layer."
            )
        database = lancedb.connect(str(uri), storage_options=storage_options)
        missing = {IMAGES, CAPTIONS} - set(database.list_tables().tables)
        if missing and not create:
            raise FileNotFoundError(f"No index at {uri}: make one with ieft-search index ARCHIVE --index {uri}.")
        columns = METADATA | ({"state": pa.binary()} if states else {})
        schemas = {IMAGES: self._schema(columns, states), CAPTIONS: self._schema({"caption": pa.string()})}
        for name in missing:
            database.create_table(name, schema=schemas[name], exist_ok=True)
        self.table, self.captions = database.open_table(IMAGES), database.open_table(CAPTIONS)
        known = self.table.schema.metadata or {}
        made_by, self.states = (known.get(name, b"").decode() for name in (CHECKPOINT, STATES))
        if made_by != self.checkpoint:
            raise ValueError(
                f"The index at {uri} was made by the checkpoint {made_by[:12]}; this one is {self.checkpoint[:12]}. "
                "Their embeddings cannot be compared: take that checkpoint, or make another index."
            )
        if states not in (None, self.states):
            raise ValueError(
                f"The index at {uri} keeps {self.states or 'no'} states, and {states} are asked for: leave that away, "
                "or make another index."
            )

    def _schema(self, columns, states=None):
        vector = pa.field("vector", pa.list_(pa.float32(), self.model.config.contrastive_dim))
        fields = [pa.field(name, kind) for name, kind in columns.items()]
        metadata = {CHECKPOINT: self.checkpoint.encode(), STATES: (states or "").encode()}
        return pa.schema([*fields, vector], metadata=metadata)

    def __len__(self):
        return self.table.count_rows()

    def add(self, files, *, tile=None, overlap=0.25, batch_size=ROWS_AT_ONCE):
        """Embed images and keep them, a batch at a time; what changed takes its old rows' place.

        Args:
            tile: side of the tiles that larger images are cut into, in pixels; None keeps each image whole.
            overlap: the part of a tile that its neighbour shows too.

        Returns:
            dict: `added` and `unchanged`, how many rows, images or tiles; `unreadable`, a dict of file -> why. Of a
            scene that breaks off, the tiles before are kept.
        """
        if tile is not None:
            cut_windows(1, 1, tile=tile, overlap=overlap)  # says what is wrong before any work
        files = list(dict.fromkeys(str(Path(file).resolve()) for file in files))
        not_text = [file for file in files if is_not_text(file)]
        files = [file for file in files if file not in not_text]
        refused = dict.fromkeys(not_text, "its name is not UTF-8: rename it")
        report = {"added": 0, "unchanged": 0, "unreadable": refused}
        files_at_once = batch_size if tile is None else 1
        for first in range(0, len(files), files_at_once):
            stale = []
            rows = self._read_missing(files[first : first + files_at_once], tile, overlap, report, stale)
            while batch := list(islice(rows, batch_size)):
                self._write(batch)
                report["added"] += len(batch)
            if stale:  # after what takes its place, so that a kill loses nothing
                self.table.delete(" OR ".join(stale))
        return report

    def _read_missing(self, files, tile, overlap, report, stale):
        """Rows without vectors, with their pictures as the network sees them; `stale` gets what is to go, as SQL."""
        known = {file: set() for file in files}
        for row in self._select(_any_of(files), ["content", "tiling", *KEY]):
            known[row["file"]].add((row["content"], row["tiling"], (row["col"], row["row"])))
        for file in files:
            try:
                content, windows = digest_file(file), plan_tiles(file, tile, overlap)
                tiling = f"{tile} pixels, overlap {overlap}" if windows else ""
                there = {place for *made_of, place in known[file] if made_of == [content, tiling]}
                report["unchanged"] += len(there)
                missing = [window for window in windows if window[:2] not in there]
                pictures = read_tiles(file, missing) if windows else [] if there else [read_whole(file)]
                for row, picture in pictures:
                    square = self.processor.image_processor.fit_square(picture)
                    yield row | {"content": content, "tiling": tiling}, square
                if len(known[file]) > len(there):
                    stale.append(f"({_any_of([file])} AND (content != '{content}' OR tiling != '{tiling}'))")
            except (OSError, ValueError) as error:
                report["unreadable"][file] = str(error)

    def _write(self, batch):
        squares = [square for _, square in batch]
        made = self._read_states(squares) if self.states else [{"vector": each} for each in self.embed_images(squares)]
        rows = [row | columns for (row, _), columns in zip(batch, made, strict=True)]
        merge = self.table.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all()
        merge.execute(pa.Table.from_pylist(rows, schema=self.table.schema))  # one transaction

    @torch.no_grad()
    def _read_states(self, images):
        """Of each image, read once: its vector, and its state in bytes."""
        states = self.model.read_images(self.processor(images=images)["pixel_values"].to(self.model.device))
        vectors = self.model.get_image_features(image_states=states).float().cpu().numpy()
        encoded = [encode_state(state, self.states) for state in states]
        return [{"vector": vector, "state": state} for vector, state in zip(vectors, encoded, strict=True)]

    def add_captions(self, captions, *, batch_size=ROWS_AT_ONCE):
        """Embed sentences and keep them, for images to be looked up in; blank ones are passed over.

        Returns:
            dict: `added` and `unchanged`, how many.
        """
        captions = list(captions)
        if captions:
            check_text(captions)
        captions = list(dict.fromkeys(caption.strip() for caption in captions if caption.strip()))
        added = 0
        for first in range(0, len(captions), batch_size):
            batch = captions[first : first + batch_size]
            known = self.captions.search().where(_any_of(batch, "caption")).select(["caption"]).to_list()
            new = sorted(set(batch) - {row["caption"] for row in known}, key=batch.index)
            if new:
                rows = [{"caption": c, "vector": v} for c, v in zip(new, self.embed_captions(new), strict=True)]
                merge = self.captions.merge_insert("caption").when_not_matched_insert_all()
                merge.execute(pa.Table.from_pylist(rows, schema=self.captions.schema))
                added += len(new)
        return {"added": added, "unchanged": len(captions) - added}

    def optimize(self):
        """Gather what small additions left scattered; from 50,000 rows on, keep a vector index up to date."""
        for table in (self.table, self.captions):
            kinds = [found.index_type for found in table.list_indices()]  # an earlier version's was IvfPq
            if table.count_rows() >= FEWEST_FOR_VECTOR_INDEX and "IvfSq" not in kinds:
                # One byte for each number of a vector: as near as exact, and made faster than product quantisation.
                # The size is kept when rows are added; of a number of partitions, most would be joined then.
                config = IvfSq(distance_type="dot", target_partition_size=PARTITION_ROWS)
                table.create_index("vector", config=config)
            table.optimize()

    def delete(self, files):
        """Take files out of the index, with all their tiles; the files themselves stay. Gives how many rows went."""
        files = [file for file in (str(Path(file).resolve()) for file in files) if not is_not_text(file)]
        return self.table.delete(_any_of(files)).num_deleted_rows if files else 0

    def delete_captions(self, captions):
        """Take sentences out of the index. Gives how many were there."""
        captions = [caption.strip() for caption in captions]
        return self.captions.delete(_any_of(captions, "caption")).num_deleted_rows if captions else 0

    def rows(self, where=None, *, columns=tuple(METADATA)):
        """What is known of the images that `where`, an SQL expression over the columns, holds for; all without one.

        Raises:
            ValueError: for an expression that is none, or does more than compare.
        """
        return self._select(check_where(where), columns)

    def _select(self, where, columns):
        return fetch(self.table.search().select(list(columns)), where)

    @torch.no_grad()
    def embed_images(self, images):
        """PIL images -> unit vectors (I, E)."""
        pixels = self.processor(images=images)["pixel_values"].to(self.model.device)
        return self.model.get_image_features(pixels).float().cpu().numpy()

    @torch.no_grad()
    def embed_captions(self, captions):
        """Sentences -> unit vectors (C, E)."""
        tokens = self.processor(text=captions).to(self.model.device)
        return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float().cpu().numpy()

    def embed_caption(self, caption):
        """A sentence -> a unit vector (E,).

        Raises:
            ValueError: for an empty one.
        """
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("A caption to look for expected; got an empty one.")
        return self.embed_captions([caption])[0]

    def shortlist(self, vector, top_k=32, *, where=None):
        """The `top_k` nearest images or tiles, best first.

        Args:
            vector: (E,) of a caption or an image.
            where: an SQL expression over the columns, held before the search: `"north > 48 AND width >= 256"`.

        Returns:
            list: the columns but the vector, and `similarity`, in [-1, 1].
        """
        return _nearest(self.table, vector, top_k, list(METADATA), where)

    def search(self, caption, *, top_k=10, rerank_top_k=32, where=None, similarity_weight=0.0):
        """Images for a sentence: a shortlist by embedding, its first `rerank_top_k` re-ranked by the network.

        Args:
            similarity_weight: how much of the embeddings' similarity, scaled as the contrastive loss does, is added to
                the network's score; `run_retrieval.py --rerank_top_k` chooses one on validation data.

        Returns:
            Hits: as `shortlist`, with `rank` from 1, `stage`, "re-ranked" or "shortlist", and `score`, the network's
            for re-ranked ones and the similarity for others, which always follow them. Of tiles that overlap, only
            the best is there: see `merge_overlaps`.

        Raises:
            ValueError: for an empty caption, or `top_k` below 1.
            FileNotFoundError: for a file of the shortlist that is no longer there.
        """
        seconds = {}
        with _clock(seconds, "embed"):
            vector = self.embed_caption(caption)
        with _clock(seconds, "shortlist"):
            kept = ["state"] if rerank_top_k and self.states else []
            nearest = _nearest(self.table, vector, max(top_k, rerank_top_k), [*METADATA, *kept], where)
            states = [hit.pop("state") for hit in nearest if kept]
        if rerank_top_k:
            with _clock(seconds, "re-rank"):
                scores = self._score_images(caption, nearest[:rerank_top_k], states[:rerank_top_k])
                nearest = _rerank(scores, nearest, similarity_weight * self.model.similarity_scale().item())
        return self._merged(nearest, vector, top_k, where, seconds)

    def search_image(self, image, *, top_k=10, where=None):
        """Images like a PIL image, by embedding alone: as `search`."""
        seconds = {}
        with _clock(seconds, "embed"):
            vector = self.embed_images([image])[0]
        with _clock(seconds, "shortlist"):
            nearest = self.shortlist(vector, top_k, where=where)
        return self._merged(nearest, vector, top_k, where, seconds)

    def search_captions(self, image, *, top_k=10, rerank_top_k=32, similarity_weight=0.0):
        """Captions of the index for a PIL image, in the two stages of `search`.

        Returns:
            Hits: `caption`, `similarity`, `score`, `stage`, `rank`; none where the index holds no captions.
        """
        seconds = {}
        with _clock(seconds, "embed"):
            vector = self.embed_images([image])[0]
        with _clock(seconds, "shortlist"):
            nearest = _nearest(self.captions, vector, max(top_k, rerank_top_k), ["caption"])
        if rerank_top_k and nearest:
            with _clock(seconds, "re-rank"):
                scores = self._score_captions(image, [hit["caption"] for hit in nearest[:rerank_top_k]])
                nearest = _rerank(scores, nearest, similarity_weight * self.model.similarity_scale().item())
        return Hits(_ranked(nearest)[:top_k], seconds)

    def _score_images(self, caption, hits, states):
        tokens = self.processor(text=[caption])["input_ids"].tolist()
        images = [decode_state(state) for state in states] or HitImages(hits, self.processor)
        return score_pairs(self.model, images, tokens, [(row, 0) for row in range(len(hits))], progress=False)

    def _score_captions(self, image, captions):
        tokens = self.processor.tokenizer(captions, truncation=True, max_length=self.processor.max_caption_tokens)
        pixels = self.processor(images=[image])["pixel_values"]
        pairs = [(0, column) for column in range(len(captions))]
        return score_pairs(self.model, list(pixels), tokens["input_ids"], pairs, progress=False)

    def _merged(self, nearest, vector, top_k, where, seconds):
        """`top_k` hits of different places; where merging leaves fewer, the shortlist is asked for more."""
        best, found, asked = nearest, merge_overlaps(nearest), len(nearest)
        while len(found) < top_k <= asked:
            with _clock(seconds, "shortlist"):
                more = self.shortlist(vector, 2 * asked, where=where)
            seen = {_place(hit) for hit in best}
            best = [*best, *(hit for hit in more if _place(hit) not in seen)]
            found = merge_overlaps(best)
            if len(more) < 2 * asked:
                break
            asked *= 2
        return Hits(_ranked(found)[:top_k], seconds)


def merge_overlaps(hits):
    """Of tiles of one scene that overlap at all, the best alone: greedy non-maximum suppression.

    Args:
        hits: best first.

    Returns:
        list: those that stay, each with `merged`, how many hits it stands for, itself included.
    """
    kept = []
    for hit in hits:
        better = next((other for other in kept if _overlap(other, hit)), None)
        if better is None:
            kept.append(hit | {"merged": 1})
        else:
            better["merged"] += 1
    return kept


def fingerprint_checkpoint(model, processor):
    """A digest of weights, configuration and preprocessing: embeddings of equal ones can be compared."""
    images = processor.image_processor
    settings = [images.image_size, images.fit, processor.max_caption_tokens, processor.tokenizer.get_vocab()]
    return fingerprint(model, settings).hexdigest()


def _any_of(values, column="file"):
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


def _nearest(table, vector, top_k, columns, where=None):
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more; got {top_k}.")
    query = table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector")
    query = query.distance_type("dot").nprobes(PROBES).refine_factor(REFINE)
    query = query.select([*columns, "_distance"]).limit(top_k)
    hits = fetch(query, check_where(where), prefilter=True)
    return [hit | {"similarity": 1 - hit.pop("_distance")} for hit in hits]


def _rerank(scores, nearest, similarity_weight):
    """The hits that have scores, best first, then the others as they stood."""
    first, rest = nearest[: len(scores)], nearest[len(scores) :]
    for hit, score in zip(first, scores, strict=True):
        hit.update(score=float(score) + similarity_weight * hit["similarity"], stage="re-ranked")
    return [*sorted(first, key=lambda hit: -hit["score"]), *rest]


def _place(hit):
    return tuple(hit[name] for name in KEY)


def _overlap(hit, other):
    """Whether two hits show pixels in common."""
    return hit["file"] == other["file"] and all(
        hit[start] < other[start] + other[size] and other[start] < hit[start] + hit[size]
        for start, size in (("col", "tile_width"), ("row", "tile_height"))
    )


def _ranked(hits):
    return [
        {"stage": "shortlist", "score": hit["similarity"], **hit, "rank": rank} for rank, hit in enumerate(hits, 1)
    ]


@contextmanager
def _clock(seconds, stage):
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
