"""Downloads images by http or https URL into a folder, each one once."""

import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

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
