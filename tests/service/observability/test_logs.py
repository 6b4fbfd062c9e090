"""The log has one line per event, whatever clients send, and no secrets."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.observability import logs
from sopdeploy_service.runtime.fake import FakeRuntime
from sopdeploy_service.settings import Settings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logged() -> Iterator[Callable[..., io.StringIO]]:
    """`logged(**settings)` sends the log to a stream of its own and gives the stream."""
    with ExitStack() as stack:

        def start(stream: io.StringIO | None = None, **settings: object) -> io.StringIO:
            stream = stream or io.StringIO()
            stack.enter_context(logs.configured(Settings(**settings), stream))
            return stream

        yield start


def requests(stream: io.StringIO) -> list[dict]:
    events = map(json.loads, stream.getvalue().splitlines())
    return [event for event in events if event["event"] == "request"]


def test_a_request_is_one_line_with_every_field(logged, serve_with, tmp_path, jpeg, until):
    stream = logged(log="json")
    key = new_key(tmp_path / "keys.toml", "phone", rate=100, burst=None, admin=False)
    client = serve_with(FakeRuntime(classes=7), keys=tmp_path / "keys.toml")
    sent = {"x-api-key": key, "x-request-id": "trip-7"}
    client.post("/v1/classify", files=[("image", jpeg)] * 2, headers=sent)
    until(lambda: len(requests(stream)) == 1)
    (line,) = requests(stream)
    expected = {"request": "trip-7", "key": "phone", "method": "POST", "route": "/v1/classify"}
    assert line.items() >= {**expected, "status": 200, "code": "ok", "images": 2, "level": "info"}.items()
    assert line["model"] == "tiny"
    assert len(line["digest"]) >= 12
    assert line["bytes"] > 2 * len(jpeg)
    assert set(line["stages_ms"]) == {"receive", "decode", "queue", "infer"}
    assert line["ms"] >= max(line["stages_ms"].values())
    assert key not in stream.getvalue()


def test_a_rejection_is_logged_with_its_code_and_without_a_key_name(logged, serve_with, tmp_path, until):
    stream = logged(log="json")
    new_key(tmp_path / "keys.toml", "phone", rate=None, burst=None, admin=False)
    client = serve_with(FakeRuntime(classes=7), keys=tmp_path / "keys.toml")
    client.post("/v1/classify", content=b"x", headers={"x-api-key": "guess"})
    until(lambda: len(requests(stream)) == 1)
    (line,) = requests(stream)
    assert (line["status"], line["code"], line["route"]) == (401, "unauthenticated", "other")
    assert "key" not in line
    assert "guess" not in stream.getvalue()


def test_probes_and_scrapes_are_logged_at_debug_level(logged, serve_with, until):
    stream = logged(log="json")
    client = serve_with(FakeRuntime(classes=7))
    for path in ("/readyz", "/livez", "/metrics", "/info"):
        client.get(path)
    until(lambda: len(requests(stream)) > 0)
    assert [line["route"] for line in requests(stream)] == ["/info"]
    logging.getLogger(logs.ROOT).setLevel(logging.DEBUG)
    client.get("/readyz")
    until(lambda: len(requests(stream)) == 2)
    assert requests(stream)[1]["level"] == "debug"


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/nothing%0a%7B%22event%22:%22request%22%7D", {}),
        ("/nothing", {"x-request-id": 'a" "status": 200'}),
        ("/v1/classify?model=%0aforged%1b[2J", {}),
    ],
)
def test_clients_cannot_forge_lines_or_control_a_terminal(logged, serve_with, until, form, path, headers):
    stream = logged(log=form)
    serve_with(FakeRuntime(classes=7)).post(path, content=b"x", headers=headers)
    until(lambda: stream.getvalue().count("\n") == 1)
    assert "forged" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("form", ["json", "console"])
def test_client_text_in_a_traceback_starts_no_line(logged, form):
    stream = logged(log=form)
    words = 'x\n{"event": "request", "status": 200}\n2026-01-01 [info] \x1b[31mforged'
    try:
        raise ValueError(words)
    except ValueError:
        logging.getLogger("sopdeploy.http").exception("a mistake at %s", "\nforged", extra={"why": words})
    lines = stream.getvalue().splitlines()
    assert "ValueError" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert len(lines) == 1 if form == "json" else all(line.startswith("    ") for line in lines[1:])


@pytest.mark.parametrize(
    ("settings", "stream", "expected"),
    [
        ({}, io.StringIO, ["warn"]),
        ({"log": "json"}, io.StringIO, ["hint", "warn"]),
        ({"log": "console"}, io.StringIO, ["hint", "warn"]),
        ({"log_level": "error"}, io.StringIO, []),
        ({}, Terminal, ["hint", "warn"]),
        ({"log_level": "warning"}, Terminal, ["warn"]),
    ],
)
def test_which_events_are_logged_by_default_and_with_settings(logged, settings, stream, expected):
    found = logged(stream(), **settings)
    logging.getLogger("sopdeploy.server").info("hint")
    logging.getLogger("sopdeploy.inference").warning("warn")
    logging.getLogger("urllib3").info("of another library")
    assert [word for word in ("hint", "warn") if word in found.getvalue()] == expected
    assert found.getvalue().count("\n") == len(expected)
