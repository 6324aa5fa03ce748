"""Images of an archive as rows of the index, read ahead of the network: in a thread, or in worker processes."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from ieft.data.images import parse_bands
from ieft.search.archive_files import digest_file, find_limits, plan_tiles, read_tiles, read_whole
from processing_ieft import fit_square

logger = logging.getLogger(__name__)

FILES_PER_TASK = 8
THREADS = 8  # where files are in other storage, which answers several requests at once
TASKS_AHEAD = 16  # of files: as many images as the network takes at once, twice
BYTES_PER_TASK = 2**24  # of images: with more tiles than these, an image is read in several tasks
MOST_BYTES_PER_TASK = 2**26  # with the rest of a row of tiles
DIED = "the process that read it died; the file may be damaged, or memory too small"


class Job(NamedTuple):
    """A file to index.

    Attributes:
        name, file: in the index, and its path.
        tile, overlap: how it is to be cut; without `tile` it is kept whole.
        bands: such as "4,3,2", or empty.
        known: (content, tiling, bands, (col, row)) of each row that the index holds of it.
        side, fit: of the network's input.
        preprocess: instead of `fit`, an embedder's function that makes an array of an image; it can be pickled.
    """

    name: str
    file: str
    tile: int | None
    overlap: float
    bands: str
    known: frozenset
    side: int
    fit: str
    preprocess: Callable | None = None


class FileRead(NamedTuple):
    """What was found in a file.

    Attributes:
        content: SHA-256 of its bytes.
        tiling: how it is cut; empty for whole images.
        unchanged: columns and rows of what the index holds already.
        rows: pairs of metadata and uint8 array (side, side, 3), or what the job's `preprocess` made.
        later: windows of tiles that are not read yet.
        by_window: whether these can be read without the rest of the image.
        limits: their stretch range.
        error: why it cannot be read, or no further than `rows`; or None.
    """

    content: str = ""
    tiling: str = ""
    unchanged: frozenset = frozenset()
    rows: tuple = ()
    later: tuple = ()
    by_window: bool = False
    limits: list | None = None
    error: str | None = None


def read_files(jobs):
    """Read files, and of scenes with many tiles the windows only: a `FileRead` for each job."""
    found, size = [], 0
    for job in jobs:
        found.append(_read_file(job, (BYTES_PER_TASK - size) // _bytes(job)))
        size += len(found[-1].rows) * _bytes(job)
    return found


def _bytes(job):
    """Of an image for the network."""
    return 3 * job.side**2 * (4 if job.preprocess else 1)  # float32 or bytes


def _read_file(job, room):
    try:
        bands = parse_bands(job.bands or None)
        content = digest_file(job.file)
        plan = plan_tiles(job.file, job.tile, job.overlap, bands=bands)
        tiling = f"{job.tile} pixels, overlap {job.overlap}" if plan.windows else ""
        unchanged = frozenset(place for *made_of, place in job.known if made_of == [content, tiling, job.bands])
        found = FileRead(content, tiling, unchanged)
        if not plan.windows and not unchanged:
            row, image = read_whole(job.file, bands=bands)
            return found._replace(rows=((row, _fit(image, job)),))
        missing = tuple(window for window in plan.windows if window[:2] not in unchanged)
        if len(missing) > room:
            limits = find_limits(job.file, bands=bands) if plan.by_window else None
            return found._replace(later=missing, by_window=plan.by_window, limits=limits)
        rows, error = read_some_tiles(job, missing, None)
        return found._replace(rows=rows, error=error)
    except (OSError, ValueError) as error:
        return FileRead(error=str(error))


def read_some_tiles(job, windows, limits, is_first=True):
    """Rows of some tiles of a scene, as far as they can be read, and the error that ended that, or None."""
    return take_tiles(read_all_tiles(job, windows, limits, is_first), len(windows))


def read_all_tiles(job, windows, limits, is_first=True):
    """Yield the row and the image of each tile."""
    options = {"bands": parse_bands(job.bands or None), "limits": limits, "warn": is_first}
    for row, image in read_tiles(job.file, windows, **options):
        yield row, _fit(image, job)


def take_tiles(tiles, count):
    """Up to `count` rows of an iterator, and the error that ended them before, or None."""
    rows = []
    try:
        rows.extend(islice(tiles, count))  # keeps those before an error
    except (OSError, ValueError) as error:
        return tuple(rows), str(error)
    return tuple(rows), None


def _fit(image, job):
    return job.preprocess(image) if job.preprocess else np.asarray(fit_square(image, job.side, job.fit))


def group_tiles(job, windows):
    """Windows of a scene in their order, in groups for a task each.

    Neighbours share blocks of the file: a row of tiles stays together unless it is long.
    """
    some, most = (max(1, size // _bytes(job)) for size in (BYTES_PER_TASK, MOST_BYTES_PER_TASK))
    group = []
    for window in windows:
        starts_row = group and window.row != group[-1].row
        if (starts_row and len(group) >= some) or len(group) >= most:
            yield tuple(group)
            group = []
        group.append(window)
    if group:
        yield tuple(group)


class ReadAhead:
    """Runs tasks before their results are asked for, in order: as a context manager.

    A process that has threads, as it has after LanceDB is imported or the network has run, cannot be forked safely:
    workers are then started anew, which takes seconds, in which tasks run in a thread, as without workers.
    """

    def __init__(self, num_workers=0, *, threads=1):
        """
        Args:
            num_workers: number of worker processes.
            threads: number of threads, for tasks that wait for storage, and until the processes are up.
        """
        self.num_workers, self._threads = num_workers, threads
        self._processes = self._is_ready = None
        if num_workers:
            self._start()
        self._thread = ThreadPoolExecutor(threads)

    def _start(self):
        self._processes = _start_processes(self.num_workers)
        self._is_ready = self._processes.submit(int)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for executor in filter(None, (self._thread, self._processes)):
            executor.shutdown(wait=False, cancel_futures=True)

    def wait_for_processes(self):
        """Wait until the worker processes are up, so that no task runs in this one."""
        if self._is_ready is not None:
            self._is_ready.exception()

    def map(self, function, tasks, ahead=1):
        """Yield function(*task) for each task, in order.

        Args:
            ahead: number of tasks that wait for those who take the results, besides one for each worker.

        Yields:
            results; of a task whose process dies, and that is run again alone and dies again, `BrokenProcessPool`.
        """
        waiting = deque()
        for task in tasks:
            waiting.append((task, self._submit(function, task)))
            if len(waiting) > ahead + max(self.num_workers, self._threads):
                yield self._result(function, *waiting.popleft())
        while waiting:
            yield self._result(function, *waiting.popleft())

    def _submit(self, function, task):
        if self._is_ready is not None and self._is_ready.done():
            try:
                self._is_ready.result()
                return self._processes.submit(_run_with_logs, function, task)
            except BrokenProcessPool:
                self._replace_processes()
        return self._thread.submit(function, *task)

    def _replace_processes(self):
        """After the death of one, the others are ended: new ones are started, but not if they never began to work."""
        self._processes.shutdown(wait=False)
        if self._is_ready.exception() is None:
            self._start()
            return
        logger.warning("Worker processes cannot be started: images are read in one thread.")
        self._processes = self._is_ready = None

    def _result(self, function, task, future):
        try:
            result = future.result()
        except BrokenProcessPool:  # one task ended its process; the others that were under way are lost with it
            return self.run_alone(function, task)
        return _log_here(*result) if isinstance(result, _WithLogs) else result

    def run_alone(self, function, task):
        """The result of a task in a new process, or the `BrokenProcessPool` with which that died."""
        with _start_processes(1) as process:
            try:
                return _log_here(*process.submit(_run_with_logs, function, task).result())
            except BrokenProcessPool as died:
                return died


class _WithLogs(NamedTuple):
    result: object
    records: list


class _Collect(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        record.msg, record.args, record.exc_info = record.getMessage(), None, None  # what can be pickled
        self.records.append(record)


def _run_with_logs(function, task):
    """The result, and the warnings, which the main process logs."""
    root, collected = logging.getLogger(), _Collect()
    root.handlers = [collected]
    return _WithLogs(function(*task), collected.records)


def _log_here(result, records):
    for record in records:
        logging.getLogger(record.name).handle(record)
    return result


def default_workers():
    """As many worker processes as leave one processor to the network, up to 16; none if they would start slowly."""
    if not _can_fork():
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(processors - 1, 1), 16)


def _start_processes(count):
    kind = "fork" if _can_fork() else "forkserver" if os.name == "posix" else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([__name__])  # imported once for all of them
    return ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)


def _can_fork():
    """Whether no thread may hold a lock, which a forked process would wait for without end.

    Threads of numpy's and torch's linear algebra are no danger: these libraries provide for forks.
    """
    return sys.platform == "linux" and threading.active_count() == 1 and "lancedb" not in sys.modules


def _end_with_parent():
    """Ends a worker whose parent was killed, leaves an interruption to the parent, and computes in one thread."""
    torch.set_num_threads(1)  # an embedder's preprocessing would else start as many as there are processors
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
