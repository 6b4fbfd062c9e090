"""The log has one line per event, whatever clients send, and no secrets."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability import logs
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.raw import connect
from tests.support.service import wait_for


@pytest.fixture
def logged(tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """`logged(**settings)` sends the log to a file of its own; `logged.end()` waits for the last line."""
    with ExitStack() as stack:

        def start(*, is_terminal: bool = False, **settings: object) -> Path:
            monkeypatch.setattr(os, "isatty", lambda _: is_terminal)
            file = stack.enter_context((tmp_path / "log").open("w"))
            stack.enter_context(logs.configured(Settings(**settings), file.fileno()))
            return tmp_path / "log"

        start.end = stack.close
        yield start


def requests(stream: Path) -> list[dict]:
    events = map(json.loads, stream.read_text().splitlines())
    return [event for event in events if event["event"] == "request"]


def test_a_request_is_one_line_with_every_field(logged, serve_with, tmp_path, jpeg):
    stream = logged(log="json")
    key = new_key(tmp_path / "keys.toml", "phone", rate=100)
    client = serve_with(FakeRuntime(num_classes=7), keys=tmp_path / "keys.toml")
    sent = {"x-api-key": key, "x-request-id": "trip-7"}
    client.post("/v1/classify", files=[("image", jpeg)] * 2, headers=sent)
    client.post("/v1/classify", content=b"x", headers={"x-api-key": "guess"})
    wait_for(lambda: len(requests(stream)) == 2)
    line, rejected = requests(stream)
    expected = {"request": "trip-7", "key": "phone", "method": "POST", "route": "/v1/classify"}

    assert (
        line.items()
        >= {**expected, "status": 200, "code": "ok", "num_images": 2, "level": "info"}.items()
    )
    assert line["model"] == "tiny"
    assert len(line["digest"]) >= 12
    assert line["bytes"] > 2 * len(jpeg)
    assert set(line["stages_ms"]) == {"receive", "decode_queue", "decode", "queue", "infer"}
    assert line["ms"] >= max(line["stages_ms"].values())
    assert rejected["status"] == 401
    assert rejected["code"] == "unauthenticated"
    assert rejected["route"] == "other"
    assert "key" not in rejected
    assert all(secret not in stream.read_text() for secret in (key, "guess"))


@pytest.mark.parametrize("status", [200, 503])
def test_only_probes_that_fail_are_logged_by_default(logged, serve_with, monkeypatch, status):
    client = serve_with(FakeRuntime(num_classes=7))
    state = "ok" if status == 200 else "draining"
    monkeypatch.setattr(Service, "state", property(lambda _: state))
    stream = logged(log="json")
    assert client.get("/readyz").status_code == status

    logged.end()
    assert [line["status"] for line in requests(stream)] == [503] * (status == 503)


# Headers of each path
FORGED = {
    "/nothing%0a%7B%22event%22:%22request%22%7D": {},
    "/nothing": {"x-request-id": 'a" "status": 200'},
    "/v1/classify?model=%0aforged%1b[2J": {},
}


@pytest.mark.parametrize("form", ["json", "console"])
def test_clients_cannot_forge_lines_or_control_a_terminal(logged, serve_with, form):
    stream = logged(log=form)
    client = serve_with(FakeRuntime(num_classes=7))
    for number, (path, headers) in enumerate(FORGED.items(), 1):
        client.post(path, content=b"x", headers=headers)
        wait_for(lambda number=number: stream.read_text().count("\n") == number)

    assert "forged" not in stream.read_text()
    assert "\x1b" not in stream.read_text()


@pytest.mark.parametrize("form", ["json", "console"])
def test_client_text_in_a_traceback_starts_no_line(logged, form):
    stream = logged(log=form)
    words = 'x\n{"event": "request", "status": 200}\n2026-01-01 [info] \x1b[31mforged'
    try:
        raise ValueError(words)
    except ValueError:
        logging.getLogger("sopdeploy.http").exception(
            "a mistake at %s", "\nforged", extra={"why": words}
        )

    logged.end()
    lines = stream.read_text().splitlines()
    assert "ValueError" in stream.read_text()
    assert "\x1b" not in stream.read_text()
    assert (
        len(lines) == 1
        if form == "json"
        else all(line.startswith("    ") for line in lines[1:])
    )


@pytest.mark.parametrize(
    ("settings", "is_terminal", "expected"),
    [
        ({}, False, ["warn"]),
        ({"log": "json"}, False, ["hint", "warn"]),
        ({"log": "console"}, False, ["hint", "warn"]),
        ({"log_level": "error"}, False, []),
        ({}, True, ["hint", "warn"]),
        ({"log_level": "warning"}, True, ["warn"]),
    ],
)
def test_which_events_are_logged_by_default_and_with_settings(
    logged, settings, is_terminal, expected
):
    found = logged(is_terminal=is_terminal, **settings)
    logging.getLogger("sopdeploy.server").info("hint")
    logging.getLogger("sopdeploy.inference").warning("warn")
    logging.getLogger("urllib3").info("of another library")
    logged.end()

    assert [word for word in ("hint", "warn") if word in found.read_text()] == expected
    assert found.read_text().count("\n") == len(expected)


def num_dropped() -> float:
    [metric] = logs.DROPPED.collect()
    return next(sample.value for sample in metric.samples if sample.name.endswith("_total"))


def test_lines_that_a_full_disk_refuses_are_counted(logged):
    before = num_dropped()
    with (
        Path("/dev/full").open("w") as full,
        logs.configured(Settings(log="json"), full.fileno()),
    ):
        logging.getLogger("sopdeploy.access").info("lost")

    assert num_dropped() == before + 1


H = b"Host: 127.0.0.1\r\nOrigin: https://shop.example\r\n"
EARLY = {
    "url_too_long": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + H + b"\r\n",
    "headers_too_large": b"GET / HTTP/1.1\r\n" + H + b"X: " + b"a" * 33_000 + b"\r\n\r\n",
    "malformed_request": b"GET / HTTP/1.1\r\n" + H + b"Host: a\r\n\r\n",
    "unknown_transfer_coding": b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: gzip\r\n\r\n",
}


@pytest.mark.parametrize("code", EARLY)
def test_a_refusal_before_the_app_is_logged_counted_and_readable(logged, serve_with, code):
    stream = logged(log="json")
    client = serve_with(FakeRuntime(num_classes=7), allowed_origins="https://shop.example")
    with connect(client) as wire:
        wire.sendall(EARLY[code])
        answer = b""
        while piece := wire.recv(1 << 16):
            answer += piece

    headers = answer.partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    (identifier,) = (line.split()[1] for line in headers if line.startswith("x-request-id:"))
    assert "access-control-allow-origin: https://shop.example" in headers
    wait_for(lambda: identifier in stream.read_text())
    assert f'"code": "{code}"' in stream.read_text() or f'"code":"{code}"' in stream.read_text()
    text = client.get("/metrics").text
    assert f'sopdeploy_rejected_total{{reason="{code}"}} 1.0' in text
