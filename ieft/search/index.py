"""Index of an image archive: a shortlist from a vector store (LanceDB), re-ranked by the network.

The index is three LanceDB tables, a fourth where product quantisation needs codebooks, in a folder or in object
storage such as `s3://bucket/prefix`. An image is a row, a large scene one row for each of its tiles. A transaction
writes a batch or a few, and rows whose content has not changed are not embedded again: an interrupted addition resumes
when it is run again. Several processes may add at once: the key of a row is the table's primary key, so that a
transaction that would insert a row that another has just inserted is repeated. Two-stage retrieval: Miech et al.,
"Thinking Fast and Slow: Efficient Text-to-Visual Retrieval with Transformers", CVPR 2021.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

try:
    import lancedb
    from lancedb.index import BTree, IvfSq
except ImportError as error:
    raise ImportError("The index needs lancedb: pip install 'ieft[search]'.") from error

from ieft.data.storage import is_address
from ieft.evaluation.devices import choose_device, choose_dtype
from ieft.evaluation.embedders import FINGERPRINT, PROBE, load_embedder, unit_vectors
from ieft.evaluation.ranking import fingerprint, inference_network, score_pairs
from ieft.search.archive_files import (
    digest_file,
    find_gone,
    is_gone,
    is_outside,
    is_there,
    normalize_root,
    place_again,
    read_hit,
    sizes_of,
)
from ieft.search.feature_cache import bytes_per_token, decode_state
from ieft.search.filters import check_where, fetch, is_not_text, without_place_in_code, write_where
from ieft.search.ingestion import ROWS_AT_ONCE, add_captions, add_images
from ieft.search.product_quantization import Codebooks, check_size
from ieft.search.queries import (
    FIRST_BLOCK,
    Hits,
    Query,
    check_options,
    clock,
    in_blocks,
    number,
    order,
    search_many,
)
from ieft.search.tables import (
    CAPTIONS,
    CODEBOOKS,
    IMAGES,
    KEY,
    METADATA,
    PRIMARY_KEY,
    SETTINGS,
    any_of,
    columns_of_catalogues,
    quote,
    remove_doubles,
    retry,
    set_key,
    with_key,
)

logger = logging.getLogger(__name__)

# In the tables' schema: the fingerprint of the checkpoint or embedder that made the vectors; the kind of states kept,
# and the name of the embedder, both empty for none.
CHECKPOINT, STATES, EMBEDDER = b"ieft_checkpoint", b"ieft_states", b"ieft_embedder"
# In the table of settings, which can change: the folder that paths are relative to; the fingerprint, where an earlier
# version wrote another one into the schema; the embedder's name, where it was moved.
ROOT, MADE_BY, MOVED_EMBEDDER = "root", "checkpoint", "embedder"
FEWEST_FOR_VECTOR_INDEX = 50_000  # below, search is exact, and names are found, in milliseconds
PARTITION_ROWS = 1024
PROBES, REFINE = 40, 2  # partitions searched; candidates per hit that are re-scored with full vectors
MOST_SKIPPED = 10_000  # most rows of a shortlist that are searched for existing files
KEPT_VERSIONS = timedelta(hours=1)  # of the tables, for queries that began earlier
# Fields of the configuration that embeddings depend on.
COMPUTED_BY = (
    "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "text_layer_norm_eps", "image_size",
    "patch_size", "max_image_length", "enhancement_layers", "enhancement_num_heads", "first_joint_layer",
    "contrastive_dim",
)  # fmt: skip
PREPROCESSED_BY = (
    "image_size", "fit", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip


class ImageIndex:
    """An index of the images of an archive, and optionally of captions, searched by captions and images.

    Attributes:
        embedder: the `Embedder` that makes the vectors; None for the model's own heads.
        needs_files: whether hits whose file is gone are skipped. True unless the index stores image features, with
            which no file is read; set it to True to show the hits.
    """

    def __init__(
        self, uri, model, *, processor, create=False, states=None, storage_options=None, root=None,
        device="auto", dtype="auto", embedder=None,
    ):  # fmt: skip
        """Open the index at `uri`, or with `create` create it if it does not exist.

        Indexes of earlier versions are migrated without computing embeddings again.

        Args:
            model: an `IeftForImageTextRetrieval`, with contrastive heads unless there is an `embedder`.
            states: with `create`, also store image features for re-ranking, as "bf16", "int8", or in so many bytes
                per token as "pq96" (see `ieft.search.feature_cache`), so that re-ranking reads no file. For models
                with `first_joint_layer` above 0; "pq96" needs it to be the last block.
            storage_options: credentials and settings of object storage, as LanceDB takes them.
            root: the archive's folder, or its address in other storage. The index stores the first one given, and
                paths relative to it: see `relocate`. A moved archive is recognised by its files.
            device: where to compute, to which the model is moved: "cuda", "cuda:1", "mps", "cpu", or "auto" for the
                best there is.
            dtype: of the matrix products, "float32", "bfloat16" or "float16"; "auto" takes one of 16 bits where it is
                faster. Embeddings of all devices and types can be in one index; bfloat16 changes a similarity by less
                than 0.02.
            embedder: what embeds images and sentences for the shortlist instead of the model's heads: an `Embedder`,
                or a name for `ieft.evaluation.embedders.load_embedder`. None takes the one that made the index.

        Raises:
            ValueError: if the model has no contrastive heads or, like the embedder, is another one than that of the
                index; if `states` does not fit the model or the index; if `uri` is not an index, or is damaged.
            FileNotFoundError: if there is no index, or if the archive's former root is gone and `root` is not the
                same archive.
        """
        self.model, self.processor = model.eval().to(choose_device(device)), processor
        self.dtype = None  # to compare an earlier version's embeddings exactly
        self._root = self._codebooks = None
        if states and not model.config.first_joint_layer:
            raise ValueError(
                "A checkpoint with first_joint_layer above 0 expected, to keep states of its images; this one reads "
                "them with the caption from block 0 on. Train one with run_retrieval.py --first_joint_layer."
            )
        if states and (size := bytes_per_token(states)):
            if not model.config.joins_last:
                raise ValueError(
                    f"{states} keeps keys and values of the last block: a checkpoint with first_joint_layer "
                    f"{model.config.num_hidden_layers - 1} expected; that of this one is "
                    f"{model.config.first_joint_layer}. Keep its states as int8 or bf16."
                )
            check_size(2 * model.config.hidden_size, size)
        with _store_errors(uri):
            self._open(str(uri), create, states, storage_options, embedder, {"device": device, "dtype": dtype})
            self._check_checkpoint(uri)
            self._mend_earlier_version()
            if states not in (None, self.states):
                raise ValueError(
                    f"The index at {uri} keeps {self.states or 'no'} states, and {states} are asked for: leave that "
                    "away, or make another index."
                )
            self.needs_files = not self.states
            self.dtype = choose_dtype(self.model, dtype)
            if root is not None:
                self._use_root(normalize_root(root))

    def _open(self, uri, create, states, storage_options, embedder, place):
        self.uri = uri if "://" in uri else os.path.abspath(uri)  # processes elsewhere work in other folders
        self.storage_options = storage_options
        folder = None if "://" in uri else Path(uri)
        used = folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        is_new = folder is not None and not used
        if is_new:  # before anything is created
            self._choose_embedder(embedder, "", states, place)
        if folder is not None and not (create or folder.is_dir()):
            raise FileNotFoundError(f"No index at {uri}: make one with ieft-search index ARCHIVE --index {uri}.")
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"A folder expected for the index; {uri} is a file.")
        # Each read uses the latest version, so that additions of other processes are seen.
        database = lancedb.connect(uri, storage_options=storage_options, read_consistency_interval=timedelta(0))
        there = set(database.list_tables().tables)
        missing = {IMAGES, CAPTIONS} - there
        if missing and not create:
            raise FileNotFoundError(f"No index at {uri}: make one with ieft-search index ARCHIVE --index {uri}.")
        if missing and used and not there & {IMAGES, CAPTIONS, SETTINGS}:
            raise ValueError(f"An index or an empty folder expected; {uri} holds other files: name another folder.")
        if not is_new:
            self._choose_embedder(embedder, _read_embedder(database) if IMAGES in there else "", states, place)
        text = pa.field("name", pa.string(), nullable=False), pa.field("value", pa.string())
        columns = METADATA | ({"state": pa.binary()} if states else {})
        made = {
            IMAGES: (self._schema(columns, states), KEY),
            CAPTIONS: (self._schema({"caption": pa.string()}), ["caption"]),
            SETTINGS: (pa.schema(text), ["name"]),
        }
        tables = {}
        for name, (schema, key) in made.items():
            if name not in there:
                retry(database.create_table, name, schema=with_key(schema, key), exist_ok=True)
            tables[name] = database.open_table(name)
        self.table, self.captions, self.settings = (tables[name] for name in made)
        known = self.table.schema.metadata or {}
        if CHECKPOINT not in known:
            raise ValueError(f"The tables at {uri} were not made by ieft-search: name another folder.")
        self.made_by, self.states = (known.get(name, b"").decode() for name in (CHECKPOINT, STATES))
        self._made_with = _read_embedder(database)
        self._codebooks_table = None
        if self.states and bytes_per_token(self.states):
            schema = pa.schema([pa.field("name", pa.string(), nullable=False), pa.field("content", pa.binary())])
            if CODEBOOKS not in there:
                retry(database.create_table, CODEBOOKS, schema=with_key(schema, ["name"]), exist_ok=True)
            self._codebooks_table = database.open_table(CODEBOOKS)

    def _choose_embedder(self, embedder, made_with, states, place):
        """Set `embedder`, and the fingerprint of what makes the vectors.

        Args:
            embedder: an `Embedder`, a name, or None.
            made_with: the name of the one that made the index; empty for none, and for a new index.
            place: the options `device` and `dtype`.

        Raises:
            ValueError: without an embedder, for a model without contrastive heads.
        """
        try:
            wanted = embedder or made_with or None
            by_name = isinstance(wanted, str | os.PathLike)
            self.embedder = load_embedder(wanted, **place) if by_name else wanted and wanted.to(**place)
        except (OSError, ValueError) as error:
            if embedder:
                raise
            raise ValueError(
                f"This index was made with the embedder {made_with}, which cannot be loaded: {error}\nIf it was "
                "moved, pass --embedder with its new place."
            ) from error
        if self.embedder is None and not self.model.config.contrastive_dim:
            raise ValueError(
                "A checkpoint with contrastive heads expected (contrastive_dim above 0); this one has none. Train it "
                "with run_retrieval.py --contrastive_weight 1, or make the index with --embedder, such as a CLIP."
            )
        if self.embedder is not None and states:
            raise ValueError("States are kept beside embeddings by IEFT itself: leave out --states or --embedder.")
        self.checkpoint = (
            self.embedder.fingerprint if self.embedder else fingerprint_checkpoint(self.model, self.processor)
        )

    def _check_checkpoint(self, uri):
        """Refuse an index of another checkpoint or embedder; update fingerprints of earlier versions."""
        made_by = self._setting(MADE_BY) or self.made_by
        if made_by == self.checkpoint:
            if self.embedder and self.embedder.name != self._made_with:
                self._set(MOVED_EMBEDDER, self.embedder.name)
            return
        if self.embedder:
            raise ValueError(_name_difference(uri, made_by, self._made_with, self.embedder))
        if not made_by.startswith(FINGERPRINT) and self._is_of_earlier_version(made_by):
            self._set(MADE_BY, self.checkpoint)
            return
        hint = " (float16 rounds weights: load it in float32 or bfloat16)" if self.model.dtype == torch.float16 else ""
        raise ValueError(
            f"The index at {uri} was made by the checkpoint {made_by[:12]}; this one is {self.checkpoint[:12]}{hint}. "
            "Their embeddings cannot be compared: take that checkpoint, or make another index."
        )

    def _is_of_earlier_version(self, made_by):
        """Whether an index with a fingerprint of an earlier version belongs to this checkpoint.

        Those fingerprints also depended on library versions: if they differ, a few embeddings are recomputed and
        compared.
        """
        images, processor = self.processor.image_processor, self.processor
        settings = [images.image_size, images.fit, processor.max_caption_tokens, processor.tokenizer.get_vocab()]
        if fingerprint(self.model, settings).hexdigest() == made_by:
            return True
        some = self.captions.search().select(["caption", "vector"]).limit(8).to_list()
        computed = self.embed_captions([row["caption"] for row in some]) if some else None
        if not some:
            columns = [*KEY, "tile_width", "tile_height", "tiling", "limits", "content", "vector"]
            rows = self.table.search().select(columns).limit(64).to_list()
            some = [row for row in rows if not is_gone(row["file"]) and digest_file(row["file"]) == row["content"]][:8]
            computed = self.embed_images([read_hit(row) for row in some]) if some else None
        return bool(some) and np.allclose(computed, [row["vector"] for row in some], atol=1e-4)

    def _mend_earlier_version(self):
        """Migrate the tables of an earlier version: columns, places, and primary keys without duplicates."""
        names = set(self.table.schema.names)
        new = [pa.field(name, kind) for name, kind in METADATA.items() if name not in names]
        if new:
            retry(self.add_columns, new)
        for table, key in ((self.table, KEY), (self.captions, ["caption"])):
            if PRIMARY_KEY not in (table.schema.field(key[0]).metadata or {}):
                retry(set_key, table, key)
                remove_doubles(table, key)
        # Earlier versions kept the raster's own coordinates as `west` to `north`.
        left_over = "crs IS NOT NULL AND west IS NOT NULL AND left IS NULL"
        columns = [*KEY, "tile_width", "tile_height", "west", "south", "east", "north", "crs"]
        while rows := self.table.search().where(left_over).select(columns).limit(1000).to_list() if new else []:
            placed = [place_again(row | {"file": self.path_of(row["file"])}) | {"file": row["file"]} for row in rows]
            self.update(placed)

    def add_columns(self, fields):
        """Add those of the columns, as fields of pyarrow, that do not exist."""
        there = set(self.table.schema.names)
        if missing := [field for field in fields if field.name not in there]:  # another process may have been first
            self.table.add_columns(missing)

    # Where the archive is -------------------------------------------------------------------------------------------

    @property
    def has_probability(self):
        """Whether re-ranked hits of a sentence have a probability: those of a calibrated checkpoint, whose own heads
        make the shortlists that it was fitted to."""
        return self.embedder is None and self.model.config.calibration_scale is not None

    @property
    def root(self):
        """The archive's folder, which paths in the index are relative to; empty if none was given."""
        if self._root is None:
            self._root = self._setting(ROOT) or ""
        return self._root

    def _setting(self, name):
        rows = self.settings.search().where(f"name = '{name}'").to_list()
        return rows[0]["value"] if rows else None

    def _set(self, name, value, *, replace=True):
        merge = self.settings.merge_insert("name").when_not_matched_insert_all()
        merge = merge.when_matched_update_all() if replace else merge
        retry(merge.execute, pa.Table.from_pylist([{"name": name, "value": value}], schema=self.settings.schema))

    def _use_root(self, folder):
        """Set the root if there is none; recognise an archive that was moved."""
        if not self.root:
            self._set(ROOT, folder, replace=False)
            self._root = None  # another process may have been first
            self._make_relative()
            return
        if folder == self.root or folder.startswith(os.path.join(self.root, "")):
            return
        some = self.table.search().select(["file", "bytes"]).limit(1000).to_list()
        some = [row for row in some if not is_outside(row["file"])]
        files = {self.path_of(row["file"]) for row in some}
        if not some or len(find_gone(files)) < len(files):
            return
        sizes = sizes_of([os.path.join(folder, row["file"]) for row in some])
        moved = [row for row, size in zip(some, sizes, strict=True) if size == row["bytes"]]
        if len(moved) > len(some) / 2:
            logger.warning("The archive was moved from %s to %s: the index follows.", self.root, folder)
            self.relocate(folder)
        elif not is_there(self.root):
            raise FileNotFoundError(
                f"The archive of this index, {self.root}, is not there, and {folder} does not hold its files. Mount "
                f"it; or if it was moved and changed, run ieft-search relocate FOLDER."
            )

    def relocate(self, folder, *, former=None):
        """Update the location of a moved archive, without computing embeddings again.

        Args:
            folder: the new root: a folder, or an address in other storage.
            former: the former location; None takes the index's root. For files that were indexed outside of the root,
                or by an earlier version, which had no root.

        Returns:
            tuple: how many of the index's files below the root exist in the new location, and their total number.

        Raises:
            ValueError: if none exists there.
        """
        folder = normalize_root(folder)
        if former is not None and normalize_root(former) != self.root:
            former = os.path.join(normalize_root(former), "")
            known = {row["file"] for row in self.select(None, ["file"]) if row["file"].startswith(former)}
            names = {name: name.removeprefix(former) for name in known}
        elif self.root:
            former = None
            known = {row["file"] for row in self.select(None, ["file"]) if not is_outside(row["file"])}
            names = {name: name for name in known}
        else:
            raise ValueError("This index knows no root of its archive: name the former one too, with --former FOLDER.")
        found = len(names) - len(find_gone({os.path.join(folder, name) for name in names.values()}, root=folder))
        if not found:
            raise ValueError(f"None of the index's {len(names):,} files of the former place is below {folder}.")
        if former is None:
            self._set(ROOT, folder)
        elif self.root and folder != self.root:
            self._rename(former, os.path.join(folder, ""))
        else:
            self._set(ROOT, folder)
            self._rename(former, "")
        self._root = None
        return found, len(names)

    def _make_relative(self):
        if self.root:
            self._rename(os.path.join(self.root, ""), "")

    def _rename(self, former, new):
        """Change the prefix of paths in one transaction, without rewriting vectors."""
        condition = f"starts_with(file, {quote(former)})"
        if self.table.count_rows(condition):
            pattern = "^" + re.escape(former)
            changed = {"file": f"regexp_replace(file, {quote(pattern)}, {quote(new.replace('$', '$$'))})"}
            retry(self.table.update, where=condition, values_sql=changed)
            remove_doubles(self.table, KEY)

    def path_of(self, name):
        """The absolute path, or the address, of a file of the index."""
        return name if is_outside(name) else os.path.join(self.root, name)

    def name_of(self, file):
        """The name of a file in the index: relative to the root if it is below it, with the names of links."""
        if is_address(file):
            return file.removeprefix(os.path.join(self.root, "")) if self.root else file
        file, below = os.path.abspath(file), os.path.join(self.root, "") if self.root else None
        if below and file.startswith(below):
            return file.removeprefix(below)
        real = os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))
        return real.removeprefix(below) if below else real

    def _schema(self, columns, states=None):
        vector = pa.field("vector", pa.list_(pa.float32(), self.dim))
        fields = [pa.field(name, kind) for name, kind in columns.items()]
        metadata = {CHECKPOINT: self.checkpoint.encode(), STATES: (states or "").encode()}
        metadata |= {EMBEDDER: self.embedder.name.encode()} if self.embedder else {}
        return pa.schema([*fields, vector], metadata=metadata)

    @property
    def codebooks(self):
        """The `Codebooks` that features are stored with; None where they need none, or none are learnt yet.

        Raises:
            ValueError: if they are not those of the index's rows.
        """
        if self._codebooks is None and self._codebooks_table is not None:
            written = self.table.search().select(["state"]).limit(1).to_list()  # read first: codebooks precede rows
            rows = self._codebooks_table.search().to_list()
            try:
                codebooks = Codebooks.from_bytes(rows[0]["content"]) if rows else None
                for row in written:
                    decode_state(row["state"], codebooks)
            except ValueError as error:
                raise ValueError(
                    f"The codebooks of the {self.states} features at {self.uri} are gone, damaged or those of another "
                    f"index: bring its folder codebooks.lance back, or make another index. {error}"
                ) from error
            self._codebooks = codebooks
        return self._codebooks

    @property
    def lacks_codebooks(self):
        """Whether codebooks have to be learnt before images are added."""
        return self._codebooks_table is not None and self.codebooks is None

    def keep_codebooks(self, codebooks):
        """Store codebooks for good; where another process was first, its are kept and used."""
        merge = self._codebooks_table.merge_insert("name").when_not_matched_insert_all()
        rows = [{"name": self.states, "content": codebooks.to_bytes()}]
        retry(merge.execute, pa.Table.from_pylist(rows, schema=self._codebooks_table.schema))

    def __len__(self):
        return self.table.count_rows()

    def add(
        self, files, *, tile=None, overlap=None, bands=None, batch_size=ROWS_AT_ONCE, num_workers=0, reader=None,
        cluster=None, progress=True,
    ):  # fmt: skip
        """Embed and add images in batches; rows of changed images are replaced.

        Args:
            tile: side length of the tiles that larger images are cut into, in pixels; 0 keeps each image whole. None
                tiles an image as in the index, and keeps new ones whole.
            overlap: the fraction that neighbouring tiles share; 0.25 if only `tile` is given.
            bands: numbers, from 1, of three bands to use as red, green and blue, or of one. None takes those that an
                image was indexed with before, or those that the file declares.
            batch_size: rows that are embedded at once.
            num_workers: worker processes that read images, besides a thread. A script that asks for them must not
                index on import: its main part stands below `if __name__ == "__main__"`, as for multiprocessing.
            reader: a `ReadAhead` with its workers, instead of `num_workers`; it is ended afterwards. One that was
                made before `ieft.search.index` was imported works at once, others after some seconds.
            cluster: address of a Ray cluster whose machines do the work, instead of workers here; "auto" finds the one
                that `ray start` started. They must see the index and the archive under the same paths or addresses.
            progress: show a bar in images and tiles with the time left.

        Returns:
            dict: numbers of `added` and `unchanged` rows (images or tiles); `unreadable`, a dict of file -> reason.
            For a truncated scene, readable tiles are kept, as are rows of a file that was readable before.
        """
        options = {"tile": tile, "overlap": overlap, "bands": bands, "batch_size": batch_size}
        if cluster is not None:
            from ieft.search.cluster import add_images_on_cluster  # imported here: Ray is an extra

            return add_images_on_cluster(self, files, **options, address=cluster, progress=progress)
        return add_images(self, files, **options, num_workers=num_workers, reader=reader, progress=progress)

    def update(self, rows):
        """Update some columns of existing rows, given as dicts with the key and these columns."""
        schema = pa.schema([self.table.schema.field(name) for name in rows[0]])
        merge = self.table.merge_insert(KEY).when_matched_update_all()
        retry(merge.execute, pa.Table.from_pylist(rows, schema=schema))

    def add_captions(self, captions, *, batch_size=ROWS_AT_ONCE):
        """Embed and add sentences, to be found by images; blank ones are ignored.

        Returns:
            dict: numbers of `added` and `unchanged` captions.
        """
        return add_captions(self, captions, batch_size=batch_size)

    def optimize(self):
        """Compact the tables and delete versions of them older than an hour.

        From 50,000 rows on, the indexes of vectors and of names are updated. Duplicate rows of earlier versions are
        removed.
        """
        for table, key in ((self.table, KEY), (self.captions, ["caption"])):
            remove_doubles(table, key)
            kinds = [found.index_type for found in table.list_indices()]  # an earlier version's was IvfPq
            is_large = table.count_rows() >= FEWEST_FOR_VECTOR_INDEX
            if is_large and "BTree" not in kinds:
                retry(table.create_index, key[0], config=BTree())
            if is_large and "IvfSq" not in kinds:
                # One byte per number of a vector: nearly exact, and built faster than product quantization. A size of
                # partitions stays valid when rows are added; with a number of partitions, most would be merged then.
                config = IvfSq(distance_type="dot", target_partition_size=PARTITION_ROWS)
                retry(table.create_index, "vector", config=config)
            retry(table.optimize, cleanup_older_than=KEPT_VERSIONS)

    def delete(self, files):
        """Remove files with all their tiles from the index, but not from disk.

        Returns:
            int: the number of removed rows.
        """
        names = [name for name in map(self.name_of, files) if not is_not_text(name)]
        return retry(self.table.delete, any_of(names)).num_deleted_rows if names else 0

    def missing(self, files):
        """Those of the files that the index does not hold."""
        names = {file: self.name_of(file) for file in files}
        known = [name for name in names.values() if not is_not_text(name)]
        known = {row["file"] for row in self.select(any_of(known), ["file"])} if known else set()
        return [file for file, name in names.items() if name not in known]

    def prune(self, *, force=False):
        """Remove files that no longer exist from the index.

        Args:
            force: even if all files of the archive, or of another folder, are gone.

        Returns:
            list: their paths.

        Raises:
            FileNotFoundError: if all files of a folder are gone, as when a disk is not mounted; nothing was removed.
            ConnectionError: if other storage cannot be reached; nothing was removed.
        """
        names = {row["file"] for row in self.select(None, ["file"])}
        paths = {self.path_of(name): name for name in names}
        gone = sorted(paths[path] for path in find_gone(paths, root=self.root))
        count, of_gone = (Counter(self._place_of(name) for name in some) for some in (names, gone))
        lost = [place for place in of_gone if of_gone[place] == count[place]]
        if lost and not force:
            raise FileNotFoundError(
                f"All {count[lost[0]]:,} files of {lost[0]} in the index are gone. If a disk is not mounted, mount "
                "it; if this is another account or server, correct that; if the archive was moved, run ieft-search "
                "relocate; to take them out all the same, pass --force."
            )
        for first in range(0, len(gone), 1000):
            retry(self.table.delete, any_of(gone[first : first + 1000]))
        return [self.path_of(name) for name in gone]

    def _place_of(self, name):
        """The folder that may be a mount point of a file: the root, the first two folders of a path, or the server or
        bucket of an address."""
        if is_address(name):
            return "/".join(name.split("/")[:3])
        return os.path.join(*Path(name).parts[:-1][:3]) if os.path.isabs(name) else self.root

    def delete_captions(self, captions):
        """Remove sentences from the index; returns the number of removed ones."""
        captions = [caption.strip() for caption in captions]
        if not captions:
            return 0
        return retry(self.captions.delete, any_of(captions, "caption")).num_deleted_rows

    @property
    def columns(self):
        """Names of the columns of metadata: those of every index, then those of catalogues."""
        return [*METADATA, *columns_of_catalogues(self.table)]

    def rows(self, where=None, *, bbox=None, datetime=None, columns=None):
        """Metadata of the images that match the filters of `search`; of all without one.

        In `where`, `file` is relative to the root; in the rows it is the absolute path.

        Raises:
            ValueError: for an invalid expression, or one that is not a comparison.
        """
        return self._with_paths(self.select(write_where(where, bbox, datetime), columns or self.columns))

    def select(self, where, columns):
        """Rows as they are stored: `file` is relative to the root."""
        return fetch(self.table.search().select(list(columns)), where)

    def _with_paths(self, rows):
        return [row | {"file": self.path_of(row["file"])} if "file" in row else row for row in rows]

    def network(self):
        """Context manager: what embeds, the network without gradients and in the chosen type, or the `Embedder`."""
        return nullcontext(self.embedder) if self.embedder else inference_network(self.model, self.dtype)

    def to_pixels(self, squares):
        """uint8 (I, image_size, image_size, 3) -> (I, 3, image_size, image_size) as the network takes them."""
        # Whatever the processor's settings, it is a linear function of each channel.
        ends = np.zeros((2, 1, 3), np.uint8)
        ends[1] = 255
        low, high = torch.from_numpy(self.processor.image_processor.scale_pixels(ends)).to(self.model.device).unbind(1)
        pixels = torch.from_numpy(squares).to(self.model.device).permute(0, 3, 1, 2)
        return torch.addcmul(low[:, :, None], pixels.float(), (high - low)[:, :, None] / 255)

    @property
    def dim(self):
        """E, the size of the vectors."""
        return self.embedder.dim if self.embedder else self.model.config.contrastive_dim

    @property
    def prepared(self):
        """How images are prepared to be embedded, as fields of a `Job`."""
        if self.embedder:
            return {"side": self.embedder.side, "fit": "", "preprocess": self.embedder.preprocess}
        images = self.processor.image_processor
        return {"side": images.image_size, "fit": images.fit}

    def embed_images(self, images):
        """PIL images -> unit vectors (I, E)."""
        if self.embedder:
            return self.embedder.embed_images(images)
        return self.embed_pixels(self.processor(images=images)["pixel_values"])

    def embed_pixels(self, pixels):
        """(I, 3, image_size, image_size) -> unit vectors (I, E) by the model's own heads."""
        with inference_network(self.model, self.dtype) as network:
            return unit_vectors(network.get_image_features(pixels.to(self.model.device)))

    def embed_captions(self, captions):
        """Sentences -> unit vectors (C, E)."""
        if self.embedder:
            return self.embedder.embed_captions(captions)
        return self.embed_tokens(self.processor(text=captions))

    def embed_caption(self, caption):
        """A sentence -> a unit vector (E,).

        Raises:
            ValueError: for an empty one.
        """
        tokens = self._tokenize(caption)
        return self.embedder.embed_captions([caption])[0] if self.embedder else self.embed_tokens(tokens)[0]

    def similarity_scale(self):
        """By which the loss of what embeds multiplies the similarity."""
        return self.embedder.similarity_scale() if self.embedder else self.model.similarity_scale().item()

    def _tokenize(self, caption):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("A caption to look for expected; got an empty one.")
        return self.processor(text=[caption])

    def embed_tokens(self, tokens):
        """Sentences as the processor encoded them -> unit vectors (C, E) by the model's own heads."""
        tokens = tokens.to(self.model.device)
        with inference_network(self.model, self.dtype) as network:
            return unit_vectors(network.get_text_features(tokens["input_ids"], tokens["attention_mask"]))

    def shortlist(self, vector, top_k=32, *, where=None, bbox=None, datetime=None):
        """The `top_k` nearest images or tiles, best first.

        Args:
            vector: (E,) of a caption or an image.
            where, bbox, datetime: filters, as in `search`.

        Returns:
            list: the columns without the vector, and `similarity`, in [-1, 1].
        """
        return self.find_nearest(vector, top_k, self.columns, write_where(where, bbox, datetime), {})

    def find_nearest(self, vector, top_k, columns, where, unusable):
        """The nearest hits whose files exist; the query is enlarged until there are enough.

        Args:
            unusable: file that cannot be read -> reason; missing files are added.
        """
        asked = top_k
        while True:
            nearest = self._with_paths(_nearest(self.table, vector, asked, columns, where))
            if self.needs_files:
                gone = find_gone({hit["file"] for hit in nearest} - unusable.keys())
                unusable.update(dict.fromkeys(gone, "it was moved or deleted"))
            usable = [hit for hit in nearest if hit["file"] not in unusable]
            if len(usable) < len(nearest) and self._root_has_changed():
                unusable.clear()
                continue
            if len(usable) >= top_k or len(nearest) < asked or asked >= max(MOST_SKIPPED, top_k):
                return usable[:top_k]
            asked *= 2

    def _root_has_changed(self):
        """Whether another process has relocated the archive since."""
        before, self._root = self.root, None
        return self.root != before

    def warn_of(self, unusable):
        """Warn once of the files that a search skipped.

        Raises:
            FileNotFoundError: if the archive itself does not exist.
        """
        if not unusable:
            return
        if self.root and not is_there(self.root):
            raise FileNotFoundError(
                f"The archive of this index, {self.root}, is not there: mount it, or if it was moved, run ieft-search "
                "relocate FOLDER."
            )
        file, why = next(iter(unusable.items()))
        logger.warning(
            "%d files of the index are skipped, such as %s: %s. ieft-search prune takes out those that are gone.",
            len(unusable), file, why,
        )  # fmt: skip

    def search(
        self, query, *, top_k=10, rerank_top_k=32, offset=0, where=None, bbox=None, datetime=None,
        similarity_weight=0.0, min_probability=None,
    ):  # fmt: skip
        """Search images: a shortlist by embedding, its first `rerank_top_k` re-ranked by the network.

        Args:
            query: a sentence, or a `Query` that combines sentences and images. Without a sentence, nothing is
                re-ranked.
            offset: hits to leave out, for further pages: pages of one query are parts of one list, as long as the
                index is not changed.
            where: an SQL filter over the columns, applied before the search: `"north > 48 AND width >= 256"`.
            bbox: west, south, east, north in degrees: only images that touch this box.
            datetime: only images acquired then, such as "2021-06-01", "2021-06/2021-08" or "2021-06-15/..": see
                `ieft.search.filters.write_where`.
            similarity_weight: weight of the embeddings' similarity, scaled as in the contrastive loss, that is added
                to the matching score of a sentence; `run_retrieval.py --rerank_top_k` chooses one on validation data.
            min_probability: only hits of at least this probability, from 0 to 1, of a query that is one sentence. None
                may be left: then nothing in the archive fits, and `Hits.best_probability` tells how unlikely the best
                hit is.

        Returns:
            Hits: as `shortlist`, with `rank` from 1, `stage` ("re-ranked" or "shortlist") and `score`: the matching
            score of re-ranked hits, or of a combination the weighted mean of its parts' scores; the similarity of
            others, which always follow them. `probability` is that of the matching score of one sentence
            (`RankingMixin.probability`), None for other scores and where `has_probability` is False. Of
            overlapping tiles, only the best is returned: see `merge_overlaps`.

        Raises:
            ValueError: for an empty caption, or `top_k` below 1; for a hit in the query that is not in the index; for
                `min_probability` where hits have none.
            FileNotFoundError: if the archive does not exist. Single files that are gone or damaged are skipped with a
                warning.
        """
        options = {"where": where, "bbox": bbox, "datetime": datetime, "similarity_weight": similarity_weight}
        options["min_probability"] = min_probability
        pages = search_many(self, [query], top_k=top_k, rerank_top_k=rerank_top_k, offset=offset, **options)
        return list(pages)[0]

    def search_many(self, queries, **options):
        """Search for many queries, in less time than one after the other.

        Sentences are embedded together, and an image that several queries have in their shortlists is read once. The
        memory needed does not depend on the number of queries.

        Args:
            queries: an iterable of sentences and `Query`.
            options: of `search`, for all of them.

        Returns:
            an iterator of the `Hits` of each query, in order; equal to those of `search` but for rounding.
        """
        return search_many(self, queries, **options)

    def search_image(self, image, *, top_k=10, offset=0, where=None, bbox=None, datetime=None):
        """Search images similar to a PIL image, by embedding only; filters and hits as in `search`."""
        return self.search(Query([image]), top_k=top_k, offset=offset, where=where, bbox=bbox, datetime=datetime)

    def search_captions(self, image, *, top_k=10, rerank_top_k=32, offset=0, similarity_weight=0.0):
        """Search captions of the index for a PIL image, in the two stages of `search`.

        Returns:
            Hits: `caption`, `similarity`, `score`, `probability`, `stage`, `rank`, as those of `search`; empty if the
            index holds no captions.
        """
        check_options(top_k, rerank_top_k, similarity_weight, offset)
        seconds = {}
        with clock(seconds, "embed"):
            vector = self.embed_images([image])[0]
        with clock(seconds, "shortlist"):
            find = partial(_nearest, self.captions, vector, columns=["caption"])
            blocks = in_blocks(find, max(rerank_top_k, FIRST_BLOCK), itemgetter("caption"))
            nearest = next(blocks)
            while len(nearest) < offset + top_k and (more := next(blocks, None)) is not None:
                nearest += more
        if rerank_top_k and nearest:
            with clock(seconds, "re-rank"):
                scores = self._score_captions(image, [hit["caption"] for hit in nearest[:rerank_top_k]])
                is_fitted = self.has_probability and not similarity_weight
                probabilities = self.model.probability(torch.as_tensor(scores)) if is_fitted else None
                weight = similarity_weight * self.similarity_scale()
                scores = [score + weight * hit["similarity"] for score, hit in zip(scores, nearest, strict=False)]
                nearest = order(scores, nearest, probabilities)
        return Hits(number(nearest)[offset : offset + top_k], seconds)

    def _score_captions(self, image, captions):
        tokens = self.processor.tokenizer(captions, truncation=True, max_length=self.processor.max_caption_tokens)
        pixels = self.processor(images=[image])["pixel_values"]
        pairs = [(0, column) for column in range(len(captions))]
        return score_pairs(self.model, list(pixels), tokens["input_ids"], pairs, dtype=self.dtype, progress=False)


