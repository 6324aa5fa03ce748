"""Adding to an index on several machines, by Ray Data.

Files are read by tasks, embedded by actors that hold the network, and written as fragments of the Lance table that
belong to nobody until this process commits them. A fragment is committed once, whatever was run again because a
machine was lost; what a killed task had written is never seen, and cleaned up like an old version of the table.
See https://docs.ray.io/en/latest/data/data.html and https://lance.org/guide/distributed_write.
"""

import copy
import json
import logging
import os
import re
import socket
import time
from collections import Counter

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

try:
    import lance
    import ray
    import ray.data
    from lance.fragment import FragmentMetadata, write_fragments
except ImportError as error:
    raise ImportError("Indexing on a cluster needs Ray and pylance: pip install 'ieft[cluster]'.") from error

from ieft.data.storage import is_address
from ieft.search.ingestion import (
    Bar,
    add_places_and_times,
    check_tiles,
    embed,
    learn_codebooks,
    look_up,
    names_in_index,
    plan,
    read_in_order,
    read_parts,
    what_remains,
    why_unreadable,
)
from ieft.search.read_ahead import THREADS, ReadAhead
from ieft.search.tables import IMAGES, retry

FILES_PER_TASK = 64
ROWS_PER_FRAGMENT, ROWS_WITH_STATES = 2**14, 2**9  # about 16 MB, and 60
SECONDS_PER_COMMIT = 60  # what a kill of this process costs at most, besides what is under way
SECONDS_TO_CONNECT = 10
STATEMENTS_AT_ONCE = 100  # conditions of one deletion
SQUARE, REPORT = "square", "report"  # columns beside those of the table: prepared pixels; JSON about a file
COMPUTED = ("vector", "state")  # columns by the network


def add_images_on_cluster(index, files, *, tile, overlap, bands, batch_size, address, progress):
    """`ImageIndex.add` with `cluster`."""
    overlap = check_tiles(tile, overlap)
    names, unreadable = names_in_index(index, files)
    report = {"added": 0, "unchanged": 0, "unreadable": unreadable}
    connect(address)
    options = {"tile": tile, "overlap": overlap, "bands": bands}
    with ReadAhead(threads=THREADS) as reader:
        learn_codebooks(index, names, reader, **options)
    with Bar(len(names), progress) as bar, _Committer(index, report, bar) as committer:
        try:
            for row in _run(index, names, options, batch_size).iter_rows() if names else ():
                committer.take(json.loads(row["part"]))
        except ray.exceptions.RayError as error:  # of a task its cause; of an actor that does not start, the last line
            reason = str(getattr(error, "cause", None) or error).strip().split("\n")[-1]
            raise ValueError(f"Work on the cluster failed: {reason}") from error
    return report


def connect(address="auto"):
    """Connect to the Ray cluster at an address; "auto" is that which `ray start` started here or RAY_ADDRESS names.

    Raises:
        ConnectionError: if there is none.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _check_address(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
        ray.init(address=address, logging_level="ERROR", namespace="ieft")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ConnectionError(
            f"A Ray cluster expected at {address}: start one with `ray start --head`, and on each other machine with "
            f"`ray start --address=HOST:6379`. {reason}"
        ) from error


def _check_address(address):
    """Check that something listens at HOST:PORT: Ray itself tries for minutes before it says that nothing does."""
    if match := re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((match[1], int(match[2])), SECONDS_TO_CONNECT).close()


def _run(index, names, options, batch_size):
    """A dataset of what `_write` returns, which is computed as it is read."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = pa.table({"name": names, "file": [index.path_of(name) for name in names]})
    blocks = [files.slice(first, FILES_PER_TASK) for first in range(0, len(files), FILES_PER_TASK)]
    place = {"uri": index.uri, "storage_options": index.storage_options}
    embedder = copy.deepcopy(index.embedder)
    if embedder:
        embedder.to("cpu")
    network = ray.put((copy.deepcopy(index.model).cpu(), index.processor, index.dtype, embedder))
    of_read = {"version": index.table.version, "prepared": index.prepared, "options": options}
    of_reading, of_actors, of_writing = _resources()
    data = ray.data.from_arrow(blocks).map_batches(
        _read,
        batch_format="pyarrow",
        batch_size=None,
        fn_kwargs=place | of_read | {"starts": _Starts.remote()},
        **of_reading,
    )
    data = data.map_batches(
        _Embed,
        batch_format="pyarrow",
        batch_size=batch_size,
        fn_constructor_kwargs=place | {"network": network},
        **of_actors,
    )
    return data.map_batches(
        _write,
        batch_format="pyarrow",
        batch_size=ROWS_WITH_STATES if index.states else ROWS_PER_FRAGMENT,
        fn_kwargs=place,
        **of_writing,
    )


