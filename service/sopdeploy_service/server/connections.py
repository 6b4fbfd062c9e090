"""The connections of a server, and how many there may be."""

from dataclasses import dataclass, field
from typing import Protocol

from sopdeploy_service.inference.results import HttpError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.sockets import SPARE
from sopdeploy_service.settings import Settings

FULL = HttpError("too_many_connections", 503, "too many connections; retry later", 1)


class Connection(Protocol):
    """What `Connections` needs to know of one, and does to it; `LimitedHttpProtocol` is one."""

    def close_after_response(self) -> None:
        """Say in the response to the present request, if there is one, that it is the last one."""

    def abort(self) -> None:
        """Close immediately and discard the pending output."""


@dataclass
class Connections:
    """The connections of one server; used on its event loop only.

    `open` are all. `closing` has those that have their last response and do not count any more,
    the earliest first. They stay open for a short time, until the client has read it, or `SPARE`
    others follow.
    """

    settings: Settings
    metrics: Metrics
    open: dict[Connection, None] = field(default_factory=dict)
    closing: dict[Connection, None] = field(default_factory=dict)
    is_leaving: bool = False  # every response is then the last one of its connection

    def leave(self) -> None:
        """Close each connection after its next response, so that clients continue on another server."""
        self.is_leaving = True
        for connection in self.open:
            connection.close_after_response()

    def admit(self, connection: Connection) -> HttpError | None:
        """Count *connection*, until it is removed; return the error for it if there are too many."""
        self.open[connection] = None
        self.metrics.connections.set(len(self.open))
        is_full = len(self.open) - len(self.closing) > self.settings.max_connections
        return FULL if is_full else None

    def note_last_response(self, connection: Connection) -> None:
        """Note that *connection* has its last response; of more than `SPARE`, abort the one that has it longest."""
        if connection in self.open:
            self.closing[connection] = None
        if len(self.closing) > SPARE:
            longest = next(iter(self.closing))
            del self.closing[longest], self.open[longest]
            longest.abort()

    def remove(self, connection: Connection) -> None:
        """Remove *connection*, which is closed."""
        self.open.pop(connection, None)
        self.closing.pop(connection, None)
        self.metrics.connections.set(len(self.open))
