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
def server(request: pytest.FixtureRequest) -> Iterator[int]:
    kind = type("Answering", (Fixed,), {"status": request.param})
    with http.server.HTTPServer(("127.0.0.1", 0), kind) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found.server_port
        found.shutdown()
        thread.join()


def health(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["health", *words])
    assert found.stdout == ""
    return found.exit_code, found.stderr


@pytest.mark.parametrize("server", [200], indirect=True)
def test_a_ready_server_is_0_and_found_where_the_setting_says(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health("--url", f"http://127.0.0.1:{server}/") == (0, "")
    monkeypatch.setenv("SOPDEPLOY_PORT", str(server))
    assert health() == (0, "")


@pytest.mark.parametrize("server", [503], indirect=True)
def test_a_server_that_is_not_ready_is_1_and_what_it_says(server: int) -> None:
    code, said = health("--url", f"http://127.0.0.1:{server}")
    assert code == 1
    assert "503" in said
    assert "draining" in said
    assert said.count("\n") == 1


def test_a_server_that_does_not_answer_is_1() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        code, said = health("--url", f"http://127.0.0.1:{port}", "--timeout", "0.2")
    assert (code, said.count("\n")) == (1, 1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "http://[x"])
def test_what_is_no_url_is_2(url: str) -> None:
    code, said = health("--url", url)
    assert (code, said.count("\n")) == (2, 1)
