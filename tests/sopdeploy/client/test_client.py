"""The client: its requests, the results that it returns, its errors, and when it repeats a request."""

import asyncio
import base64
import math
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from sopdeploy.client import Client
from sopdeploy.client.client import CallArguments, ClassifyArguments
from sopdeploy.client.requests import CONNECT_SECONDS, MAX_PAUSE, retry_after
from sopdeploy.errors import (
    ConfigError,
    DataError,
    OverloadedError,
    ServiceError,
    UnreachableError,
)
from tests.support.pictures import encoded

pytestmark = pytest.mark.usefixtures("client_kind")  # with both clients
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

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call *method* of a client that sends its requests here."""
        own = {name: options.pop(name) for name in ("api_key", "retries") if name in options}
        with Client("http://server", transport=httpx.MockTransport(self), **own) as client:
            return getattr(client, method)(*arguments, **options)


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"title": "x", "status": status, "code": code, "detail": "because"}
    return httpx.Response(status, json=body, headers=headers)


SUCCESS = httpx.Response(200, json={"classes": [{"label": "cat", "probability": 0.75}]})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before all repetitions, which are as long as possible; the client does not sleep."""
    found: list[float] = []
    clock = time.monotonic

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(time, "sleep", found.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(found))
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    return found


def test_the_result_contains_the_whole_response():
    body = {
        "classes": [{"label": "cat", "probability": 0.75, "later": 1}],
        "warnings": ["exif_rotated"],
        "key_of_a_newer_server": {},
    }
    headers = {
        "X-Model-Digest": "3f6c01d2a4b7",
        "Server-Timing": "decode;dur=3.10, infer;dur=5",
    }
    result = Script(httpx.Response(200, json=body, headers=headers)).call("classify", b"x")

    assert (result.classes[0].label, result.classes[0].probability) == ("cat", 0.75)
    assert result.warnings == ("exif_rotated",)
    assert result.error is None
    assert result.model_digest == "3f6c01d2a4b7"
    assert result.timing_ms == {"decode": 3.1, "infer": 5.0}


def test_a_long_header_takes_no_quadratic_time():
    headers = {"Server-Timing": "a" * 300_000 + "1;dur=2, infer;dur=3.5"}
    server = Script(httpx.Response(200, headers=headers, content=SUCCESS.content))

    assert server.call("classify", b"x").timing_ms == {"infer": 3.5}


# Each method with its reply, its request, and the parameters that each call has
VECTOR = base64.b64encode(np.ones(2, "<f4").tobytes()).decode()
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, str], Any]] = {
    "classify": ({"classes": []}, "POST /v1/classify", {}, ClassifyArguments),
    "embed": (
        {"embedding": VECTOR},
        "POST /v1/embed",
        {"encoding_format": "base64"},
        CallArguments,
    ),
    "info": ({"server": "1", "models": []}, "GET /info", {}, None),
}
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "model": ("a b", "a b"),
    "top_k": (3, "3"),
    "threshold": (0.25, "0.25"),
    "explain": (True, "true"),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_argument_of_a_method_arrives_in_its_request(method: str):
    content, line, always, arguments = METHODS[method]
    images = [b"bytes"] if arguments else []
    known = arguments.__annotations__.keys() if arguments else set()

    for name in known - {"timeout"} | {""}:
        value, text = ARGUMENTS.get(name, ("", ""))
        given = {name: value} if name else {}
        server = Script(httpx.Response(200, json=content))
        server.call(method, *images, **given, timeout=7.0, api_key="secret")

        (sent,) = server.requests
        assert f"{sent.method} {sent.url.path}" == line
        assert dict(sent.url.params) == always | ({name: text} if name else {})
        assert sent.content == b"".join(images)
        assert sent.headers["Authorization"] == "Bearer secret"
        assert sent.headers.get("Content-Type") == (
            "application/octet-stream" if images else None
        )
        assert 0 < int(sent.headers["X-Request-Timeout-Ms"]) <= 7000


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)], ids=["N", "N, 1"])
def test_an_encoded_buffer_is_sent_as_its_file(shape: tuple[int, ...]) -> None:
    file = encoded(Image.fromarray(PIXELS), "JPEG")
    server = Script(SUCCESS)
    server.call("classify", np.frombuffer(file, np.uint8).reshape(shape))

    assert server.requests[0].content == file


def test_a_list_is_sent_as_a_form_and_returned_in_order():
    error = {"title": "x", "status": 422, "code": "truncated_image", "detail": "cut"}
    server = Script(httpx.Response(200, json={"results": [{"classes": []}, {"error": error}]}))
    good, bad = server.call("classify", [b"first", b"second"])

    assert good.error is None
    assert bad.error.code == "truncated_image"
    assert bad.classes == ()

    body = server.requests[0].content
    assert 0 < body.index(b"first") < body.index(b"second")
    assert body.count(b'; name="image"') == 2


def test_a_list_may_be_empty_or_have_one_image():
    server = Script(SUCCESS)

    assert server.call("classify", []) == []
    assert server.requests == []
    assert len(server.call("classify", (b"x",))) == 1


