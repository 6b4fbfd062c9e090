"""One deadline for a whole exchange of `httpx`, whose own timeouts begin again with every byte."""

import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from ssl import SSLContext
from typing import Any

import httpcore
import httpx

_PIECE = 1 << 16  # bytes that are written before the time is compared again
_end: ContextVar[float | None] = ContextVar("_end", default=None)  # by `time.monotonic`


@contextmanager
def deadline(end: float) -> Iterator[None]:
    """Let all exchanges of the block, by transports that `obey_deadlines` has changed, end at *end*."""
    token = _end.set(end)
    try:
        yield
    finally:
        _end.reset(token)


def obey_deadlines(transport: httpx.HTTPTransport) -> httpx.HTTPTransport:
    """Let the connections of *transport* end at `deadline`; return it."""
    transport._pool._network_backend = _Backend(transport._pool._network_backend)
    return transport


def is_early(response: httpx.Response) -> bool:
    """Tell whether *response* arrived with an earlier one, so before its request was sent."""
    stream = response.extensions.get("network_stream")
    return isinstance(stream, _Stream) and not stream.has_read


def _remaining(timeout: float | None, expired: type[Exception]) -> float | None:
    """Return the seconds until the deadline, if there is one, at most *timeout*; raises *expired* after it."""
    end = _end.get()
    if end is None:
        return timeout
    left = end - time.monotonic()
    if left <= 0:
        raise expired("the time for the whole response is over")
    return left if timeout is None else min(left, timeout)


def _look_up(host: str, port: int, timeout: float | None) -> list[str]:
    """Return the IP addresses of *host*; raises `httpcore.ConnectTimeout` after *timeout* seconds.

    A thread of its own asks the name server, because nothing can interrupt that. After a
    timeout, the thread goes on, and its answer is ignored. Raises `httpcore.ConnectError` if the
    name server finds no address.
    """
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.set_result([_as_host(address) for *_, address in found])
        except (OSError, UnicodeError) as error:
            answer.set_exception(httpcore.ConnectError(str(error)))

    threading.Thread(target=ask, name="look up", daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError as error:
        raise httpcore.ConnectTimeout(f"the name server does not respond for {host}") from error


def _as_host(address: Sequence[Any]) -> str:
    """Return the host in the *address* of a socket, with the zone of a link-local one."""
    zone = address[3] if len(address) > 2 else 0
    return f"{address[0]}%{zone}" if zone else str(address[0])


class _Stream(httpcore.NetworkStream):
    """A connection whose every read and write ends at the deadline."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream
        self.has_read = False  # since the last write

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self.has_read = True
        return self._stream.read(max_bytes, _remaining(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.has_read = False
        for start in range(0, len(buffer), _PIECE):
            piece = buffer[start : start + _PIECE]
            self._stream.write(piece, _remaining(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = _remaining(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """Opens connections that end at the deadline."""

    def __init__(self, backend: httpcore.NetworkBackend) -> None:
        self._backend = backend

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _look_up(host, port, _remaining(timeout, httpcore.ConnectTimeout))

        # An address that does not answer leaves the others their share of the time.
        for number, address in enumerate(addresses):
            left = _remaining(timeout, httpcore.ConnectTimeout)
            num_left = len(addresses) - number
            share = None if left is None else left / num_left
            try:
                return _Stream(
                    self._backend.connect_tcp(
                        address, port, share, local_address, socket_options
                    )
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if num_left == 1:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = _remaining(timeout, httpcore.ConnectTimeout)
        return _Stream(self._backend.connect_unix_socket(path, left, socket_options))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)
