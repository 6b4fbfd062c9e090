"""The connections of a server, how many there may be, and which one makes room for another."""

import ssl
from asyncio import AbstractEventLoop
from dataclasses import dataclass, field
from typing import Protocol

from sopdeploy_service.http.middleware import METRICS_PATH, PROBES
from sopdeploy_service.inference.results import HttpError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.sockets import SPARE
from sopdeploy_service.settings import Settings

FRESH_SECONDS = 1.0  # in which the client of a new connection begins, unless it only prepares
FULL = HttpError("too_many_connections", 503, "too many connections; retry later", 1)


class Connection(Protocol):
    """What `Connections` needs to know of one, and does to it; `LimitedHttpProtocol` is one."""

    loop: AbstractEventLoop

    def is_quiet(self) -> bool:
        """Tell whether no byte of its client waits to be read, and none for its client to be sent."""

    def close_after_response(self) -> None:
        """Say in the response to the present request, if there is one, that it is the last one."""

    def close(self) -> None:
        """Close after the pending output."""

    def abort(self) -> None:
        """Close immediately and discard the pending output."""


@dataclass
class Connections:
    """The connections of one server, from before their handshake; used on its event loop only.

    `open` are all. `idle` are those that count but have no request, the longest first, with the
    time of the loop from which they may make room for others. `uncounted` are at most `SPARE` that do not count,
    the earliest first: those that have their last response, until the client has read it, and new
    ones for which there was no room, until their request shows whether it is a probe.
    """

    settings: Settings
    metrics: Metrics
    tls: ssl.SSLContext | None = None  # of HTTPS
    open: dict[Connection, None] = field(default_factory=dict)
    idle: dict[Connection, float] = field(default_factory=dict)
    uncounted: dict[Connection, None] = field(default_factory=dict)
    is_leaving: bool = False  # every response is then the last one of its connection

    def leave(self) -> None:
        """Close each connection after its next response, so that clients continue on another server."""
        self.is_leaving = True
        for connection in self.open:
            connection.close_after_response()

    def admit(self, connection: Connection) -> None:
        """Add *connection*, until it is removed; it counts if there is room, or if an idle one makes room."""
        self.open[connection] = None
        self.metrics.connections.set(len(self.open))
        if self._make_room():
            self.note_idle(connection, is_fresh=True)
        else:
            self._stop_counting(connection)

    def admit_request(self, connection: Connection, path: str) -> HttpError | None:
        """Return the error for a request of *path* on *connection* if there is still no room for it.

        Probes and, for a few connections over the limit, the metrics always have room. They count
        until they have their response, which must be the last one of a connection over the limit.
        """
        if connection not in self.uncounted:
            return None

        # Room may have become free since it was admitted.
        del self.uncounted[connection]
        if self._make_room() or path in PROBES:
            return None
        if path == METRICS_PATH and self._num_over_limit() <= SPARE:
            return None

        self._stop_counting(connection)
        return FULL

    def is_over_limit(self) -> bool:
        """Tell whether more connections count than may."""
        return self._num_over_limit() > 0

    def note_idle(self, connection: Connection, *, is_fresh: bool = False) -> None:
        """Note that *connection* waits for its next request, or for the first one if it *is_fresh*."""
        self.idle.pop(connection, None)  # it is now the last one
        if connection not in self.uncounted:  # its end would make no room
            now = connection.loop.time()
            self.idle[connection] = now + FRESH_SECONDS if is_fresh else now

    def note_request(self, connection: Connection) -> None:
        """Note that a request of *connection* begins."""
        self.idle.pop(connection, None)

    def note_last_response(self, connection: Connection) -> None:
        """Note that *connection* has its last response."""
        if connection in self.open:
            self._stop_counting(connection)

    def remove(self, connection: Connection) -> None:
        """Remove *connection*, which is closed."""
        self.open.pop(connection, None)
        self.idle.pop(connection, None)
        self.uncounted.pop(connection, None)
        self.metrics.connections.set(len(self.open))

    def _num_over_limit(self) -> int:
        return len(self.open) - len(self.uncounted) - self.settings.max_connections

    def _make_room(self) -> bool:
        """Tell whether there is room for one of the counted connections; if need be, close the longest idle one.

        One whose next request has arrived, although it was not read yet, is not idle any more.
        """
        if self._num_over_limit() <= 0:
            return True

        for connection, since in self.idle.items():
            if since <= connection.loop.time() and connection.is_quiet():
                connection.close()
                self.note_last_response(connection)
                return True
        return False

    def _stop_counting(self, connection: Connection) -> None:
        """Let *connection* count no more; of more than `SPARE` such ones, abort the earliest."""
        self.idle.pop(connection, None)
        self.uncounted[connection] = None
        if len(self.uncounted) > SPARE:
            earliest = next(iter(self.uncounted))
            del self.uncounted[earliest], self.open[earliest]
            earliest.abort()