FOREIGN = {
    b"<html>": b"x",
    b"[]": b"x",
    b"{}": b"x",
    b'{"results": [1]}': b"x",
    SUCCESS.content: [b"x", b"y"],
}


@pytest.mark.parametrize("content", FOREIGN)
def test_responses_of_other_servers_are_rejected(content):
    with pytest.raises(ServiceError, match="not a sopdeploy response") as caught:
        Script(httpx.Response(200, content=content)).call("classify", FOREIGN[content])
    assert caught.value.code == "foreign_answer"


@pytest.mark.parametrize("content", [b"<html>Forbidden</html>", b'{"detail": "no"}'])
def test_error_pages_of_proxies_are_errors(content):
    with pytest.raises(ServiceError) as caught:
        Script(httpx.Response(403, content=content)).call("classify", b"x")
    assert (caught.value.status, caught.value.code) == (403, "http_error")


@pytest.mark.parametrize(
    "reply",
    [
        problem(422, "no"),
        problem(503, "busy"),
        *map(httpx.Response, (200, 502)),
        httpx.ReadTimeout("slow"),
    ],
)
def test_an_error_names_the_address_without_its_password(reply):
    transport = httpx.MockTransport(Script(reply))
    client = Client("http://bob:secret@server:81", transport=transport, retries=0)

    with client, pytest.raises(ServiceError, match="http://server:81/v1/classify: ") as caught:
        client.classify(b"x")
    assert "secret" not in str(caught.value)


def test_a_key_that_is_not_a_header_and_unknown_options_are_rejected():
    with pytest.raises(ConfigError, match="API key"):
        Client("http://server", api_key="a\r\nX: y")

    for url in ("http://server:port", "127.0.0.1:8000", "ftp://server", ""):
        with pytest.raises(ConfigError, match="not a URL"):
            Client(url)

    with pytest.raises(TypeError, match="topk"):
        Script(SUCCESS).call("classify", b"x", topk=3)


def test_other_values_are_rejected_before_sending():
    server = Script(SUCCESS)
    for value in (3, PIXELS[:0], "none.jpg", "a\0b"):
        with pytest.raises(DataError):
            server.call("classify", value)

    assert server.requests == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Sun, 29 Nov 2026 06:00:30 GMT", 30.0),
        ("Sun, 29 Nov 2026 05:59:00 GMT", 0.0),
        ("120", 120.0),
        ("soon", 0.0),
        ("-1", 0.0),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(monkeypatch, text, seconds):
    monkeypatch.setattr(time, "time", lambda: 1_795_932_000.0)  # 06:00:00 GMT
    assert retry_after(httpx.Response(503, headers={"Retry-After": text})) == seconds


