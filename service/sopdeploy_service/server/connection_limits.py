"""Limits on the number of open and idle connections of one server."""

import resource
from typing import Protocol

from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

SPARE = 64  # connections over the limit that get a 503 response; further ones are aborted
OTHER_FILES = 192  # bundles, libraries, the health port

FULL = Rejection("too_many_connections", 503, "too many connections; retry later", 1)


def allow_files(connections: int) -> None:
    """Raise the limit of open files of this process to the number that *connections* need.

    Raises `ConfigError` if the system does not allow it.
    """
    needed = connections + SPARE + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"max_connections {connections}: needs {needed} open files, the system allows {hard}; "
            "lower max_connections or raise `ulimit -n`"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Connection(Protocol):
    """The methods of a protocol that `Connections` calls."""

    def close(self) -> None:
        """Close after the pending output."""

    def abort(self) -> None:
        """Close immediately."""


class Connections:
    """The open connections of one server; used on its event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._open: dict[Connection, None] = {}  # ordered by arrival
        self._idle: dict[Connection, None] = {}  # ordered by the start of the idle time

    def opened(self, connection: Connection) -> Rejection | None:
        """Add *connection* and close the longest idle one if there are too many.

        If none is idle, the result is the rejection of *connection*.
        """
        self._open[connection] = None
        self.metrics.connections.set(len(self._open))
        excess = len(self._open) - self.settings.max_connections
        if excess <= 0 or self._close_oldest_idle():
            return None
        if excess > SPARE:
            connection.abort()
        return FULL

    def closed(self, connection: Connection) -> None:
        """Remove *connection*."""
        self._open.pop(connection, None)
        self._idle.pop(connection, None)
        self.metrics.connections.set(len(self._open))

    def idle(self, connection: Connection) -> None:
        """Mark *connection* as waiting for its next request."""
        self._idle[connection] = None
        if len(self._idle) > self.settings.max_idle_connections:
            self._close_oldest_idle()

    def busy(self, connection: Connection) -> None:
        """Mark *connection* as receiving a request."""
        self._idle.pop(connection, None)

    def _close_oldest_idle(self) -> bool:
        for connection in self._idle:
            del self._idle[connection]
            connection.close()
            return True
        return False


class ShortLivedConnections(Connections):
    """Connections of the health port: at the limit, the oldest connection is aborted, idle or not.

    So a client cannot block the health port by holding connections open.
    """

    def opened(self, connection: Connection) -> Rejection | None:
        """Add *connection*, which is never rejected."""
        if len(self._open) >= self.settings.max_connections:
            oldest = next(iter(self._open))
            self.closed(oldest)
            oldest.abort()
        return super().opened(connection)
