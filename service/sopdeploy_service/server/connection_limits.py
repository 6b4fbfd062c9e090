"""What the connections of one server share: their limits, their number and who of them is idle."""

import asyncio
import resource
from collections.abc import Callable
from typing import Protocol

from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

SPARE = 64  # connections over the limit that are told so; more are cut without a word

OTHER_FILES = 192  # bundles, libraries, the health port

FULL = Rejection("too_many_connections", 503, "too many connections; come back later", 1)


def allow_files(connections: int) -> None:
    """Let this process open the files that so many *connections* need: one refused is better than one unseen.

    Raises `ConfigError` where the system does not allow it.
    """
    needed = connections + SPARE + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"max_connections {connections}: needs {needed} open files where the system allows {hard}; "
            "choose fewer or raise `ulimit -n`"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Connection(Protocol):
    """What the book of connections needs of one."""

    def hang_up(self) -> None:
        """Close in an orderly way."""

    def cut(self) -> None:
        """Close at once, with nothing written."""


class Connections:
    """The book of one server's connections; used on its event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._open: dict[Connection, None] = {}  # in the order they came
        self._idle: dict[Connection, None] = {}  # in the order they became so

    def opened(self, connection: Connection) -> Rejection | None:
        """Enter *connection*; return why it gets no answer, or None.

        Where the limit is reached, the connection that has been idle for longest makes room.
        """
        self._open[connection] = None
        self.metrics.connections(len(self._open))
        excess = len(self._open) - self.settings.max_connections
        if excess <= 0 or self._close_oldest_idle():
            return None
        if excess > SPARE:
            connection.cut()
        return FULL

    def closed(self, connection: Connection) -> None:
        """Strike *connection* out."""
        self._open.pop(connection, None)
        self._idle.pop(connection, None)
        self.metrics.connections(len(self._open))

    def idle(self, connection: Connection) -> None:
        """Note that *connection* waits for its client's next request."""
        self._idle[connection] = None
        if len(self._idle) > self.settings.max_idle_connections:
            self._close_oldest_idle()

    def busy(self, connection: Connection) -> None:
        """Note that a request arrives on *connection*."""
        self._idle.pop(connection, None)

    def _close_oldest_idle(self) -> bool:
        for connection in self._idle:
            del self._idle[connection]
            connection.hang_up()
            return True
        return False


class Fleeting(Connections):
    """The book of a port that answers at once: who has been there longest makes room, whatever it waits for.

    So nobody keeps others out by holding connections on which nothing, or half a request, is said.
    """

    def opened(self, connection: Connection) -> Rejection | None:
        """Enter *connection*, which is always answered."""
        if len(self._open) >= self.settings.max_connections:
            oldest = next(iter(self._open))
            self.closed(oldest)
            oldest.cut()
        return super().opened(connection)


class Timers:
    """Clocks on *loop*; used on it only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: dict[str, asyncio.TimerHandle] = {}

    def start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        """Call *then* after *seconds*, unless the clock *name* runs already."""
        if name not in self._running:
            self._running[name] = self._loop.call_later(seconds, self._ring, name, then)

    def stop(self, name: str) -> bool:
        """Stop the clock *name*; return whether it ran."""
        timer = self._running.pop(name, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def stop_all(self) -> None:
        """Stop every clock."""
        for name in list(self._running):
            self.stop(name)

    def _ring(self, name: str, then: Callable[[], None]) -> None:
        del self._running[name]
        then()
