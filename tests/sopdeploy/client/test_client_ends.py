"""How a request ends, whatever is at the other end: in one line with its address."""

import asyncio
import gzip
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy.client import AsyncClient, Client
from sopdeploy.errors import OverloadedError, ServiceError, SopdeployError, UnreachableError
from sopdeploy_commands.app import app
from tests.support.stub_server import Gate, Received, reply, stub_server

RESULT = b'{"classes":[]}'
CLOSE = "Connection: close"
LOGIN = "Location: http://portal.example/login"
FOREIGN = "foreign_answer"
HTTP = "http_error"
LOST = "unreachable"
LATE = "timeout"


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
        "/elsewhere",
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
    "an escape sequence": (
        *(
            reply(
                b'{"title":"x","status":422,"code":"a","detail":"b\\u001b[31m\\nc"}', "422 X"
            ),
            "a",
        ),
        *("422 a: b [31m c", 1),
    ),
    "fewer bytes": (reply(RESULT, "200 X", CLOSE)[:-3], LOST, "no response", 3),
    "a chunk, cut": (
        raw(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked", b"5\r\nab"),
        LOST,
        "no response",
        3,
    ),
    "another protocol": (raw(b"<html>old</html>"), LOST, "no response", 3),
    "the end, each time": (b"", LOST, "no response", 3),
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
def test_a_connection_that_the_server_closes_first_is_replaced() -> None:
    """As after the time for idle connections: the server ends it between two photographs."""

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


@pytest.mark.usefixtures("client_kind")
def test_all_callers_wait_until_a_server_is_there_again() -> None:
    def call(url: str) -> list[str]:
        with Client(url, timeout=60) as client:
            return [label_of(client, name) for name in ("first", "second")]

    with socket.socket() as taken, ThreadPoolExecutor(8) as threads:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        calls = [threads.submit(call, f"http://127.0.0.1:{port}") for _ in range(8)]
        assert not wait(calls, timeout=0.5).done  # the port refuses connections
        taken.close()

        # It breaks one connection, refuses one request, and then it works.
        answers = iter([None, reply(b"<html>", "502 Bad Gateway")])
        with stub_server(lambda request: next(answers, named(request)), port):
            assert [one.result(60) for one in calls] == [["first", "second"]] * 8


LARGE = bytes(8_000_000)  # more than the buffers of the system


@pytest.mark.usefixtures("client_kind")
@pytest.mark.parametrize("phase", ["connect", "write", "first byte"])
def test_a_server_that_stops_is_left_after_the_time_of_the_call(phase: str) -> None:
    with (
        silent(accepts=phase != "connect") as url,
        Client(url, timeout=60, retries=0) as client,
        pytest.raises(UnreachableError) as caught,
    ):
        client.classify(LARGE if phase == "write" else b"x", timeout=0.2)
    assert caught.value.code == LATE
    assert str(caught.value).startswith(f"{url}/v1/classify: ")
    assert "0.2 s" in str(caught.value)


def test_a_name_without_an_address_is_an_error_of_the_name_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with (
        Client("http://nowhere.example", retries=0) as client,
        pytest.raises(UnreachableError, match="not known"),
    ):
        client.info()


def named(request: Received) -> bytes:
    return reply(b'{"classes":[{"label":"%b","probability":1}]}' % request.body)


def label_of(client: Client, photograph: str) -> str:
    return client.classify(photograph.encode()).classes[0].label


def test_ctrl_c_ends_the_call_and_leaves_no_response() -> None:
    main = threading.main_thread().ident
    interrupted = threading.Event()
    # A test runner may ignore it
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

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


def test_a_call_from_an_event_loop_blocks_it_unless_in_a_thread() -> None:
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
