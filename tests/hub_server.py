"""A local Hugging Face Hub with the endpoints needed to push a model over HTTP and to load it again.

Commits are kept in memory, on one branch. There are no accounts, pull requests or xet storage.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

USER = "someone"
FILE_NAMES_FOR_LFS = (".safetensors", ".bin", ".parquet", ".png")


class Hub:
    """Repositories: name -> list of commits, each (sha, {path: bytes}); and files uploaded, by their sha256."""

    def __init__(self):
        self.commits = {}
        self.uploads = {}
        self.requests = []

    def create(self, name):
        name = name if "/" in name else f"{USER}/{name}"
        if name not in self.commits:
            self.commits[name] = []
            self.commit(name, {".gitattributes": b""})
        return name

    def put(self, name, files):
        """A repository with these files; its name may have no user, as those of the oldest models."""
        self.commits[name] = []
        self.commit(name, files)

    def commit(self, name, files, deleted=()):
        everything = (self.files(name) if self.commits[name] else {}) | files
        everything = {path: content for path, content in everything.items() if path not in deleted}
        sha = hashlib.sha1(f"{name} {len(self.commits[name])}".encode()).hexdigest()
        self.commits[name].append((sha, everything))
        return sha

    def files(self, name, revision="main"):
        """Path -> bytes at a commit or at the newest, or None if there is no such commit."""
        if revision == "main":
            return self.commits[name][-1][1]
        return dict(self.commits[name]).get(revision)


def describe_path(path, files):
    """One entry of a tree: a file, or a folder if no file has that path."""
    oid = hashlib.sha1(files.get(path, path.encode())).hexdigest()
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
    return {"type": "directory", "path": path, "oid": oid}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method):
        self.body = self.read_body()
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append((method, path))
        for methods, pattern, respond in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods:
                return respond(self, **match.groupdict())
        self.send_error_code(404, "EntryNotFound", f"no such endpoint: {method} {path}")

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content):
        self.send(json.dumps(content).encode(), Content_Type="application/json")

    def send_error_code(self, status, code, message):
        self.send(b"{}", status, X_Error_Code=code, X_Error_Message=message)

    def log_message(self, *args):
        """Tests stay silent."""

    # Answers ----------------------------------------------------------------------------------------------------

    def whoami(self):
        self.send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        wish = json.loads(self.body)
        name = self.hub.create("/".join(filter(None, [wish.get("organization"), wish["name"]])))
        self.send_json({"url": f"{self.server.address}/{name}", "name": name})

    def validate_yaml(self):
        page = json.loads(self.body)["content"]
        errors = [] if page.startswith("---\n") else [{"message": "no metadata"}]
        self.send_json({"errors": errors, "warnings": []})

    def preupload(self, name):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(FILE_NAMES_FOR_LFS) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send_json({"files": files})

    def lfs_batch(self, name):
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "actions": {"upload": {"href": f"{self.server.address}/uploads/{wanted['oid']}"}},
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self.send(b"")

    def commit(self, name):
        files, deleted = {}, []
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.uploads[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(entry["value"]["path"])
        sha = self.hub.commit(name, files, deleted)
        self.send_json({"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def describe(self, name, revision="main"):
        if name not in self.hub.commits:
            return self.send_error_code(404, "RepoNotFound", "no such repository")
        sha = self.hub.commits[name][-1][0] if revision == "main" else revision
        siblings = [{"rfilename": path} for path in self.hub.files(name, sha)]
        self.send_json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, name, revision, folder=None):
        """What lies in a folder, and with `recursive` all below it."""
        if name not in self.hub.commits:
            return self.send_error_code(404, "RepoNotFound", "no such repository")
        files = self.hub.files(name, revision)
        start = f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(start)]
        if folder and not below:
            return self.send_error_code(404, "EntryNotFound", "no such folder")
        if "recursive=true" not in self.path.lower():
            below = {start + path[len(start) :].split("/")[0] for path in below}
        self.send_json([describe_path(path, files) for path in sorted(below)])

    def paths_info(self, name, revision):
        wish = parse_qs(self.body.decode())["paths"] if b"paths=" in self.body else json.loads(self.body)["paths"]
        files = self.hub.files(name, revision)
        known = [path for path in wish if path in files or any(each.startswith(f"{path}/") for each in files)]
        self.send_json([describe_path(path, files) for path in known])

    def resolve(self, name, revision, path):
        if name not in self.hub.commits:
            return self.send_error_code(404, "RepoNotFound", "no such repository")
        sha = self.hub.commits[name][-1][0] if revision == "main" else revision
        content = (self.hub.files(name, sha) or {}).get(path)
        if content is None:
            return self.send_error_code(404, "EntryNotFound", "no such file")
        self.send(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=sha)


KIND = r"(?:models|datasets)"
NAME = r"(?P<name>(?:[^/]+/)?[^/]+?)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/{KIND}/{NAME}/preupload/[^/]+", Handler.preupload),
    ("POST", rf"/api/{KIND}/{NAME}/commit/[^/]+", Handler.commit),
    ("POST", rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/uploads/(?P<oid>[0-9a-f]+)", Handler.upload),
    ("GET", rf"/api/{KIND}/{NAME}", Handler.describe),
    ("GET", rf"/api/{KIND}/{NAME}/revision/(?P<revision>[^/]+)", Handler.describe),
    ("GET", rf"/api/{KIND}/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", rf"/api/{KIND}/{NAME}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (("GET", "HEAD"), rf"/(?:datasets/|spaces/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def running_hub():
    """A server on a free port of loopback: (its address, its `Hub`)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.address = Hub(), f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.address, server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
