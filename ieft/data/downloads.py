"""Downloads by http or https URL, each file once: images into a folder, large files into the cache with resumption."""

import hashlib
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from huggingface_hub import cached_assets_path, constants
from huggingface_hub.utils import tqdm

GITHUB = "https://github.com"
GITHUB_VARIABLE = "IEFT_GITHUB_ENDPOINT"  # a mirror of github.com, as HF_ENDPOINT is one of the Hub
BROKEN_OFF = (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
TRIES = 3  # in a row that get no further
PAUSE = 1  # seconds after the first of these; after the second, twice as long
MAX_BYTES = 2**30
TIMEOUT = 20  # seconds without a response
TOTAL_TIMEOUT = 600  # seconds for one image
CHUNK = 2**18


def download(url, folder, *, max_bytes=MAX_BYTES, timeout=TIMEOUT, total_timeout=TOTAL_TIMEOUT):
    """Download a URL into `folder`, or reuse the file from an earlier download.

    Returns:
        (Path, None), or (None, reason).
    """
    if not url.lower().startswith(("http://", "https://")) or not url.isascii():
        return None, f"cannot be downloaded: not an http or https URL in ASCII: {ascii(url)[:200]}"
    path = Path(folder) / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return path, None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ieft"})
        with build_opener().open(request, timeout=timeout) as answer, partial.open("wb") as file:
            reason = _copy(answer, file, max_bytes, time.monotonic() + total_timeout)
        if reason is None:
            partial.replace(path)
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        reason = f"cannot be downloaded: {error}"
    finally:
        partial.unlink(missing_ok=True)
    return (None, reason) if reason else (path, None)


def is_url(source):
    """Whether this is an http or https URL."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def cached_file(url):
    """The file at a URL, from the cache, or downloaded into it with progress.

    The cache is the assets folder of the Hub's libraries (`HF_HOME`, `HF_ASSETS_CACHE`). What was received before a
    download broke off is kept, and the rest is requested if the server says that the file is still the same. The
    variable `IEFT_GITHUB_ENDPOINT` names a mirror of github.com. Once cached, a file is never requested again.

    Args:
        url (`str`): an http or https URL.

    Returns:
        Path: the file, under the name that the URL ends with.

    Raises:
        OSError: if it cannot be downloaded, or is not cached and `HF_HUB_OFFLINE` is set.
    """
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2]) or "file"
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cached_assets_path("ieft", "downloads", key, assets_dir=constants.HF_ASSETS_CACHE)
    path = folder / name
    if path.is_file():
        return path
    if constants.HF_HUB_OFFLINE:
        raise OSError(
            f"{url} is not in the cache, and HF_HUB_OFFLINE is set. Run once where there is a network, or save the "
            f"file as {path}."
        )
    mirror = os.environ.get(GITHUB_VARIABLE, GITHUB).rstrip("/")
    address = mirror + url.removeprefix(GITHUB) if url.startswith(f"{GITHUB}/") else url
    with FileLock(f"{path}.lock"):  # of several processes, one downloads
        if not path.is_file():
            _download_whole(address, path)
    return path


def _download_whole(url, path):
    """Download a URL to `path`, in as many tries as get further than those before."""
    partial, failures, furthest = path.with_name(f"{path.name}.incomplete"), 0, 0
    while True:
        try:
            _receive(url, partial)
            return partial.replace(path)
        except urllib.error.HTTPError as error:
            reason = error
            if error.code == 416:  # what was received is as long as the file, or longer: another file, or damaged
                partial.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise OSError(f"{url} cannot be downloaded: {error}. Check the address.") from error
        except BROKEN_OFF as error:
            reason = error
        except OSError as error:
            if error.errno is None:  # it says everything
                raise
            raise OSError(error.errno, f"{url} cannot be saved as {partial}: {error.strerror}") from error
        received = partial.stat().st_size if partial.exists() else 0
        failures = 1 if received > furthest else failures + 1
        furthest = max(furthest, received)
        if failures == TRIES:
            raise OSError(
                f"{url} cannot be downloaded: {reason}. "
                + (f"{received:,} bytes were received, from which the same command resumes." if received else
                   "Is there a network? A file or folder of this machine can be passed instead.")
            ) from reason  # fmt: skip
        time.sleep(failures * PAUSE)


def _receive(url, partial):
    """Request what `partial` lacks of a URL, or all of it where the server cannot say that the file is the same.

    Raises:
        HTTPException: if the connection ends before the file does.
        OSError: if the answer is a web page.
    """
    version = partial.with_suffix(".version")  # ETag or date of the file that was begun
    start = partial.stat().st_size if partial.exists() and version.exists() else 0
    headers = {"User-Agent": "ieft", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    with build_opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise OSError(
                f"{url} is a web page, not a file. Pass the address of the file itself, or for a "
                "repository on the Hub its name, user/name."
            )
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if answer.status == 206 and not resumed:
            partial.unlink()
            raise HTTPException(f"another part was sent than bytes {start}-")
        start = start if resumed else 0
        tag = answer.headers.get("ETag", "W/")
        tag = answer.headers.get("Last-Modified") if tag.startswith("W/") else tag  # weak ones do not serve here
        version.write_text(tag) if tag else version.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        with partial.open("ab" if resumed else "wb") as file:
            with tqdm(desc=partial.stem, initial=start, total=total, unit="B", unit_scale=True) as progress:
                while chunk := answer.read1(CHUNK):
                    file.write(chunk)
                    progress.update(len(chunk))
    received = partial.stat().st_size
    if total is not None and received != total:
        raise HTTPException(f"the connection ended after {received:,} of {total:,} bytes")
    version.unlink(missing_ok=True)


def build_opener():
    """An opener for http and https only: otherwise a redirect could lead to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _copy(answer, file, max_bytes, deadline):
    size = 0
    while chunk := answer.read1(CHUNK):  # returns what has arrived: `read` would wait for the whole file, however slow
        size += len(chunk)
        if size > max_bytes:
            return f"cannot be downloaded: larger than {max_bytes:,} bytes"
        if time.monotonic() > deadline:
            return "cannot be downloaded: too slow"
        file.write(chunk)
    expected = answer.headers.get("Content-Length")
    if expected and size != int(expected):
        return f"cannot be downloaded: {size:,} of {expected} bytes were received"
    return None
