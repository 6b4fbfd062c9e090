"""The log has one line per event, whatever clients send, and no secrets; drift in `/metrics`."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.decision import Decision, PredictionCounts, Reference
from sopdeploy.errors import BundleError
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.observability import logs, metrics
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.service import deciding, running, wait_for, write_bundle


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
    assert (rejected["status"], rejected["code"], rejected["route"]) == (
        401,
        "unauthenticated",
        "other",
    )
    assert "key" not in rejected
    assert all(secret not in stream.read_text() for secret in (key, "guess"))


FORGED = {  # path: headers
    "/nothing%0a%7B%22event%22:%22request%22%7D": {},
    "/nothing": {"x-request-id": 'a" "status": 200'},
    "/v1/classify?model=%0aforged%1b[2J": {},
}


@pytest.mark.parametrize("form", ["json", "console"])
def test_clients_cannot_forge_lines_or_control_a_terminal(logged, serve_with, form):
    stream, client = logged(log=form), serve_with(FakeRuntime(num_classes=7))
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


def test_lines_that_a_full_disk_refuses_are_counted(logged):
    before = logs.DROPPED._value.get()
    with (
        Path("/dev/full").open("w") as full,
        logs.configured(Settings(log="json"), full.fileno()),
    ):
        logging.getLogger("sopdeploy.access").info("lost")
    assert logs.DROPPED._value.get() == before + 1


def values(page: str, metric: str) -> dict[str, float]:
    pattern = rf'^sopdeploy_{metric}{{model="tiny",of="(\w+)"}} (\S+)$'
    return {of: float(value) for of, value in re.findall(pattern, page, re.MULTILINE)}


def reference(classes: int) -> Reference:
    """Predictions of the first class only, with confidences of 0.99."""
    counts = PredictionCounts(classes)
    others = [0.01 / (classes - 1)] * (classes - 1)
    counts.add_logits(np.log([[0.99, *others]] * 500))
    return counts.reference()


def test_a_full_window_that_differs_from_the_held_out_images_shows_drift(
    bundle, onnx_runtime, jpeg, monkeypatch
):
    monkeypatch.setattr(metrics, "WINDOW_IMAGES", 20)
    decision = Decision(reference=reference(7))
    files = [("image", ("x.jpg", jpeg))] * 10
    with running(onnx_runtime, deciding(bundle, decision), Settings()) as client:
        client.post("/v1/classify", files=files)
        before = client.get("/metrics").text
        client.post("/v1/classify", files=files)
        page = client.get("/metrics").text
    assert "sopdeploy_drift_distance{" not in before
    counts = [re.findall(r"sopdeploy_drift_images{.*} (.*)", text) for text in (before, page)]
    assert counts == [["10.0"], ["0.0"]]
    assert values(page, "drift_distance") == {"classes": 1.0, "confidences": 1.0}
    assert all(value < 1e-6 for value in values(page, "drift_p_value").values())


# name and held-out predictions of the next bundle: images since the last test of drift
RELOADS = {
    "a bundle with other ones": ("tiny", reference(7), ["0.0"]),
    "a bundle without them": ("tiny", None, []),
}


@pytest.mark.parametrize("case", RELOADS)
def test_an_alarm_about_a_bundle_ends_when_it_is_not_served_any_more(
    bundle, onnx_runtime, jpeg, monkeypatch, tmp_path, case
):
    monkeypatch.setattr(metrics, "WINDOW_IMAGES", 20)
    name, held_out, num_images = RELOADS[case]
    following = write_bundle(tmp_path, probes=4, decision=Decision(reference=held_out))
    with running(
        onnx_runtime, deciding(bundle, Decision(reference=reference(7))), Settings()
    ) as client:
        client.post("/v1/classify", files=[("image", ("x.jpg", jpeg))] * 20)
        assert "sopdeploy_drift_p_value{" in client.get("/metrics").text
        replaced = client.app.state.service.registry.find()
        client.reload(f"{name}={following}")
        page = client.get("/metrics").text
    assert "sopdeploy_drift_p_value{" not in page
    assert re.findall(r"sopdeploy_drift_images{.*} (.*)", page) == num_images
    assert replaced.drift is None  # images that it still runs change nothing


def test_a_bundle_without_held_out_predictions_counts_none_and_one_of_other_classes_is_rejected(
    client, tmp_path
):
    assert "sopdeploy_drift_images{" not in client.get("/metrics").text
    with pytest.raises(BundleError, match="predictions of 3 classes, not 7; export it again"):
        open_bundle(write_bundle(tmp_path, decision=Decision(reference=reference(3))))
