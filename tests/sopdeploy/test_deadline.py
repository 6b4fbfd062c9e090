"""Responses that never end, are too large or too deep: an error of the client, within its deadline."""

import gzip
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpcore
import httpx
import pytest

from sopdeploy import client as module
from sopdeploy import deadline as deadlines
from sopdeploy.client import MAX_RESPONSE_BYTES, Client
from sopdeploy.errors import ServiceError, UnreachableError

IMAGE = b"an image"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BODY = b'{"classes":[{"label":"cat","probability":1}]}'


def bomb(size: int, window: int = 31) -> bytes:
    """Compress *size* spaces, and an object, with gzip (31) or deflate (15)."""
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    pieces = [packer.compress(b" " * 1_000_000) for _ in range(size // 1_000_000)]
    return b"".join([*pieces, packer.compress(BODY), packer.flush()])


def answer(content: bytes, *headers: bytes) -> Iterator[bytes]:
    yield HEAD + b"".join(line + b"\r\n" for line in headers)
    yield b"Content-Length: %d\r\n\r\n" % len(content)
    yield content


def forever(first: bytes, piece: bytes) -> Iterator[bytes]:
    yield first
    while True:
        yield piece


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LARGE = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
REFUSED: dict[str, Callable[[], Iterator[bytes]]] = {
    "a body without an end": lambda: forever(HEAD + CHUNKED, LARGE),
    "a body until the connection ends": lambda: forever(HEAD + b"\r\n", b" " * 1_000_000),
    "gzip that expands": lambda: answer(bomb(300_000_000), b"Content-Encoding: gzip"),
    "deflate that expands": lambda: answer(bomb(300_000_000, 15), b"Content-Encoding: deflate"),
    "gzip of gzip": lambda: answer(
        gzip.compress(bomb(3_000_000)), b"Content-Encoding: gzip, gzip"
    ),
    "another coding": lambda: answer(BODY, b"Content-Encoding: br"),
    "many levels": lambda: answer(b"[" * 100_000),
    "many levels with an end": lambda: answer(b'{"classes":' + b"[" * 500 + b"]" * 500 + b"}"),
    "many lists": lambda: answer(b"[" + b"[]," * 10_000_000 + b"[]]"),
    "numbers for classes": lambda: answer(b'{"classes":[' + b"0," * 1_000_000 + b"0]}"),
    "keys that nobody knows": lambda: answer(
        b"{" + b",".join(b'"%d":0' % n for n in range(99_999)) + b"}"
    ),
    "a number that is too long": lambda: answer(b'{"score":' + b"9" * 1_000_000 + b"}"),
    "a size of another body": lambda: iter(
        [HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}"]
    ),
}


def serve(
    pieces: Callable[[], Iterator[bytes]], wait: Callable[[], object]
) -> tuple[socket.socket, str]:
    """Answer each request with *pieces*, after *wait* for each; returns the listening socket and its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with suppress(OSError):  # the test closes the listener, the client its connections
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(1 << 16)
                    for piece in pieces():
                        connection.sendall(piece)
                        wait()
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(
                        1 << 16
                    ):  # a rest of the request would reset the connection
                        pass

    threading.Thread(target=run, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def served() -> Iterator[Callable[..., str]]:
    listeners: list[socket.socket] = []

    def start(
        pieces: Callable[[], Iterator[bytes]], wait: Callable[[], object] = lambda: None
    ) -> str:
        listener, url = serve(pieces, wait)
        listeners.append(listener)
        return url

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("case", REFUSED)
def test_a_response_that_is_too_much_is_an_error(served: Any, case: str) -> None:
    with Client(served(REFUSED[case]), retries=0, timeout=60) as client:
        with pytest.raises(ServiceError) as caught:
            client.classify(IMAGE)
        with pytest.raises(ServiceError):
            client.info()
    assert len(str(caught.value)) < 5000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "headers", [(), (b"Content-Encoding: gzip",), (b"Content-Encoding: identity",)]
)
def test_a_response_of_a_proxy_that_compresses_is_read(
    served: Any, headers: tuple[bytes, ...]
) -> None:
    content = gzip.compress(BODY) if b"Content-Encoding: gzip" in headers else BODY
    with Client(served(lambda: answer(content, *headers)), retries=0) as client:
        assert client.classify(IMAGE).classes[0].label == "cat"


DRIPS = {
    "the body": lambda: forever(HEAD + b"Content-Length: 1000000\r\n\r\n", b" "),
    "the headers": lambda: forever(HEAD + b"X: ", b"x"),
    "the status": lambda: forever(b"HTTP/1.1 200 ", b"x"),
    "chunks": lambda: forever(HEAD + CHUNKED, b"1\r\n \r\n"),
    "interim responses": lambda: forever(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
}


@pytest.mark.parametrize("case", DRIPS)
def test_a_response_that_comes_byte_by_byte_ends_at_the_deadline(
    served: Any, case: str
) -> None:
    pause = threading.Event()
    url = served(DRIPS[case], lambda: pause.wait(0.02))
    with (
        Client(url, retries=0, timeout=0.5) as client,
        pytest.raises(UnreachableError) as caught,  # httpx alone would wait for ever
    ):
        client.classify(IMAGE)
    assert caught.value.code == "timeout"


class Slow(httpcore.NetworkStream):
    """A connection on which each operation takes a second of *clock*, and records its timeout."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.timeouts = clock, list[float | None]()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self.write(b"", timeout)
        return b"x"

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)
        self.clock[0] += 1

    def start_tls(self, *arguments: Any) -> httpcore.NetworkStream:
        return self

    def close(self) -> None: ...


def test_every_operation_has_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(deadlines.time, "monotonic", lambda: clock[0])
    slow = Slow(clock)
    stream = deadlines._Stream(slow).start_tls(None, None)  # type: ignore[arg-type]
    with deadlines.deadline(104.5):
        stream.read(1, 30.0)
        stream.write(bytes(100_000), 2.0)  # two pieces
        stream.read(1)
        assert slow.timeouts == [4.5, 2.0, 2.0, 1.5]
        stream.read(1)
        for late, error in (
            (stream.read, httpcore.ReadTimeout),
            (stream.write, httpcore.WriteTimeout),
        ):
            with pytest.raises(error):
                late(1 if late == stream.read else b"x")
    stream.read(1, 7.0)
    assert slow.timeouts[-1] == 7.0


class Dead(httpcore.NetworkBackend):
    """A network in which the address *alive* answers, and all others take the time that they get."""

    def __init__(self, clock: list[float], alive: str) -> None:
        self.clock, self.alive = clock, alive
        self.tried: list[tuple[str, float | None]] = []

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: Any) -> Any:
        self.tried.append((host, timeout))
        if host == self.alive:
            return Slow(self.clock)
        self.clock[0] += timeout or 0.0
        raise httpcore.ConnectTimeout(host)


