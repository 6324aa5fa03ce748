"""A server of files on loopback: with ranges or without, breaking off, or with a length that is not true."""

import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files`, path -> bytes or the path that it has moved to, and keeps the path and `Range` of each request.

    A path that ends in "/" is answered with links to the files and folders in it.

    Attributes:
        cuts: after how many bytes the answers to the next requests end, the first of these first.
        ranges: whether parts are served.
        tagged: whether files have an `ETag`.
        length: the `Content-Length` that is told instead of the true one.
        kind: the `Content-Type`.
        delay: seconds before the content is sent.
        status: of every answer, if it is an error.
        sent: bytes of content sent so far.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cuts = files, [], []
        self.ranges, self.tagged, self.length, self.status = True, True, None, None
        self.kind, self.delay, self.sent = "application/octet-stream", 0, 0
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients may leave before an answer ends."""


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, wish = self.server, self.headers.get("Range")
        server.requests.append((self.path, wish))
        content = server.files.get(self.path) or self.list_folder()
        if server.status or content is None:
            return self.send_error(server.status or 404)
        if isinstance(content, str):
            self.send_response(302)
            self.send_header("Location", content)
            return self.end_headers()
        tag = f'"{hash(content):x}"'
        parts = wish and server.ranges and self.headers.get("If-Range", tag) == tag
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wish).groups() if parts else (0, "")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        if start >= len(content) > 0:
            return self.send_error(416)
        self.send_response(206 if parts else 200)
        if parts:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        if server.tagged:
            self.send_header("ETag", tag)
        self.send_header("Content-Type", "text/html" if self.path.endswith("/") else server.kind)
        self.send_header("Content-Length", str(server.length or stop - start))
        self.end_headers()
        time.sleep(server.delay)
        if self.command == "HEAD":
            return
        cut = server.cuts.pop(0) if server.cuts else stop - start
        content = content[start : min(start + cut, stop)]
        server.sent += len(content)
        self.wfile.write(content)

    def list_folder(self):
        """Links to what is in a folder, as bytes of HTML; None for no folder."""
        inside = [path[len(self.path) :] for path in self.server.files if path.startswith(self.path)]
        names = sorted({name.partition("/")[0] + "/" * ("/" in name) for name in inside if name})
        if self.path.endswith("/") and names:
            return "".join(f'<a href="{name}">{name}</a>' for name in names).encode()

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
