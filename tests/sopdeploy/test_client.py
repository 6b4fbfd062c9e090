"""The client: requests, parsed responses, retries, deadlines and errors."""

import base64
import inspect
import math
import re
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest

from sopdeploy import client_requests as module
from sopdeploy.client import AsyncClient, Client
from sopdeploy.errors import (
    ConfigError,
    DataError,
    OverloadedError,
    ServiceError,
    UnreachableError,
)

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

    def call(self, method: str, *arguments: Any, retries: int = 4, **options: Any) -> Any:
        """Call *method* of a client that sends its requests here."""
        key = options.pop("api_key", None)
        transport = httpx.MockTransport(self)
        with Client(
            "http://server", transport=transport, retries=retries, api_key=key
        ) as client:
            return getattr(client, method)(*arguments, **options)


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"title": "x", "status": status, "code": code, "detail": "because"}
    return httpx.Response(status, json=body, headers=headers)


SUCCESS = httpx.Response(200, json={"classes": [{"label": "cat", "probability": 0.75}]})


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays of all retries; the client does not sleep."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(module, "sleep", sleep)
    monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
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
    assert (result.warnings, result.error) == (("exif_rotated",), None)
    assert (result.model_digest, result.timing_ms) == (
        "3f6c01d2a4b7",
        {"decode": 3.1, "infer": 5.0},
    )


def test_a_long_header_takes_no_quadratic_time():
    headers = {"Server-Timing": "a" * 300_000 + "1;dur=2, infer;dur=3.5"}
    server = Script(httpx.Response(200, headers=headers, content=SUCCESS.content))
    assert server.call("classify", b"x").timing_ms == {"infer": 3.5}


# Each method with its reply, its request, and the parameters that each call has
VECTOR = base64.b64encode(np.ones(2, "<f4").tobytes()).decode()
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "classify": ({"classes": []}, "POST /v1/classify", {}),
    "embed": ({"embedding": VECTOR}, "POST /v1/embed", {"encoding_format": "base64"}),
    "info": ({"server": "1", "models": []}, "GET /info", {}),
}
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "model": ("a b", "a b"),
    "top_k": (3, "3"),
    "threshold": (0.25, "0.25"),
    "explain": (True, "true"),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_argument_of_a_method_arrives_in_its_request(method: str):
    content, line, always = METHODS[method]
    images = [] if method == "info" else [b"bytes"]
    known = inspect.signature(getattr(AsyncClient, method)).parameters.keys()
    for name in known - {"self", "image", "timeout"} | {""}:
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


def test_a_list_is_sent_as_a_form_and_returned_in_order_with_errors():
    error = {"title": "x", "status": 422, "code": "truncated_image", "detail": "cut"}
    server = Script(httpx.Response(200, json={"results": [{"classes": []}, {"error": error}]}))
    good, bad = server.call("classify", [b"first", b"second"])
    assert (good.error, bad.error.code, bad.classes) == (None, "truncated_image", ())
    body = server.requests[0].content
    assert 0 < body.index(b"first") < body.index(b"second")
    assert body.count(b'; name="image"') == 2


class Limited:
    """A server that takes so many images, and so many bytes of them, in one request."""

    def __init__(self, num_images: int, num_bytes: int) -> None:
        self.num_images, self.num_bytes = num_images, num_bytes

    def __call__(self, request: httpx.Request) -> httpx.Response:
        images = re.findall(rb"octet-stream\r\n\r\n(.*?)\r\n--", request.content)
        if sum(map(len, images)) > self.num_bytes:
            return httpx.Response(413, text="<html>of a proxy</html>")
        if len(images) > self.num_images:
            return problem(400, "too_many_images")
        rows = [{"classes": [{"label": str(len(one)), "probability": 1}]} for one in images]
        return httpx.Response(200, json={"results": rows})


@pytest.mark.parametrize(
    ("sizes", "num_images", "num_bytes"),
    [([1, 2, 3, 4, 5], 2, 99), ([4, 4, 4, 4, 4, 4, 1], 99, 9), ([1, 20, 3], 99, 9)],
    ids=["many", "large together", "one is too large alone"],
)
def test_a_list_is_divided_where_the_server_takes_less_at_once(sizes, num_images, num_bytes):
    server = httpx.MockTransport(Limited(num_images, num_bytes))
    with Client("http://server", transport=server) as client:
        results = client.classify([b"x" * size for size in sizes])
    labels = [result.classes[0].label if result.classes else None for result in results]
    assert labels == [str(size) if size <= num_bytes else None for size in sizes]
    statuses = [result.error.status for result in results if result.error]
    assert statuses == [413 for size in sizes if size > num_bytes]


