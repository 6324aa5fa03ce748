"""Files on any storage that fsspec opens (`s3://`, `gs://`, `az://`, `https://`), read by ranges of bytes.

What was read is kept in memory in blocks, up to `KEPT_BYTES` in a process: a window of a large image costs about the
bytes of that window, and reading it again costs nothing.
"""

import hashlib
import io
import os
import re
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import fsspec
from fsspec.core import url_to_fs

BLOCK = 2**14
FIRST = 2**16  # bytes that are read where a file begins: most headers are shorter
KEPT_BYTES = 2**26
SMALL = 2**20  # files of up to so many bytes are read in one request
LARGEST_REQUEST = 2**23
LARGEST_WHOLE = 2**28  # of a file on a server that serves no parts
ATTEMPTS = 4  # at a request; clients of object storage repeat requests themselves
THREADS = 16  # requests at once
FRESH, JUST_TOLD = 60, 2  # seconds in which what a storage told of a file is true for reading it; for its existence
MOST_TOLD = 10_000  # files of which it is kept
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az", "adl": "az"}
VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest")  # in what fsspec tells of a file
TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created")


class FileState(NamedTuple):
    """What a storage tells of a file without reading it.

    Attributes:
        size: in bytes.
        changed: the time of its last change, or None.
        version: a digest that changes with the content, of the storage's ETag or of size and time; None if the
            storage tells neither.
    """

    size: int
    changed: datetime | None
    version: str | None


def is_address(place):
    """Whether a string is an address such as `s3://bucket/key`, and not a path of this machine."""
    return isinstance(place, str) and bool(ADDRESS.match(place)) and not place.lower().startswith("file://")


def suffix_of(address):
    """The suffix of a file's name in lower case, without the query of a URL."""
    path = urlsplit(address).path if address.lower().startswith(("http://", "https://")) else address
    return os.path.splitext(path)[1].lower()