def fingerprint_checkpoint(model, processor):
    """A digest of all that embeddings depend on: weights, configuration, preprocessing, tokenizer.

    Weights are compared as bfloat16: the same checkpoint loaded in float32 and in bfloat16 has one fingerprint.
    """
    images, tokenizer = processor.image_processor, processor.tokenizer
    settings = [
        {name: getattr(model.config, name, None) for name in COMPUTED_BY},
        {name: getattr(images, name, None) for name in PREPROCESSED_BY},
        [processor.max_caption_tokens, tokenizer.get_vocab(), tokenizer(PROBE)["input_ids"]],
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu()
        tensor = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    return FINGERPRINT + digest.hexdigest()


def _read_embedder(database):
    """The name of the embedder that made an index; empty if the checkpoint's own heads did."""
    made_with = (database.open_table(IMAGES).schema.metadata or {}).get(EMBEDDER, b"").decode()
    if not made_with or SETTINGS not in database.list_tables().tables:
        return made_with
    rows = database.open_table(SETTINGS).search().where(f"name = '{MOVED_EMBEDDER}'").to_list()
    return rows[0]["value"] if rows else made_with


def _name_difference(uri, made_by, made_with, embedder):
    """Why an index cannot be opened with an embedder, and what to do."""
    this = f"{embedder.name} ({embedder.fingerprint[:12]})"
    if not made_with:
        return (
            f"The index at {uri} was made by the contrastive heads of the checkpoint {made_by[:12]}, not by the "
            f"embedder {this}: leave --embedder out, or make another index."
        )
    if made_with == embedder.name:
        return (
            f"The embedder {this} has changed since the index at {uri} was made with it ({made_by[:12]}). Their "
            "embeddings cannot be compared: take its former weights, or make another index."
        )
    return (
        f"The index at {uri} was made with the embedder {made_with} ({made_by[:12]}); {this} is another one. Their "
        "embeddings cannot be compared: leave --embedder out, or make another index."
    )


@contextmanager
def _store_errors(uri):
    try:
        yield
    except (FileNotFoundError, RuntimeError) as error:
        if isinstance(error, FileNotFoundError) and "lance error" not in str(error):
            raise
        reason = without_place_in_code(error)
        raise ValueError(
            f"{uri} cannot be opened as an index; it is damaged or cannot be written: {reason}"
        ) from error


def _nearest(table, vector, top_k, columns, where=None):
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more; got {top_k}.")
    query = table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector")
    query = query.distance_type("dot").nprobes(PROBES).refine_factor(REFINE)
    query = query.select([*columns, "_distance"]).limit(top_k)
    hits = fetch(query, check_where(where), prefilter=True)
    return [hit | {"similarity": 1 - hit.pop("_distance")} for hit in hits]