def test_the_only_image_of_a_list_that_is_too_large_is_an_error():
    server = httpx.MockTransport(Limited(9, 9))
    with (
        Client("http://server", transport=server) as client,
        pytest.raises(ServiceError, match="413"),
    ):
        client.classify([b"x" * 10])


def test_a_list_may_be_empty_or_have_one_image():
    server = Script(SUCCESS)
    assert (server.call("classify", []), server.requests) == ([], [])
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


@pytest.mark.parametrize("content", [b"<html>Bad Gateway</html>", b'{"detail": "no"}'])
def test_error_pages_of_proxies_are_errors(content):
    with pytest.raises(ServiceError, match="502") as caught:
        Script(httpx.Response(502, content=content)).call("classify", b"x")
    assert (caught.value.status, caught.value.code) == (502, "http_error")


@pytest.mark.parametrize(
    "reply",
    [
        problem(422, "no"),
        problem(503, "busy"),
        *map(httpx.Response, (200, 502)),
        httpx.ReadTimeout("slow"),
    ],
)
def test_an_error_names_the_address_without_its_password(delays, reply):
    transport = httpx.MockTransport(Script(reply))
    client = Client("http://bob:secret@server:81", transport=transport, retries=0)
    with client, pytest.raises(ServiceError, match="http://server:81/v1/classify: ") as caught:
        client.classify(b"x")
    assert "secret" not in str(caught.value)


def test_a_key_that_is_no_header_and_options_that_do_not_exist_are_rejected():
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


def test_a_full_queue_is_retried_no_sooner_than_retry_after(delays):
    server = Script(problem(429, "queue_full", **{"Retry-After": "3"}), SUCCESS)

    assert server.call("classify", b"x").classes[0].label == "cat"

    (delay,) = delays
    assert 3 <= delay < 4


def test_another_replica_is_asked_at_once_and_then_no_sooner_than_retry_after(delays):
    draining = problem(503, "draining", **{"Retry-After": "3"})
    server = Script(draining, draining, SUCCESS)

    assert server.call("classify", b"x").classes[0].label == "cat"

    first, second = delays
    assert first == 0.0
    assert 3 <= second < 4


def test_an_upload_that_was_too_slow_is_sent_again(delays):
    assert Script(problem(408, "slow_body"), SUCCESS).call("classify", b"x").classes
    assert len(delays) == 1


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
    monkeypatch.setattr(module.time, "time", lambda: 1_795_932_000.0)  # 06:00:00 GMT
    assert module.retry_after(httpx.Response(503, headers={"Retry-After": text})) == seconds


def test_a_connection_may_take_a_part_of_the_time_only():
    server = Script(SUCCESS)
    server.call("classify", b"x", timeout=10)
    timeouts = server.requests[0].extensions["timeout"]
    assert timeouts["connect"] == module.CONNECT_SECONDS


