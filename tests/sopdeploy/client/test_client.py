"""The client: requests, parsed responses, retries, deadlines and errors."""

import io
import subprocess
import sys
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from sopdeploy.client import Client, messages
from sopdeploy.client.messages import MAX_DELAY, backoff, encode_image, retry_after
from sopdeploy.errors import ConfigError, DataError, OverloadedError, ServiceError, UnreachableError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


class Script:
    """Transport handler that replays its replies and repeats the last; exceptions are raised."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"title": "x", "status": status, "code": code, "detail": "because"}
    return httpx.Response(status, json=body, headers=headers)


SUCCESS = httpx.Response(200, json={"classes": [{"label": "cat", "probability": 0.75}]})


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays of all retries; the client does not sleep."""
    found: list[float] = []
    monkeypatch.setattr("sopdeploy.client.client.time.sleep", found.append)
    monkeypatch.setattr(messages.random, "uniform", lambda low, high: high)
    return found


def call(script: Script, method: str, *arguments: Any, **options: Any) -> Any:
    """Call *method* of a client of *script*."""
    settings = {key: options.pop(key) for key in ("retries", "api_key") if key in options}
    with Client("http://server", transport=httpx.MockTransport(script), **settings) as client:
        return getattr(client, method)(*arguments, **options)


def test_the_result_contains_the_whole_response():
    body = {
        "classes": [{"label": "cat", "probability": 0.75, "later": 1}],
        "warnings": ["exif_rotated"],
        "key_of_a_newer_server": {},
    }
    headers = {"X-Model-Digest": "3f6c01d2a4b7", "Server-Timing": "decode;dur=3.10, infer;dur=5"}
    result = call(Script(httpx.Response(200, json=body, headers=headers)), "classify", b"x")
    assert (result.classes[0].label, result.classes[0].probability) == ("cat", 0.75)
    assert (result.warnings, result.error) == (("exif_rotated",), None)
    assert (result.model_digest, result.timing_ms) == ("3f6c01d2a4b7", {"decode": 3.1, "infer": 5.0})


def test_one_image_is_sent_as_the_body_with_its_options():
    server = Script(SUCCESS)
    call(server, "classify", b"bytes", top_k=3, model="a b", api_key="secret")
    sent = server.requests[0]
    assert (sent.method, sent.url.path, sent.content) == ("POST", "/v1/classify", b"bytes")
    assert dict(sent.url.params) == {"top_k": "3", "model": "a b"}
    assert sent.headers["Authorization"] == "Bearer secret"
    assert sent.headers["Content-Type"] == "application/octet-stream"


def test_a_list_is_sent_as_a_form_and_returned_in_order_with_errors():
    error = {"title": "x", "status": 422, "code": "truncated_image", "detail": "cut"}
    server = Script(httpx.Response(200, json={"results": [{"classes": []}, {"error": error}]}))
    good, bad = call(server, "classify", [b"first", b"second"])
    assert (good.error, bad.error.code, bad.classes) == (None, "truncated_image", ())
    body = server.requests[0].content
    assert 0 < body.index(b"first") < body.index(b"second")
    assert body.count(b'; name="image"') == 2


def test_short_lists():
    server = Script(SUCCESS)
    assert (call(server, "classify", []), server.requests) == ([], [])
    assert len(call(server, "classify", (b"x",))) == 1
    with pytest.raises(ServiceError, match="1 results for 2 images"):
        call(server, "classify", [b"x", b"y"])


FOREIGN = [b"<html>", b"[]", b"{}", b'{"results": [1]}']


@pytest.mark.parametrize("content", FOREIGN)
def test_responses_of_other_servers_are_rejected(content):
    with pytest.raises(ServiceError, match="not a sopdeploy response") as caught:
        call(Script(httpx.Response(200, content=content)), "classify", b"x")
    assert caught.value.code == "foreign_answer"


@pytest.mark.parametrize("content", [b"<html>Bad Gateway</html>", b'{"detail": "no"}'])
def test_error_pages_of_proxies_are_errors(content):
    with pytest.raises(ServiceError, match="502") as caught:
        call(Script(httpx.Response(502, content=content)), "classify", b"x")
    assert (caught.value.status, caught.value.code) == (502, "http_error")


def test_wait_ready_polls_until_the_server_is_ready(delays):
    server = Script(httpx.ConnectError("no"), problem(503, "draining"), SUCCESS)
    assert call(server, "wait_ready", timeout=5) is None
    assert len(server.requests) == 3


def test_wait_ready_reports_the_last_response():
    with pytest.raises(UnreachableError, match=r"not ready after 0.3 s.*draining"):
        call(Script(problem(503, "draining")), "wait_ready", timeout=0.3)


