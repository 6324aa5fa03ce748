"""A server of single files on loopback: with ranges or without, breaking off, or with a length that is not true."""

import hashlib
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files`, path -> bytes or the path that it has moved to, and keeps the path and `Range` of each request.

    Attributes:
        cuts: after how many bytes the answers to the next requests end, the first of these first.
        ranges: whether parts are served.
        tagged: whether files have an `ETag`.
        length: the `Content-Length` that is told instead of the true one.
        kind: the `Content-Type`.
        delay: seconds before the content is sent.
        status: of every answer, if it is an error.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cuts = files, [], []
        self.ranges, self.tagged, self.length, self.status = True, True, None, None
        self.kind, self.delay = "application/octet-stream", 0
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wish = self.server, self.headers.get("Range")
        server.requests.append((self.path, wish))
        content = server.files.get(self.path)
        if server.status or content is None:
            return self.send_error(server.status or 404)
        if isinstance(content, str):
            self.send_response(302)
            self.send_header("Location", content)
            return self.end_headers()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = int(re.fullmatch(r"bytes=(\d+)-", wish)[1]) if wish and server.ranges else 0
        start = start if self.headers.get("If-Range") == tag else 0
        if start >= len(content) > 0:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.tagged:
            self.send_header("ETag", tag)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(server.length or len(content) - start))
        self.end_headers()
        time.sleep(server.delay)
        cut = server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start : start + cut])

    def log_message(self, *args):
        """Tests stay silent."""


@contextmanager
def running_files(files):
    """A running `FileServer`."""
    server = FileServer(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