BROKEN = [
    httpx.ConnectError("refused"),
    httpx.ConnectTimeout("slow"),
    httpx.RemoteProtocolError("closed"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda error: type(error).__name__)
def test_a_connection_that_broke_before_a_response_is_retried(delays, broken):
    assert Script(broken, broken, SUCCESS).call("classify", b"x").classes[0].probability == 0.75
    assert delays == [0.0, 0.4]  # at once, because another replica may answer


# Replies that no retry follows: (reply, class of the error, its status and code).
FINAL: dict[str, tuple[Any, type[ServiceError], int, str]] = {
    "no key": (problem(401, "no_key"), ServiceError, 401, "no_key"),
    "truncated": (problem(422, "truncated_image"), ServiceError, 422, "truncated_image"),
    "deadline": (problem(504, "deadline"), ServiceError, 504, "deadline"),
    "timeout": (httpx.ReadTimeout("slow"), UnreachableError, 0, "timeout"),
    "late": (
        problem(429, "queue_full", **{"Retry-After": "60"}),
        OverloadedError,
        429,
        "queue_full",
    ),
}


@pytest.mark.parametrize("name", FINAL)
def test_other_errors_are_not_retried(delays, name):
    reply, kind, status, code = FINAL[name]
    server = Script(reply)
    with pytest.raises(ServiceError) as caught:
        server.call("classify", b"x", timeout=10)
    assert (type(caught.value), caught.value.status, caught.value.code) == (kind, status, code)
    assert (len(server.requests), delays) == (1, [])


def test_the_number_of_retries_is_limited(delays):
    server = Script(problem(429, "queue_full", **{"Retry-After": "soon"}))
    with pytest.raises(OverloadedError, match="queue_full") as caught:
        server.call("classify", b"x", retries=3)
    assert (caught.value.retry_after, len(server.requests), delays) == (0, 4, [0.2, 0.4, 0.8])
    server = Script(httpx.ConnectError("connection refused"))
    with pytest.raises(UnreachableError, match="connection refused") as unreachable:
        server.call("classify", b"x", retries=1)
    assert (unreachable.value.code, len(server.requests)) == ("unreachable", 2)


def calls_until_the_end(server: Script, count: int, client: Any) -> int:
    """Call *count* times; return how many requests were sent."""
    before = len(server.requests)
    for _ in range(count):
        with suppress(ServiceError):
            client.classify(b"x")
    return len(server.requests) - before


def test_an_overloaded_server_gets_few_retries(delays, monkeypatch):
    monkeypatch.setattr(module, "FIRST_RETRIES", 3.0)
    monkeypatch.setattr(module, "RETRY_SHARE", 0.25)
    server = Script(problem(429, "queue_full"))

    with Client("http://server", transport=httpx.MockTransport(server)) as client:
        assert calls_until_the_end(server, 10, client) == 10 + 3

        server.replies = [SUCCESS]
        assert calls_until_the_end(server, 8, client) == 8

        server.replies = [httpx.ConnectError("refused")]
        assert calls_until_the_end(server, 10, client) == 10 + 2


def test_the_retries_that_a_client_saves_are_limited(monkeypatch):
    budget = module.RetryBudget()
    monkeypatch.setattr(module, "MAX_SAVED_RETRIES", 12.0)

    for _ in range(1000):
        budget.add_success()

    assert [budget.take() for _ in range(13)] == [True] * 12 + [False]


def test_the_rate_limit_of_a_key_is_always_waited_for(delays):
    limited = problem(429, "rate_limited", **{"Retry-After": "1"})
    server = Script(*[limited, SUCCESS] * 30, SUCCESS)

    with Client("http://server", transport=httpx.MockTransport(server)) as client:
        assert all(client.classify(b"x").classes for _ in range(30))

    assert len(delays) == 30


def test_the_server_is_told_the_number_of_the_attempt_and_a_time_that_ends_before_the_call(
    delays, monkeypatch
):
    server = Script(httpx.ConnectError("no"), SUCCESS)
    server.call("classify", b"x", timeout=10)
    assert [one.headers["X-Request-Attempt"] for one in server.requests] == ["1", "2"]
    first, second = (
        int(request.headers["X-Request-Timeout-Ms"]) for request in server.requests
    )
    assert 0 < second <= first <= 9_500

    monkeypatch.setattr(module, "SERVER_SHARE", 1e-9)
    server = Script(SUCCESS)
    server.call("classify", b"x", timeout=10)
    assert server.requests[0].headers["X-Request-Timeout-Ms"] == "1"


@pytest.mark.parametrize("timeout", [0, -1.0, math.inf, math.nan, None, "30", True])
def test_a_timeout_that_is_no_positive_number_is_one_error_line(timeout: Any) -> None:
    with pytest.raises(ConfigError, match=r"timeout.*give a positive number of seconds"):
        Client("http://127.0.0.1:1", timeout=timeout)


def test_a_call_after_close_is_one_error_line() -> None:
    with Client("http://127.0.0.1:1") as client:
        client.close()
        with pytest.raises(ConfigError, match=r"^the client is closed; make another one$"):
            client.info()


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
            with pytest.raises(UnreachableError, match="belongs to another request"):
                client.info()
