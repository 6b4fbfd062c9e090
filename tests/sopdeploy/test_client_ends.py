"""How a request ends, whatever is at the other end: in one line with its address."""

import asyncio
import gzip
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sopdeploy import client_requests
from sopdeploy.client import AsyncClient, Client
from sopdeploy.errors import (
    OverloadedError,
    ServiceError,
    SopdeployError,
    UnreachableError,
)
from sopdeploy_commands.app import app
from tests.support.stub_server import Gate, Received, reply, stub_server

RESULT = b'{"classes":[]}'
CLOSE = "Connection: close"
LOGIN = "Location: http://portal.example/login"
FOREIGN, HTTP, LOST, LATE = "foreign_answer", "http_error", "unreachable", "timeout"


def raw(head: bytes, body: bytes = b"") -> bytes:
    return head + b"\r\nConnection: close\r\n\r\n" + body


# What a server sends for a photograph; code and a part of the client's error; number of
# requests.
ENDS: dict[str, tuple[bytes, str, str, int]] = {
    "a login page of the network": (
        reply(b"<html>", "302 Found", LOGIN),
        HTTP,
        "portal.example/login",
        1,
    ),
    "a redirect to https": (
        reply(b"", "301 X", "Location: https://127.0.0.1/"),
        HTTP,
        "redirects to",
        1,
    ),
    "a redirect that is kept": (
        reply(b"", "307 X", "Location: /elsewhere"),
        HTTP,
        "'/elsewhere'",
        1,
    ),
    "a redirect to no URL": (
        reply(b"", "308 X", "Location: http://[::1"),
        HTTP,
        "redirects to",
        1,
    ),
    "a login is required": (reply(b"<html>", "511 X"), HTTP, "511", 1),
    "a page": (reply(b"<html>login</html>"), FOREIGN, "not a sopdeploy response", 1),
    "nothing": (reply(b""), FOREIGN, "not a sopdeploy response", 1),
    "other JSON": (reply(b"[" * 100_000), FOREIGN, "not a sopdeploy response", 1),
    "gzip, cut": (
        *(reply(gzip.compress(RESULT * 99)[:-12], "200 X", "Content-Encoding: gzip"), FOREIGN),
        *("not a sopdeploy response", 1),
    ),
    "brotli": (
        reply(b"?", "200 X", "Content-Encoding: br"),
        FOREIGN,
        "not a sopdeploy response",
        1,
    ),
    "fewer bytes": (reply(RESULT, "200 X", CLOSE)[:-3], LOST, "the response breaks off", 1),
    "a chunk, cut": (
        *(raw(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked", b"5\r\nab"), LOST),
        *("the response breaks off", 1),
    ),
    "two lengths": (
        *(raw(b"HTTP/1.1 200 X\r\nContent-Length: 2\r\nContent-Length: 3", b"{}"), FOREIGN),
        *("no HTTP response (conflicting", 1),
    ),
    "a long header": (
        raw(b"HTTP/1.1 200 X\r\nX: " + b"a" * 300_000),
        FOREIGN,
        "no HTTP response",
        1,
    ),
    "another protocol": (raw(b"<html>old</html>"), FOREIGN, "no HTTP response", 1),
    "another protocol from here on": (
        raw(b"HTTP/1.1 101 X\r\nUpgrade: x"),
        FOREIGN,
        "no HTTP response",
        1,
    ),
    "an escape sequence": (
        *(
            reply(
                b'{"title":"x","status":422,"code":"a","detail":"b\\u001b[31m\\nc"}', "422 X"
            ),
            "a",
        ),
        *("422 a: b [31m c", 1),
    ),
    "the end, each time": (b"", LOST, "is a server running there?", 3),
}


@pytest.mark.usefixtures("client_kind")
@pytest.mark.parametrize("case", ENDS)
def test_every_end_is_one_line_with_the_address_and_the_cause(
    case: str, tmp_path: Path
) -> None:
    response, code, text, requests = ENDS[case]
    with (
        stub_server(lambda _: response or None) as server,
        Client(server.url, timeout=60, retries=2) as client,
    ):
        with pytest.raises(ServiceError) as caught:
            client.classify(b"x")
        assert str(caught.value).startswith(f"{server.url}/v1/classify: ")
        assert (caught.value.code, len(server.received)) == (code, requests), caught.value
        assert text in str(caught.value)
        assert str(caught.value).isprintable()

        with pytest.raises(ServiceError):
            client.info()
        health = CliRunner().invoke(app, ["health", "--url", server.url])
        assert (health.exit_code, health.stderr.count("\n")) == (1, 1), health.stderr


GOOD = {
    "responses in between": b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + reply(RESULT),
    "gzip": reply(gzip.compress(RESULT), "200 OK", "Content-Encoding: gzip"),
}


@pytest.mark.usefixtures("client_kind")
@pytest.mark.parametrize("case", GOOD)
def test_a_client_finds_the_end_of_its_response(case: str) -> None:
    with stub_server(lambda _: GOOD[case]) as server, Client(server.url, timeout=60) as client:
        for _ in range(3):
            assert client.classify(b"x").classes == ()


@pytest.mark.usefixtures("client_kind")
def test_a_connection_that_the_server_closes_first_is_replaced_before_the_photograph_is_sent_again() -> (
    None
):
    """As after `keep_alive_seconds`: the server ends it between two photographs."""

    closed = threading.Event()

    def closing(request: Received) -> bytes | None:
        if request.connection == 0 and closed.is_set():
            return None
        closed.set()
        return reply(RESULT, "200 OK", f"X-Model-Digest: {request.connection}")

    with stub_server(closing) as server, Client(server.url, timeout=60) as client:
        digests = [client.classify(name).model_digest for name in (b"a", b"b", b"c")]
    assert digests == ["0", "1", "1"]
    assert [request.body for request in server.received] == [b"a", b"b", b"b", b"c"]


@contextmanager
def silent(*, accepts: bool) -> Iterator[str]:
    """A server that takes connections only if it *accepts*, reads nothing and sends nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        waiting = [] if accepts else [socket.socket() for _ in range(3)]  # they fill the queue
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield url
        for one in waiting:
            one.close()


LARGE = bytes(8_000_000)  # more than the buffers of the system


@pytest.mark.usefixtures("client_kind")
@pytest.mark.parametrize("phase", ["connect", "write", "first byte"])
def test_a_server_that_stops_in_any_phase_is_left_after_the_time_of_the_call(
    phase: str,
) -> None:
    with (
        silent(accepts=phase != "connect") as url,
        Client(url, timeout=60, retries=0) as client,
        pytest.raises(UnreachableError) as caught,
    ):
        client.classify(LARGE if phase == "write" else b"x", timeout=0.2)
    assert caught.value.code == LATE
    assert str(caught.value) == f"{url}/v1/classify: no response within 0.2 s"


@pytest.mark.usefixtures("client_kind")
@pytest.mark.parametrize("alive", ["127.0.0.4", ""])
def test_all_addresses_of_a_name_are_tried(monkeypatch: pytest.MonkeyPatch, alive: str) -> None:
    """A Service without its own address has one per replica, and some of these are gone."""
    look_up = socket.getaddrinfo

    with stub_server(named) as server:
        port = int(server.url.rpartition(":")[2])
        hosts = ["127.0.0.2", "127.0.0.3", *(["127.0.0.1"] if alive else [])]

        def several(host: str | bytes, *arguments: Any, **options: Any) -> Any:
            if host not in ("several.example", b"several.example"):
                return look_up(host, *arguments, **options)
            tcp = socket.AF_INET, socket.SOCK_STREAM, 6, ""
            return [(*tcp, (one, port)) for one in hosts]

        monkeypatch.setattr(socket, "getaddrinfo", several)
        with Client(f"http://several.example:{port}", timeout=60, retries=0) as client:
            if alive:
                assert label_of(client, "found") == "found"
            else:
                with pytest.raises(UnreachableError, match="refused"):
                    label_of(client, "lost")


@pytest.mark.usefixtures("client_kind")
def test_a_name_server_that_does_not_answer_takes_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: gate.wait(60) and [])

    with Client("http://slow.example", timeout=0.2, retries=0) as client:
        with pytest.raises(UnreachableError, match=r"no response within 0\.2 s"):
            client.info()
        gate.set()


@pytest.mark.usefixtures("client_kind")
def test_a_name_without_an_address_is_an_error_with_the_words_of_the_name_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with (
        Client("http://nowhere.example", retries=0) as client,
        pytest.raises(UnreachableError, match="Name or service not known"),
    ):
        client.info()


def test_a_host_that_is_lost_is_left_after_the_time_of_a_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_requests, "CONNECT_SECONDS", 0.2)
    with silent(accepts=False) as url, Client(url, timeout=60, retries=1) as client:
        with pytest.raises(UnreachableError, match=r"no connection within 0\.2 s") as caught:
            client.info()
        assert caught.value.code == LATE


def named(request: Received) -> bytes:
    return reply(b'{"classes":[{"label":"%b","probability":1}]}' % request.body)


def label_of(client: Client, photograph: str) -> str:
    return client.classify(photograph.encode()).classes[0].label


def test_ctrl_c_ends_the_call_and_leaves_no_response_to_the_next_one() -> None:
    main, interrupted = threading.main_thread().ident, threading.Event()
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a test runner may ignore it

    def answer(request: Received) -> bytes:
        if request.body == b"first":
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
            interrupted.wait(2)  # also if the signal comes just before the call waits
        return named(request)

    with stub_server(answer) as server, Client(server.url, timeout=60) as client:
        try:
            with pytest.raises(KeyboardInterrupt):
                label_of(client, "first")
        finally:
            signal.signal(signal.SIGINT, handler)
        interrupted.set()
        assert [label_of(client, name) for name in ("second", "third")] == ["second", "third"]
    assert [request.body for request in server.received] == [b"first", b"second", b"third"]


def test_a_call_from_a_running_event_loop_blocks_it_and_one_in_a_thread_does_not() -> None:
    async def calls(client: Client) -> list[str]:
        direct = label_of(client, "direct")
        names = [f"number {number}" for number in range(20)]
        return [
            direct,
            *await asyncio.gather(
                *(asyncio.to_thread(label_of, client, name) for name in names)
            ),
        ]

    with stub_server(named) as server, Client(server.url, timeout=60) as client:
        found = asyncio.run(calls(client))
        assert found == ["direct", *(f"number {number}" for number in range(20))]
        assert label_of(client, "after the loop") == "after the loop"


def test_a_task_that_is_cancelled_ends_its_request_and_no_other() -> None:
    gate = Gate(named)

    async def calls(url: str) -> str:
        async with AsyncClient(url, timeout=60) as client:
            first = asyncio.create_task(client.classify(b"first"))
            await asyncio.to_thread(gate.asked.wait, 60)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first

            second = await client.classify(b"second")
            gate.opened.set()
            return second.classes[0].label

    with stub_server(gate) as server:
        assert asyncio.run(calls(server.url)) == "second"


def test_tasks_share_a_client_and_wait_at_the_same_time() -> None:
    names = [f"number {number}" for number in range(30)]
    together = threading.Barrier(len(names))

    def answer(request: Received) -> bytes:
        together.wait(60)
        return named(request)

    async def calls(url: str) -> list[str]:
        async with AsyncClient(url, timeout=60) as client:
            images = (client.classify(name.encode()) for name in names)
            return [result.classes[0].label for result in await asyncio.gather(*images)]

    with stub_server(answer) as server:
        assert asyncio.run(calls(server.url)) == names


def all_errors(base: type[SopdeployError] = SopdeployError) -> list[type[SopdeployError]]:
    below = (kind for one in base.__subclasses__() for kind in all_errors(one))
    return [base, *below]


def test_every_error_goes_to_other_processes_with_all_that_it_says() -> None:
    kinds = all_errors()
    assert OverloadedError in kinds
    for kind in kinds:
        error = kind.__new__(kind)
        SopdeployError.__init__(error, "message", code="c", status=503, remedies={"a": 1})
        error.retry_after = 2.5
        copy = ForkingPickler.loads(ForkingPickler.dumps(error))
        assert (type(copy), str(copy)) == (kind, str(error))
        assert copy.__dict__ == error.__dict__


def test_a_client_that_was_used_goes_to_other_processes() -> None:
    with stub_server(named) as server, Client(server.url, timeout=60) as client:
        label_of(client, "here")
        with ForkingPickler.loads(ForkingPickler.dumps(client)) as other:
            assert label_of(other, "there") == "there"