def _resources():
    """Of tasks that read, of actors that embed, and of tasks that write.

    Actors have a GPU each, or where there is none, a processor. Writing is little work for many.
    """
    there = ray.cluster_resources()
    processors = there.get("CPU", 1)
    share = min(1, processors / 4)  # of a small cluster, so that no stage waits for ever for another's processor
    gpus = int(there.get("GPU", 0))
    most = gpus or max(1, min(int(processors), int(processors / share) - 1))
    of_actors = {"num_gpus": 1} if gpus else {"num_cpus": share}
    writers = ray.data.TaskPoolStrategy(size=max(1, int(processors) // 8))
    return (
        {"num_cpus": share},
        of_actors | {"compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most)},
        {"num_cpus": share / 4, "compute": writers},
    )


def _open_table(uri, storage_options):
    return lancedb.connect(uri, storage_options=storage_options).open_table(IMAGES)


@ray.remote(num_cpus=0)
class _Starts:
    """Counts how often each task has begun: Ray runs it again when its process or its machine died."""

    def __init__(self):
        self._counts = Counter()

    def add(self, task):
        self._counts[task] += 1
        return self._counts[task]


def _read(files, *, uri, storage_options, version, prepared, options, starts):
    """Yield tables of rows without vectors, with their image in `SQUARE`; and of each file, last, a `REPORT`."""
    table = _open_table(uri, storage_options)
    table.checkout(version)  # what is lost and read again must be the same, whatever was committed since
    schema = _schema_of_tasks(table.schema)
    paths = dict(zip(files["name"].to_pylist(), files["file"].to_pylist(), strict=True))
    jobs = (
        (plan(name, paths[name], rows, prepared, **options), rows)
        for name, rows in look_up(table, list(paths)).items()
    )
    # A file may have ended the process: in a process of its own it is named, and ends no more.
    num_workers = 1 if ray.get(starts.add.remote(next(iter(paths)))) > 1 else 0
    threads = THREADS if any(map(is_address, paths.values())) else 1
    with ReadAhead(num_workers, threads=threads) as reader:
        reader.wait_for_processes()
        for job, rows, found in read_in_order(reader, jobs):
            for some, error in read_parts(job, rows, found, reader.map):
                yield pa.Table.from_pylist([row | {SQUARE: square.tobytes()} for row, square in some], schema=schema)
                if error:
                    break
            unplaced, stale = what_remains(job, rows, found, error)
            report = {"unchanged": len(found.unchanged), "unplaced": unplaced, "stale": stale}
            report |= {"file": job.file, "error": error and why_unreadable(error, rows)}
            yield _report_row(report, schema)


def _schema_of_tasks(schema):
    """Columns of the table that reading fills, and those that only travel between tasks."""
    kept = [field.remove_metadata() for field in schema if field.name not in COMPUTED]
    return pa.schema([*kept, pa.field(SQUARE, pa.binary()), pa.field(REPORT, pa.string())])


def _report_row(report, schema):
    """A report as a row, which is never written."""
    fields = [field for field in schema if not field.nullable]
    row = {field.name: 0 if pa.types.is_integer(field.type) else "" for field in fields}
    return pa.Table.from_pylist([row | {REPORT: json.dumps(report, default=str)}], schema=schema)


class _Embed:
    """Adds the columns that the network computes."""

    def __init__(self, *, uri, storage_options, network):
        from ieft.search.index import ImageIndex

        torch.set_num_threads(1)  # an actor on a CPU has one processor
        model, processor, dtype, embedder = ray.get(network)
        options = {"storage_options": storage_options, "dtype": dtype, "embedder": embedder}
        self.index = ImageIndex(uri, model, processor=processor, **options)
        self.fields = [field.remove_metadata() for field in self.index.table.schema if field.name in COMPUTED]

    def __call__(self, rows):
        has_image = rows[SQUARE].is_valid()
        reports, rows = rows.filter(pc.invert(has_image)), rows.filter(has_image)
        columns = self._embed(rows[SQUARE].to_pylist()) if len(rows) else []
        for field in self.fields:
            rows = rows.append_column(field, pa.array([row[field.name] for row in columns], type=field.type))
            reports = reports.append_column(field, pa.nulls(len(reports), field.type))
        return pa.concat_tables([rows, reports]).drop_columns([SQUARE])

    def _embed(self, squares):
        side = self.index.prepared["side"]
        kind, shape = (np.float32, (3, side, side)) if self.index.embedder else (np.uint8, (side, side, 3))
        squares = np.stack([np.frombuffer(square, kind).reshape(shape) for square in squares])
        with self.index.network() as network:
            return embed(self.index, network, squares)


def _write(rows, *, uri, storage_options):
    """Write the rows as fragments of the table, which nobody sees before they are committed."""
    reports, new = rows[REPORT].drop_null().to_pylist(), rows.filter(pc.is_null(rows[REPORT]))
    fragments = []
    if len(new):
        dataset = lance.dataset(_open_table(uri, storage_options).uri, storage_options=storage_options)
        for field in dataset.schema:  # a catalogue that is indexed at the same time adds columns
            if field.name not in new.schema.names:
                new = new.append_column(field.name, pa.nulls(len(new), field.type))
        new = new.select(dataset.schema.names).cast(dataset.schema)
        options = {"mode": "append", "storage_options": storage_options}
        fragments = write_fragments(new, dataset.uri, schema=dataset.schema, **options)
    part = {"rows": len(new), "reports": list(map(json.loads, reports))}
    return pa.table({"part": [json.dumps(part | {"fragments": [found.to_json() for found in fragments]})]})


class _Committer:
    """Commits fragments, some at a time, and at the end changes what was in the index before: as a context manager.

    What has arrived is committed also when an error or the user ends the work.
    """

    def __init__(self, index, report, bar):
        self.index, self.report, self.bar = index, report, bar
        self._fragments, self._unplaced, self._stale = [], [], []
        self._last = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self._commit()
        if kind is not None:  # rows of some files may not have come: the next run deletes what they replace
            return
        add_places_and_times(self.index, self._unplaced)
        for first in range(0, len(self._stale), STATEMENTS_AT_ONCE):
            conditions = self._stale[first : first + STATEMENTS_AT_ONCE]
            retry(self.index.table.delete, " OR ".join(conditions))

    def take(self, part):
        """What `_write` returned."""
        self._fragments += part["fragments"]
        self.report["added"] += part["rows"]
        self.bar.add_tiles(part["rows"], 0)
        for of_file in part["reports"]:
            self.report["unchanged"] += of_file["unchanged"]
            self._unplaced += of_file["unplaced"]
            self._stale += filter(None, [of_file["stale"]])
            if of_file["error"]:
                self.report["unreadable"][of_file["file"]] = of_file["error"]
            self.bar.end_file()
        if time.monotonic() - self._last > SECONDS_PER_COMMIT:
            self._commit()

    def _commit(self):
        if self._fragments:
            retry(_append, self.index, self._fragments)
        self._fragments, self._last = [], time.monotonic()


def _append(index, fragments):
    options = {"storage_options": index.storage_options}
    dataset = lance.dataset(index.table.uri, **options)
    operation = lance.LanceOperation.Append([FragmentMetadata.from_json(json.dumps(found)) for found in fragments])
    lance.LanceDataset.commit(dataset.uri, operation, read_version=dataset.version, **options)