class RemoteFile:
    """A file at an address, of which parts can be read.

    Attributes:
        address: of the file.
        state: its `FileState` when it was opened.
        error: the error of the last failed read, or None. GDAL does not pass errors of its files on.
    """

    def __init__(self, address, *, ahead=0):
        """Open a file.

        Args:
            ahead: bytes to read further at once, where a read goes on from what was read before.

        Raises:
            FileNotFoundError: if there is no such file.
            OSError: if it cannot be reached.
        """
        self.address, self.ahead, self.error = address, ahead, None
        self.state = read_state(address)
        self._key = address, self.state
        self._stream = self._whole = None  # of HTTP
        # Threads that read neighbouring parts of a file wait for each other, and find what both of them need.
        self._lock = _locks.setdefault(self._key, threading.Lock())

    def __str__(self):
        return self.address

    def open(self, *, quiet=False):
        """A new file object to read from.

        Args:
            quiet: after an error, which is kept in `error`, its reads end early instead of raising it.
        """
        return _Reader(self, quiet)

    def read(self, start=0, stop=None):
        """Bytes `start` to `stop` of the file; to its end by default."""
        size = self.state.size
        stop = size if stop is None else min(stop, size)
        if start >= stop:
            return b""
        with self._lock:
            try:
                return self._read(start, stop)
            except Exception as error:
                self.error = error
                raise

    def _read(self, start, stop):
        parts, number, last = [], start // BLOCK, (stop - 1) // BLOCK
        while number <= last:
            block = _kept.get(self._key, number)
            fetched = [block] if block is not None else self._fetch_blocks(number, last)
            for block in fetched:
                first = number * BLOCK
                parts.append(block[max(0, start - first) : stop - first])
                number += 1
                if number > last:
                    break
        return b"".join(parts)

    def _fetch_blocks(self, number, last):
        """The blocks from `number` on that are not kept, in one request; they are then kept."""
        size = self.state.size
        number_of_blocks = -(-size // BLOCK)
        if size <= SMALL:
            last = number_of_blocks - 1
        elif number == 0 and not self.ahead:
            last = max(last, FIRST // BLOCK - 1)
        elif self.ahead and (number == 0 or _kept.get(self._key, number - 1) is not None):
            last = max(last, min(number_of_blocks - 1, number + self.ahead // BLOCK))
        stop = number + 1
        while stop <= last and (stop - number) * BLOCK < LARGEST_REQUEST and _kept.get(self._key, stop) is None:
            stop += 1
        content = self._fetch(number * BLOCK, min(stop * BLOCK, size))
        blocks = [content[first : first + BLOCK] for first in range(0, len(content), BLOCK)]
        for place, block in enumerate(blocks, start=number):
            _kept.put(self._key, place, block)
        return blocks

    def _fetch(self, start, stop):
        return _attempt(self.address, lambda: self._fetch_once(start, stop))

    def _fetch_once(self, start, stop):
        system, path = find_storage(self.address)
        if _is_http(self.address):
            content = self._fetch_of_http(system, path, start, stop)
        else:
            content = system.cat_file(path, start=start, end=stop)
        if len(content) != stop - start:
            raise ConnectionError(f"{stop - start:,} bytes expected; {len(content):,} came")
        return content

    def _fetch_of_http(self, system, path, start, stop):
        """A part of a file; the whole of it from a server that serves no parts, of bounded size."""
        if self._stream is None:
            self._stream = system.open(path, "rb", block_size=BLOCK, cache_type="none", size=self.state.size)
        try:
            self._stream.seek(start)
            return self._stream.read(stop - start)
        except ValueError as error:
            if "range" not in str(error):
                raise
            if self.state.size > LARGEST_WHOLE:
                raise ValueError(
                    "its server does not serve parts of files (HTTP range requests), and it is too large to be read "
                    "whole: copy it to another server or to this machine"
                ) from error
        self._whole = self._whole or system.cat_file(path)
        return self._whole[start:stop]


class _Reader(io.RawIOBase):
    """A file object over a `RemoteFile`, for Pillow and GDAL."""

    def __init__(self, file, quiet):
        self.file, self.quiet, self.place = file, quiet, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.place

    def seek(self, offset, whence=io.SEEK_SET):
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.file.state.size}[whence]
        return self.place

    def read(self, size=-1):
        stop = None if size is None or size < 0 else self.place + size
        try:
            content = self.file.read(self.place, stop)
        except Exception:
            if not self.quiet:
                raise
            return b""
        self.place += len(content)
        return content

    readall = read

    def readinto(self, buffer):
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _Blocks:
    """Blocks of files by (file, number), the least recently used ones forgotten first."""

    def __init__(self):
        self.forget()

    def forget(self):
        self.blocks, self.bytes, self.lock = OrderedDict(), 0, threading.Lock()

    def get(self, file, number):
        with self.lock:
            block = self.blocks.get((file, number))
            if block is not None:
                self.blocks.move_to_end((file, number))
            return block

    def put(self, file, number, block):
        with self.lock:
            if (file, number) in self.blocks:
                return
            self.blocks[file, number] = block
            self.bytes += len(block)
            while self.bytes > KEPT_BYTES:
                self.bytes -= len(self.blocks.popitem(last=False)[1])


_kept = _Blocks()
_locks: WeakValueDictionary = WeakValueDictionary()  # of files that are open
_listed: dict[str, tuple] = {}  # address -> state that was told when it was listed, until the file is opened
_told: OrderedDict[str, tuple] = OrderedDict()  # address -> (state, when it was told), of the last files
if hasattr(os, "register_at_fork"):  # a thread of the parent may hold a lock
    os.register_at_fork(after_in_child=_kept.forget)
    os.register_at_fork(after_in_child=_locks.clear)


def find_storage(address):
    """The fsspec file system of an address, and the address as a path of it.

    Raises:
        ImportError: if a package is missing for it.
        ValueError: for an unknown kind of storage.
    """
    kind = address.partition("://")[0].lower()
    if "::" in address:
        raise ValueError(f"{address}: files inside of other files are not read; unpack them first.")
    try:
        return url_to_fs(address, use_listings_cache=False, **_options_of_gdal(kind))
    except ImportError as error:
        what = f"pip install 'ieft[{EXTRAS[kind]}]'" if kind in EXTRAS else str(error)
        raise ImportError(f"{kind}:// needs another package: {what}") from error
    except ValueError as error:
        raise ValueError(f"{address}: an address of a kind that fsspec opens expected: {error}") from error


def _options_of_gdal(kind):
    """Options from the environment variables of GDAL that fsspec's file systems do not read themselves.

    See https://gdal.org/user/virtual_file_systems.html. What is set for fsspec itself (`FSSPEC_S3_...`) comes first.
    """
    env, found = os.environ, {}
    is_set = {name for name in env if env[name].upper() in ("YES", "TRUE", "ON", "1")}
    if kind in ("s3", "s3a"):
        if "AWS_NO_SIGN_REQUEST" in is_set:
            found["anon"] = True
        if host := env.get("AWS_S3_ENDPOINT"):
            scheme = "http" if env.get("AWS_HTTPS", "YES").upper() in ("NO", "FALSE", "OFF", "0") else "https"
            found["endpoint_url"] = host if "://" in host else f"{scheme}://{host}"
    elif kind in ("gs", "gcs") and "GS_NO_SIGN_REQUEST" in is_set:
        found["token"] = "anon"
    elif EXTRAS.get(kind) == "az":
        if "AZURE_NO_SIGN_REQUEST" in is_set:
            found["anon"] = True
        named = {"account_name": "AZURE_STORAGE_ACCOUNT", "account_key": "AZURE_STORAGE_ACCESS_KEY"}
        found |= {option: env[name] for option, name in named.items() if name in env}
    return {name: value for name, value in found.items() if name not in fsspec.config.conf.get(kind, {})}


def read_file(address):
    """The bytes of a whole file; errors as `read_state`."""
    system, path = find_storage(address)
    return _attempt(address, lambda: system.cat_file(path))


def tells_json(address):
    """Whether a server says that an address is JSON; False for storage that tells no kinds."""
    if not _is_http(address):
        return False
    system, path = find_storage(address)
    return "json" in _attempt(address, lambda: system.info(path)).get("mimetype", "")


def read_state(address):
    """The `FileState` of a file, as it was listed, or else as its storage tells it now.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be reached.
    """
    if state := _listed.pop(address, None):
        return _remember(address, state)
    state, when = _told.get(address, (None, 0))
    return state if state and time.monotonic() - when < FRESH else check_state(address)


def _remember(address, state):
    _told.pop(address, None)
    _told[address] = state, time.monotonic()
    while len(_told) > MOST_TOLD:
        try:
            _told.popitem(last=False)
        except KeyError:  # another thread was first
            break
    return state


def check_state(address):
    """The `FileState` of a file, as its storage tells it now; errors as `read_state`."""
    _listed.pop(address, None)
    _told.pop(address, None)
    system, path = find_storage(address)
    info = _attempt(address, lambda: system.info(path))
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{address} is a folder, and no file.")
    if info.get("size") is None:
        raise OSError(f"{address}: its server does not tell its size.")
    return _remember(address, _state_of(info))


def is_missing(address, *, since=0):
    """Whether a file certainly does not exist.

    Args:
        since: seconds; what its storage told in them is taken as true.

    Raises:
        ConnectionError: if its storage cannot be reached.
    """
    if time.monotonic() - _told.get(address, (None, -float("inf")))[1] < since:
        return False
    try:
        check_state(address)
    except FileNotFoundError:
        return True
    except ConnectionError:
        raise
    except (OSError, ValueError):
        pass
    return False


def find_missing(addresses, *, below=""):
    """Those of the addresses of which there certainly is no file.

    Args:
        below: an address that is listed first, so that those in the list need no request of their own. Without it,
            what the storage has just told of a file is taken as true.

    Raises:
        ConnectionError: if the storage cannot be reached.
    """
    if is_address(below) and not _is_http(below):
        try:
            there = set(list_files(below))
        except FileNotFoundError:
            there = set()
        addresses = [address for address in addresses if address not in there]
    addresses = list(addresses)
    found = in_parallel(partial(is_missing, since=0 if below else JUST_TOLD), addresses)
    return {address for address, gone in zip(addresses, found, strict=True) if gone}


def in_parallel(function, items):
    """The results of a function that waits for storage, in order."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(THREADS, len(items))) as pool:
        return list(pool.map(function, items))


def list_files(address, unreadable=None):
    """Addresses of all files below an address, sorted; of the file itself, if it is one.

    Args:
        unreadable: a dict; folders that cannot be listed are added with the reason.

    Raises:
        FileNotFoundError: if there are none.
        OSError: if the storage cannot be reached, or without `unreadable` if a folder cannot be listed.
    """
    system, path = find_storage(address)
    is_flat = address.partition("://")[0].lower() in EXTRAS  # a folder is no more than a part of names
    found = _attempt(address, lambda: system.find(path, detail=True)).values() if is_flat else None
    files = []
    for info in found if is_flat else _walk(system, path, address, unreadable):
        name = info["name"] if is_address(info["name"]) else system.unstrip_protocol(info["name"])
        files.append(name)
        if info.get("size") is not None:
            _listed[name] = _state_of(info)
    if not files:
        raise FileNotFoundError(f"Files expected at {address}; there are none.")
    return sorted(set(files))


def _walk(system, path, address, unreadable):
    """What a storage tells of each file below a folder. fsspec's own walk leaves out folders that it cannot list."""
    folders, visited = [f"{path.rstrip('/')}/"], set()
    while folders:
        folder = folders.pop()
        visited.add(folder.rstrip("/"))
        try:
            entries = _attempt(folder, lambda folder=folder: system.ls(folder, detail=True))
        except OSError as error:
            if unreadable is None or len(visited) == 1:
                raise
            unreadable[folder] = f"this folder cannot be listed: {error}"
            continue
        for info in entries:
            if info["type"] != "directory":
                yield info
            elif info["name"].rstrip("/") not in visited and not info["name"].rstrip("/").endswith(("/.", "/..")):
                folders.append(info["name"])


def _state_of(info):
    times = (_time_of(info[name]) for name in TIMES if info.get(name))
    changed = next((found for found in times if found), None)
    version = next((str(info[name]).strip('"') for name in VERSIONS if info.get(name)), None)
    version = version or (changed and changed.isoformat())
    size = int(info["size"])
    # A digest, since a server may tell anything, and this becomes part of SQL.
    return FileState(size, changed, version and hashlib.sha256(f"{size} {version}".encode()).hexdigest())


def _time_of(told):
    """A time in UTC of what a storage tells: a datetime, seconds, ISO 8601, or a date of HTTP; None for others."""
    try:
        if isinstance(told, int | float):
            return datetime.fromtimestamp(told, timezone.utc)
        if isinstance(told, str):
            is_iso = told[:1].isdigit()
            told = datetime.fromisoformat(told.replace("Z", "+00:00")) if is_iso else parsedate_to_datetime(told)
        return (told if told.tzinfo else told.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (AttributeError, OverflowError, TypeError, ValueError):
        return None


def _is_http(address):
    return address.lower().startswith(("http://", "https://"))


def _attempt(address, request):
    """Make a request, and repeat it if the connection is lost.

    Raises:
        FileNotFoundError, PermissionError: as the storage says.
        ConnectionError: if it is lost each time; names the address.
    """
    attempts = ATTEMPTS if _is_http(address) else 1
    for attempt in range(attempts):
        try:
            with _true_errors(address):
                return request()
        except ConnectionError as error:
            if attempt == attempts - 1:
                times = f" {attempts} times" if attempts > 1 else ""
                raise ConnectionError(f"{address}: the connection was lost{times}: {error}") from error
            time.sleep(0.2 * 2**attempt)


@contextmanager
def _true_errors(address):
    """Turn what fsspec and its clients raise into FileNotFoundError, PermissionError, ConnectionError or ValueError.

    fsspec's HTTP client raises FileNotFoundError for any error, such as of a server that cannot be reached.
    """
    try:
        yield
    except (ConnectionError, PermissionError, ValueError):
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None and getattr(cause, "status", None) is None:
            cause = cause.__cause__
        status = getattr(cause, "status", None)  # of HTTP
        reason = f"{type(cause).__name__}: {cause}"
        if status in (404, 410) or isinstance(error, FileNotFoundError) and (cause is error or not _is_http(address)):
            raise FileNotFoundError(f"{address} does not exist.") from error
        if "Credential" in type(cause).__name__:
            hint = "; a public bucket needs AWS_NO_SIGN_REQUEST=YES" if address.startswith("s3") else ""
            raise PermissionError(f"{address} may not be read without credentials: {cause}{hint}") from error
        if status in (401, 403):
            raise PermissionError(f"{address} may not be read: {reason}") from error
        if status is not None and status < 500 and status not in (408, 429):
            raise OSError(f"{address} cannot be read: {reason}") from error
        raise ConnectionError(reason) from error
