"""What a connection may make the parser do: its work is counted, for all that a client can send.

Every callback of the parser has a price: so many bytes of content that pay for it, or a number
that a request or a connection may have. No input, however long, is more work than these prices
allow.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import httptools
import pytest
from uvicorn.server import ServerState

from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.connections import Connections
from sopdeploy_service.server.http_protocol import (
    CALLBACK_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_URL_BYTES,
    LimitedHttpProtocol,
    limited_config,
)
from sopdeploy_service.settings import Settings
from tests.support.raw import GET, POST, post_of

READ = 256_000  # bytes that uvloop reads at once
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = POST + b"Content-Length: 900000\r\n\r\n"
SHORT = b"GET / HTTP/1.1\r\nHost:a\r\n\r\n"
UNPAID = (MAX_URL_BYTES + MAX_HEADER_BYTES) // CALLBACK_BYTES + 1  # reads without content
REQUESTS = 2  # of a connection: the second one does not wait for the response, and is ignored


class Price(NamedTuple):
    """How many calls of a kind a connection may make: so many, and one more for so many bytes of content."""

    number: int
    content_bytes: int | None = None  # None: no content pays for more


PRICES = {  # of each callback of the parser, and of a read of the socket
    "data_received": Price(UNPAID, CALLBACK_BYTES),
    "on_message_begin": Price(REQUESTS),
    "on_url": Price(REQUESTS + UNPAID),
    "on_header": Price(REQUESTS * MAX_HEADERS),
    "on_headers_complete": Price(REQUESTS),
    "on_chunk_header": Price(UNPAID + READ // CALLBACK_BYTES, CALLBACK_BYTES),
    "on_body": Price(2 * (UNPAID + READ // CALLBACK_BYTES), CALLBACK_BYTES),
    "on_message_complete": Price(REQUESTS),
}
UNUSED = {"on_chunk_complete"}  # the protocol has no such callback

STREAMS: dict[str, Callable[[int], bytes]] = {  # of about so many bytes
    "chunks of a byte": lambda size: CHUNKED + b"1\r\na\r\n" * (size // 6),
    "chunks of 6 bytes": lambda size: CHUNKED + b"6\r\naaaaaa\r\n" * (size // 11),
    "chunks of 60 bytes": lambda size: CHUNKED + (b"3c\r\n" + b"a" * 60 + b"\r\n") * (size // 66),
    "chunks of a byte after content": lambda size: (
        CHUNKED + b"%x\r\n" % (size // 2) + b"a" * (size // 2) + b"\r\n" + b"1\r\na\r\n" * (size // 12)
    ),
    "chunks of a byte between content": lambda size: (
        CHUNKED + (b"1\r\na\r\n" * 500 + b"1000\r\n" + b"a" * 4096 + b"\r\n") * (size // 7100)
    ),
    "chunk extensions": lambda size: CHUNKED + b"1;a=b\r\na\r\n" * (size // 10),
    "headers": lambda size: GET + b"a:\r\n" * (size // 4),
    "trailers": lambda size: CHUNKED + b"0\r\n" + b"a:\r\n" * (size // 4),
    "a long URL": lambda size: b"GET /" + b"a" * size,
    "a long header": lambda size: GET + b"a: " + b"a" * size,
    "blank lines": lambda size: b"\r\n" * (size // 2),
    "requests": lambda size: (GET + b"\r\n") * (size // 44),
    "requests after a long one": lambda size: (
        GET + b"A: " + b"a" * 4100 + b"\r\n\r\n" + (GET + b"\r\n") * (size // 44)
    ),
    "requests after a body": lambda size: post_of(bytes(4100)) + SHORT * (size // len(SHORT)),
    "a body": lambda size: BODY + bytes(size),
    "an upgrade with chunks of a byte": lambda size: (
        CHUNKED[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + b"1\r\na\r\n" * (size // 6)
    ),
}  # fmt: skip


class Wire(asyncio.Transport):
    """The transport of a connection without a socket."""

    is_closed = is_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 9) if name in {"peername", "sockname"} else default

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def write(self, data: bytes) -> None:
        """Drop *data*: the client reads everything."""

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    abort = close


async def never(_scope: Any, _receive: Any, _send: Any) -> None:
    """Answer no request, so that all that is accepted stays."""
    await asyncio.Future()


class Work(NamedTuple):
    """The callbacks by name, all calls of functions, and how many bytes of the stream have been read."""

    callbacks: Counter[str]
    calls: int
    read: int


def work_of(stream: bytes, read: int) -> Work:
    """Let a connection read *stream*, *read* bytes at a time, until it closes or reads no more."""

    async def scenario() -> Work:
        callbacks: Counter[str] = Counter()
        calls = position = 0
        connections = Connections(Settings(), Metrics())
        config = limited_config(never, connections)
        config.lifespan = "off"
        connection = LimitedHttpProtocol(
            connections, config=config, server_state=ServerState(), app_state={}
        )
        wire = Wire()
        connection.connection_made(wire)
        methods = {getattr(LimitedHttpProtocol, name).__code__: name for name in PRICES}

        def count(frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal calls
            calls += event in {"call", "c_call"}
            if event == "call" and frame.f_code in methods:
                callbacks[methods[frame.f_code]] += 1

        try:
            while position < len(stream) and not (
                wire.is_closed or wire.is_paused or connection._ignores_input
            ):
                sys.setprofile(count)
                connection.data_received(stream[position : position + read])
                sys.setprofile(None)
                position += read
        finally:
            sys.setprofile(None)
            connection.connection_lost(None)
            for task in connection.tasks:
                task.cancel()
        return Work(callbacks, calls, position)

    return asyncio.run(scenario())


def test_every_callback_of_the_parser_has_a_price() -> None:
    asked: set[str] = set()

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            raise AttributeError(name)

    httptools.HttpRequestParser(Recorder())
    assert asked == PRICES.keys() - {"data_received"} | UNUSED
    assert not any(hasattr(LimitedHttpProtocol, name) for name in UNUSED)


@pytest.mark.parametrize("read", [READ, 1460, 1])
@pytest.mark.parametrize("name", STREAMS)
def test_no_stream_makes_more_callbacks_than_its_content_pays_for(name: str, read: int) -> None:
    work = work_of(STREAMS[name](5_000 if read == 1 else 1_000_000), read)
    for callback, count in work.callbacks.items():
        price = PRICES[callback]
        paid = work.read // price.content_bytes if price.content_bytes else 0
        assert count <= price.number + paid, callback
    assert work.calls <= 40_000 + work.read // 4
