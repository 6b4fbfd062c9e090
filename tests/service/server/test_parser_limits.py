"""What a connection may send without an end: it is refused soon, however it is divided into reads."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from uvicorn.server import ServerState

from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.connections import Connections
from sopdeploy_service.server.http_protocol import (
    MAX_HEADER_BYTES,
    MAX_URL_BYTES,
    LimitedHttpProtocol,
    limited_config,
)
from sopdeploy_service.settings import Settings
from tests.support.raw import GET, POST

READ = 256_000  # bytes that uvloop reads at once
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = POST + b"Content-Length: 100\r\n\r\n"
# Of about so many bytes
STREAMS: dict[str, Callable[[int], bytes]] = {
    "headers": lambda size: GET + b"a:\r\n" * (size // 4),
    "trailers": lambda size: CHUNKED + b"0\r\n" + b"a:\r\n" * (size // 4),
    "a trailer": lambda size: CHUNKED + b"0\r\na: " + b"a" * size,
    "a long URL": lambda size: b"GET /" + b"a" * size,
    "a long header": lambda size: GET + b"a: " + b"a" * size,
    "a header after a body": lambda size: BODY + bytes(100) + GET + b"a: " + b"a" * size,
    "a chunk extension": lambda size: CHUNKED + b"1;" + b"a" * size,
    "blank lines": lambda size: b"\r\n" * (size // 2),
}


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


def bytes_read(stream: bytes, read: int) -> int:
    """Let a connection read *stream*, *read* bytes at a time, until it closes; return how many it has read."""

    async def scenario() -> int:
        connections = Connections(Settings(), Metrics())
        config = limited_config(never, connections)
        config.lifespan = "off"
        connection = LimitedHttpProtocol(
            connections, config=config, server_state=ServerState(), app_state={}
        )
        wire = Wire()
        connection.connection_made(wire)

        position = 0
        while position < len(stream) and not (wire.is_closed or connection._ignores_input):
            connection.data_received(stream[position : position + read])
            position += read

        connection.connection_lost(None)
        for task in connection.tasks:
            task.cancel()
        return position

    return asyncio.run(scenario())


@pytest.mark.parametrize("read", [READ, 1460, 1])
@pytest.mark.parametrize("name", STREAMS)
def test_what_has_no_end_is_refused_soon(name: str, read: int) -> None:
    most = MAX_URL_BYTES + MAX_HEADER_BYTES + 1000
    stream = STREAMS[name](1_000_000)

    assert bytes_read(stream, read) <= most + 2 * read
