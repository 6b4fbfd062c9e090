"""The health check of the images tells whether the server of the container is ready."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.children import free_port

SCRIPT = Path(__file__).parents[2] / "deploy" / "health.py"


def check(**variables: str) -> int:
    """Run the health check with *variables* only; return its exit code."""
    command = [sys.executable, "-I", "-S", str(SCRIPT)]
    return subprocess.run(command, env=variables, capture_output=True, check=False).returncode


@contextmanager
def responding(status: int) -> Iterator[str]:
    """Serve responses with *status* to `GET /readyz` on the port that is yielded; others get 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield str(server.server_port)
        finally:
            server.shutdown()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_server_that_is_not_ready_is_not_healthy(status: int, code: int) -> None:
    with responding(status) as port:
        assert check(SOPDEPLOY_PORT=port, SOPDEPLOY_HOST="*") == code


def test_a_server_that_does_not_respond_is_not_healthy() -> None:
    assert check(SOPDEPLOY_PORT=str(free_port())) == 1


def test_the_environment_goes_before_the_file_and_the_platform_s_port(tmp_path: Path) -> None:
    unused = str(free_port())
    file = tmp_path / "sopdeploy.toml"
    with responding(200) as port:
        assert check(PORT=port) == 0

        file.write_text(f"port = {port}\n")
        assert check(PORT=unused, SOPDEPLOY_CONFIG=str(file)) == 0

        file.write_text(f"port = {unused}\n")
        assert check(SOPDEPLOY_CONFIG=str(file)) == 1
        assert check(SOPDEPLOY_PORT=port, SOPDEPLOY_CONFIG=str(file)) == 0