@pytest.mark.parametrize("alive", ["127.0.0.4", ""])
def test_all_addresses_of_a_name_are_tried_within_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch, alive: str
) -> None:
    clock = [100.0]
    hosts = [f"127.0.0.{number}" for number in range(1, 5)]
    monkeypatch.setattr(deadlines.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        deadlines.socket, "getaddrinfo", lambda *_, **__: [(0, (host, 80)) for host in hosts]
    )
    network = Dead(clock, alive)
    backend = deadlines._Backend(network)
    with deadlines.deadline(102.0):
        if alive:
            backend.connect_tcp("several.example", 80, 30.0)
        else:
            with pytest.raises(httpcore.ConnectTimeout):
                backend.connect_tcp("several.example", 80, 30.0)
    assert network.tried == [(host, 0.5) for host in hosts]
    assert clock[0] == (101.5 if alive else 102.0)


def test_a_name_server_that_does_not_answer_takes_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(deadlines.socket, "getaddrinfo", lambda *_, **__: gate.wait(60) and [])
    try:
        with pytest.raises(httpcore.ConnectTimeout, match="name server does not respond"):
            deadlines._look_up("slow.example", 80, 0.01)
    finally:
        gate.set()


def test_a_name_without_address_is_an_error_of_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(deadlines.socket, "getaddrinfo", refuse)
    with pytest.raises(httpcore.ConnectError, match="Name or service not known"):
        deadlines._look_up("nowhere.example", 80, 5.0)


def test_the_parts_of_httpx_that_have_deadlines_exist() -> None:
    for proxy in (None, "http://127.0.0.1:9"):
        with httpx.HTTPTransport(proxy=proxy) as transport:
            pool = deadlines.obey_deadlines(transport)._pool
            assert isinstance(pool, httpcore.ConnectionPool)
            assert isinstance(pool._network_backend, deadlines._Backend)


def test_a_response_may_have_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RESPONSE_BYTES", len(BODY))
    for content, is_accepted in ((BODY, True), (BODY + b" ", False)):
        transport = httpx.MockTransport(
            lambda _, body=content: httpx.Response(200, content=body)
        )
        with Client("http://server", transport=transport, retries=0) as client:
            if is_accepted:
                assert client.classify(IMAGE).classes
            else:
                with pytest.raises(ServiceError):
                    client.classify(IMAGE)
    assert MAX_RESPONSE_BYTES >= 10_000_000
