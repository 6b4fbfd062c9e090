"""`sopdeploy health`: the exit code says whether a server is ready."""

import http.server
import threading
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy_service.server.sockets import bind


class Fixed(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b'{"status":"draining\\u001b[31m"}')

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Fixed) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found.server_port
        found.shutdown()
        thread.join()


def health(*words: str) -> tuple[int, int, str]:
    """Return the exit code, the number of lines on stderr, and the lines."""
    found = CliRunner().invoke(app, ["health", *words])
    assert found.stdout == ""
    return found.exit_code, found.stderr.count("\n"), found.stderr


def test_the_exit_code_is_0_for_a_ready_server_and_1_for_others(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health("--url", f"http://127.0.0.1:{port}/") == (0, 0, "")
    monkeypatch.setenv("SOPDEPLOY_PORT", str(port))
    assert health() == (0, 0, "")
    monkeypatch.setattr(Fixed, "status", 503)
    *found, said = health()
    assert found == [1, 1]
    assert "503" in said
    assert "draining" in said
    with bind("127.0.0.1", 0) as listener:
        silent = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr("sopdeploy.cli.serving.health.TIMEOUT", 0.2)
        assert health("--url", silent)[:2] == (1, 1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://x:port"])
def test_what_is_no_url_is_2(url: str) -> None:
    assert health("--url", url)[:2] == (2, 1)