OPTIONS = [
    ({"url": "server:8000"}, "URL"),
    ({"url": "http://server:port"}, "URL"),
    ({"api_key": "a\r\nX: y"}, "API key"),
    ({"timeout": 0}, "timeout"),
    ({"retries": -1}, "retries"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        Client(**{"url": "http://server", **options})


@pytest.mark.parametrize("image", [PIXELS, PIXELS[..., 0], PIXELS[:, ::2], Image.fromarray(PIXELS)])
def test_arrays_are_encoded_without_loss(image):
    decoded = np.asarray(Image.open(io.BytesIO(encode_image(image))))
    np.testing.assert_array_equal(decoded, np.asarray(image))


def test_files_and_bytes_are_sent_unchanged(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"any")
    assert encode_image(path) == encode_image(str(path)) == encode_image(b"any") == b"any"


@pytest.mark.parametrize(
    "image",
    [3, PIXELS.astype(np.float32), PIXELS[None], Image.new("CMYK", (2, 2))],
    ids=["number", "floats", "batch", "cmyk"],
)
def test_other_values_are_rejected_before_sending(image):
    server = Script(SUCCESS)
    with pytest.raises(ConfigError, match=r"not an image|PNG"):
        call(server, "classify", image)
    with pytest.raises(DataError, match="cannot be read"):
        call(server, "classify", "none.jpg")
    assert server.requests == []


BROKEN = [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.RemoteProtocolError("closed")]


@pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (503, "draining")])
def test_overload_is_retried_no_sooner_than_retry_after(delays, status, code):
    server = Script(problem(status, code, **{"Retry-After": "3"}), SUCCESS)
    assert call(server, "classify", b"x").classes[0].label == "cat"
    assert (len(server.requests), len(delays)) == (2, 1)
    assert 3 <= delays[0] < 4


@pytest.mark.parametrize("broken", BROKEN, ids=lambda error: type(error).__name__)
def test_a_connection_that_broke_before_a_response_is_retried(delays, broken):
    server = Script(broken, broken, SUCCESS)
    assert call(server, "classify", b"x").classes[0].probability == 0.75
    assert delays == [0.2, 0.4]


@pytest.mark.parametrize(("status", "code"), [(401, "no_key"), (422, "truncated_image"), (504, "deadline")])
def test_other_errors_are_not_retried(delays, status, code):
    server = Script(problem(status, code))
    with pytest.raises(ServiceError, match="because") as caught:
        call(server, "classify", b"x")
    assert type(caught.value) is ServiceError
    assert (caught.value.status, caught.value.code) == (status, code)
    assert (len(server.requests), delays) == (1, [])


def test_a_timeout_is_not_retried(delays):
    server = Script(httpx.ReadTimeout("slow"))
    with pytest.raises(UnreachableError, match="no response within") as caught:
        call(server, "classify", b"x", timeout=0.5)
    assert (caught.value.code, caught.value.status, len(server.requests), delays) == ("timeout", 0, 1, [])


def test_the_number_of_retries_is_limited(delays):
    server = Script(problem(429, "queue_full"))
    with pytest.raises(OverloadedError, match="queue_full") as caught:
        call(server, "classify", b"x", retries=3)
    assert (caught.value.status, len(server.requests)) == (429, 4)
    assert delays == [0.2, 0.4, 0.8]
    server = Script(httpx.ConnectError("connection refused"))
    with pytest.raises(UnreachableError, match="connection refused") as caught:
        call(server, "classify", b"x", retries=1)
    assert (caught.value.code, len(server.requests)) == ("unreachable", 2)


def test_a_delay_beyond_the_deadline_is_not_started(delays):
    server = Script(problem(503, "draining", **{"Retry-After": "60"}))
    with pytest.raises(OverloadedError) as caught:
        call(server, "classify", b"x", timeout=10)
    assert caught.value.retry_after == 60
    assert (len(server.requests), delays) == (1, [])


def test_the_server_is_told_the_remaining_time(delays):
    server = Script(httpx.ConnectError("no"), SUCCESS)
    call(server, "classify", b"x", timeout=10)
    first, second = (int(request.headers["X-Request-Timeout-Ms"]) for request in server.requests)
    assert 0 < second <= first <= 10_000


@pytest.mark.parametrize(("header", "seconds"), [("", 0), ("7", 7), ("soon", 0)])
def test_retry_after_is_a_number_and_zero_otherwise(header, seconds):
    assert retry_after(httpx.Response(429, headers={"Retry-After": header})) == seconds


def test_delays_are_bounded_and_jittered():
    assert all(backoff(attempt) <= MAX_DELAY for attempt in range(2000))
    assert len({backoff(3) for _ in range(20)}) > 10


def test_the_client_imports_neither_the_server_nor_torch():
    heavy = ("torch", "onnx", "onnxruntime", "fastapi", "uvicorn", "sopdeploy_service")
    code = f"import sys, sopdeploy.client; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
