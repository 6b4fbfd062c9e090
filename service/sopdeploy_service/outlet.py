"""The transport as one answer sees it: fewer calls of the system, and an end that the client can read."""

import asyncio
from collections.abc import Callable

INTERIM = b"HTTP/1.1 100 "


class Outlet:
    """Writes one answer to *transport*; to close it is to *hang_up*.

    The head of an answer leaves together with the first piece of its body: uvicorn writes each alone, and
    each write would be a call of the system and wake the client. An answer to `HEAD` has none: *bodiless*.
    """

    def __init__(
        self, transport: asyncio.Transport, hang_up: Callable[[], None], *, bodiless: bool = False
    ) -> None:
        self._transport = transport
        self._hang_up = hang_up
        self._begun = bodiless
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Write a piece of the answer, or `100 Continue` before it."""
        if not self._begun and not data.startswith(INTERIM):
            self._begun = True
            self._head = data
        elif self._head:
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._transport.write(data)

    def close(self) -> None:
        """End the connection after this answer."""
        if self._head:
            self.write(b"")
        self._hang_up()
