"""Responses that never end, are too large or too deep: an error of the client, within its deadline."""

import gzip
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from sopdeploy import client_requests as module
from sopdeploy.client import Client
from sopdeploy.client_requests import MAX_RESPONSE_BYTES
from sopdeploy.errors import ServiceError, UnreachableError

pytestmark = pytest.mark.usefixtures("client_kind")  # with both clients
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


@pytest.mark.slow
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
