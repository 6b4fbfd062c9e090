"""A loopback HTTP server of weight files, under the paths of torchvision and of timm's hub."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WeightServer(ThreadingHTTPServer):
    """Serves `content` at every path; `requests` lists method and path.

    An "interrupted" response ends in the middle, a "changed" one has one other byte.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.fault = b"", "none"
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        """The address without a path."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD with the headers of the hub."""

    server: WeightServer

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _start(self, method: str) -> None:
        self.server.requests.append(f"{method} {self.path}")
        content = self.server.content
        self.send_response(404 if self.server.fault == "not found" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()

    def do_HEAD(self) -> None:
        """Answer with the headers."""
        self._start("HEAD")

    def do_GET(self) -> None:
        """Answer with the content."""
        self._start("GET")
        content = self.server.content
        if self.server.fault == "interrupted":
            content = content[: len(content) // 2]
        if self.server.fault == "changed":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.server.fault != "not found":
            self.wfile.write(content)
        self.close_connection = True


@contextmanager
def weight_server() -> Iterator[WeightServer]:
    """Run a server on a free port until the block ends."""
    with WeightServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
