"""A stand-in for the Hugging Face Hub on a loopback port, with the endpoints that huggingface_hub calls.

Archives go through LFS with the transfer `basic`, small files into the commit. Writes need a token.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"
Commits = dict[str, dict[str, bytes]]  # files by commit, oldest commit first


class Hub(ThreadingHTTPServer):
    """The repositories by id, and the bodies of uploaded LFS objects."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Commits] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `ROUTES` lists method, path and function."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.route("GET")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        for verb, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, self.path.partition("?")[0])
            if match and verb == method:
                if method == "POST" and self.headers.get("authorization") != f"Bearer {TOKEN}":
                    self.reply({"error": "Invalid user token."}, 401)
                else:
                    answer(self, body, *match.groups())
                return
        self.reply({"error": f"{method} {self.path}"}, 501)

    def reply(self, value: Any, status: int = 200, code: str = "") -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repository = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if repository in self.server.repositories else 200
        self.server.repositories.setdefault(repository, {})
        self.reply({"url": f"{self.server.url}/{repository}", "error": "exists"}, status)

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit of *revision* and its files; reply with 404 if there is none."""
        if repository not in self.server.repositories:
            self.reply({"error": "Repository not found"}, 404, "RepoNotFound")
            return None
        commits = self.server.repositories[repository]
        if revision == "main":
            return next(reversed(commits.items()), ("0" * 40, {}))
        if revision in commits:
            return revision, commits[revision]
        self.reply({"error": "Revision not found"}, 404, "RevisionNotFound")
        return None

    def info(self, _: bytes, repository: str, revision: str | None) -> None:
        found = self.files(repository, revision or "main")
        if found is not None:
            siblings = [{"rfilename": name} for name in found[1]]
            self.reply({"id": repository, "sha": found[0], "siblings": siblings})

    def validate(self, _: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def preupload(self, body: bytes, _: str) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".tar") else "regular"}
            for file in json.loads(body)["files"]
        ]
        self.reply({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, body: bytes, _: str) -> None:
        found = []
        for entry in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{entry['oid']}"}
            found.append({**entry, "actions": {"upload": upload}})
        self.reply({"transfer": "basic", "objects": found})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.reply({})

    def commit(self, body: bytes, repository: str) -> None:
        commits = self.server.repositories[repository]
        files = dict(next(reversed(commits.values()), {}))
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()  # noqa: S324
        commits[oid] = files
        self.reply({"commitUrl": f"{self.server.url}/{repository}/commit/{oid}", "commitOid": oid})

    def resolve(self, _: bytes, repository: str, revision: str, name: str) -> None:
        found = self.files(repository, revision)
        if found is not None:
            self.reply(found[1][name])


ID = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{ID}(?:/revision/([\w.-]+))?", Handler.info),
    ("POST", rf"/api/models/{ID}/preupload/main", Handler.preupload),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(\w+)", Handler.upload),
    ("POST", rf"/api/models/{ID}/commit/main", Handler.commit),
    ("GET", rf"/{ID}/resolve/([\w.-]+)/([\w.-]+)", Handler.resolve),
)