@pytest.fixture
def far_from_greenwich(monkeypatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_greenwich")
def test_a_date_of_retry_after_without_a_zone_is_in_gmt(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_795_932_000.0)  # 06:00:00 GMT
    headers = {"Retry-After": "Sun, 29 Nov 2026 06:00:30 -0000"}

    assert retry_after(httpx.Response(503, headers=headers)) == 30.0


REFUSED = httpx.ConnectError("refused")
# What is repeated, and how long the first two pauses are at most.
REPEATED: dict[str, tuple[httpx.Response | Exception, list[float]]] = {
    "refused": (REFUSED, [0.1, 0.2]),
    "no connection": (httpx.ConnectTimeout("slow"), [0.1, 0.2]),
    "closed": (httpx.RemoteProtocolError("closed"), [0.1, 0.2]),
    "broken while it was read": (httpx.ReadError("reset"), [0.1, 0.2]),
    "a slow upload": (problem(408, "slow_body"), [0.1, 0.2]),
    "a full queue": (problem(429, "queue_full", **{"Retry-After": "3"}), [3.1, 3.2]),
    "a limit of a key": (problem(429, "rate_limited", **{"Retry-After": "1"}), [1.1, 1.2]),
    "a gateway without a server": (httpx.Response(502, text="<html>"), [0.1, 0.2]),
    "draining": (problem(503, "draining", **{"Retry-After": "1"}), [1.1, 1.2]),
    "a gateway that waited": (httpx.Response(504, text="<html>"), [0.1, 0.2]),
}


@pytest.mark.parametrize("case", REPEATED)
def test_what_a_server_that_is_away_causes_is_repeated(pauses, case):
    reply, expected = REPEATED[case]
    server = Script(reply, reply, SUCCESS)
    assert server.call("classify", b"x").classes[0].label == "cat"
    assert pauses == pytest.approx(expected)

    attempts = [one.headers["X-Request-Attempt"] for one in server.requests]
    assert attempts == ["1", "2", "3"]
    assert {one.content for one in server.requests} == {b"x"}


@pytest.mark.parametrize("reply", [REFUSED, problem(503, "draining")])
def test_requests_are_repeated_until_the_time_of_the_call_is_over(pauses, reply):
    with pytest.raises(ServiceError):
        Script(reply).call("classify", b"x", timeout=30)
    assert pauses[:5] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
    assert set(pauses[5:]) == {MAX_PAUSE}
    assert 30 - MAX_PAUSE <= sum(pauses) < 30


def test_many_calls_that_wait_take_nothing_from_each_other(pauses):
    server = Script(*[REFUSED, REFUSED, SUCCESS] * 200, SUCCESS)
    with Client("http://server", transport=httpx.MockTransport(server)) as client:
        assert all(client.classify(b"x").classes for _ in range(200))


# Replies that no attempt follows: (reply, class of the error, its status and code).
FINAL: dict[str, tuple[Any, type[ServiceError], int, str]] = {
    "no key": (problem(401, "no_key"), ServiceError, 401, "no_key"),
    "truncated": (problem(422, "truncated_image"), ServiceError, 422, "truncated_image"),
    "an error of the server": (problem(500, "internal"), ServiceError, 500, "internal"),
    "timeout": (httpx.ReadTimeout("slow"), UnreachableError, 0, "timeout"),
    "later than the end": (
        problem(429, "queue_full", **{"Retry-After": "60"}),
        OverloadedError,
        429,
        "queue_full",
    ),
}


@pytest.mark.parametrize("name", FINAL)
def test_other_errors_are_not_repeated(pauses, name):
    reply, kind, status, code = FINAL[name]
    server = Script(reply)

    with pytest.raises(ServiceError) as caught:
        server.call("classify", b"x", timeout=10)
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert caught.value.code == code
    assert len(server.requests) == 1
    assert pauses == []


def test_the_number_of_repetitions_can_be_limited(pauses):
    server = Script(problem(429, "queue_full", **{"Retry-After": "soon"}))
    with pytest.raises(OverloadedError) as caught:
        server.call("classify", b"x", retries=3)
    assert (caught.value.retry_after, len(server.requests)) == (0, 4)

    server = Script(REFUSED)
    with pytest.raises(UnreachableError) as unreachable:
        server.call("classify", b"x", retries=0)
    assert (unreachable.value.code, len(server.requests)) == ("unreachable", 1)


def test_each_attempt_has_the_time_that_is_left_and_tells_the_server(pauses):
    server = Script(REFUSED, REFUSED, SUCCESS)
    server.call("classify", b"x", timeout=10)
    timeouts = [one.extensions["timeout"] for one in server.requests]
    assert all(one["connect"] == CONNECT_SECONDS for one in timeouts)
    assert 9 < timeouts[2]["read"] < timeouts[1]["read"] < timeouts[0]["read"] <= 10
    told = [int(one.headers["X-Request-Timeout-Ms"]) for one in server.requests]
    assert told == pytest.approx([950 * one["read"] for one in timeouts], abs=1)

    server = Script(SUCCESS)
    server.call("classify", b"x", timeout=0.001)
    assert server.requests[0].headers["X-Request-Timeout-Ms"] == "1"


@pytest.mark.parametrize("timeout", [0, -1.0, math.inf, math.nan, None, "30", True])
def test_a_timeout_that_is_not_a_positive_number_is_one_error_line(timeout: Any) -> None:
    with pytest.raises(ConfigError, match=r"timeout"):
        Client("http://127.0.0.1:1", timeout=timeout)


@pytest.mark.parametrize("is_own", [True, False])
def test_an_answer_with_the_id_of_another_request_is_none(is_own: bool) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        number = request.headers["x-request-id"] if is_own else "of another"
        content = {"server": "1", "models": []}
        return httpx.Response(200, json=content, headers={"X-Request-ID": number})

    transport = httpx.MockTransport(answer)
    with Client("http://server", transport=transport, retries=0) as client:
        if is_own:
            assert client.info().models == ()
        else:
            with pytest.raises(UnreachableError, match="another request"):
                client.info()


def test_options_of_httpx_are_passed_on() -> None:
    server = Script(SUCCESS)
    options = {"transport": httpx.MockTransport(server), "headers": {"X-Team": "birds"}}
    with Client("http://server/path", api_key="secret", **options) as client:
        client.classify(b"x")
    (sent,) = server.requests

    assert (sent.headers["X-Team"], sent.headers["Authorization"]) == ("birds", "Bearer secret")
    assert sent.url == "http://server/path/v1/classify"
    with pytest.raises(TypeError):
        Client("http://server", transports=None)


WRONG_ENVIRONMENTS = {
    "HTTP_PROXY": "ftp://proxy.example",
    "ALL_PROXY": "http://proxy:port",
    "SSL_CERT_FILE": "none.pem",
}


@pytest.mark.parametrize("variable", WRONG_ENVIRONMENTS)
def test_a_proxy_or_certificate_file_that_cannot_be_used_is_one_line(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, WRONG_ENVIRONMENTS[variable])

    with pytest.raises(ConfigError) as caught:
        Client("https://server.example")
    assert variable in str(caught.value)
    assert "\n" not in str(caught.value)
