"""The connections of a server: how many there may be, and from one address."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from sopdeploy_service.inference.results import HttpError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.sockets import SPARE
from sopdeploy_service.settings import Settings

# An address may have a quarter of `max_connections`, or so many if that is more
MIN_SHARE = 64
FULL = HttpError("too_many_connections", 503, "too many connections; retry later", 1)


class Connection(Protocol):
    """What `Connections` needs to know of one, and does to it; `LimitedHttpProtocol` is one."""

    address: str  # of the client or proxy
    is_trusted: bool  # that of a proxy in the settings

    def close_after_response(self) -> None:
        """Say in the response to the present request, if there is one, that it is the last one."""

    def close(self) -> None:
        """Close after the pending output."""

    def abort(self) -> None:
        """Close immediately and discard the pending output."""


@dataclass
class Connections:
    """The connections of one server; used on its event loop only.

    `open` are all, in the order of their arrival, `idle` those between two requests, in the
    order in which this began. `closing` has those that have their last response and do not count
    any more, the earliest first. They stay open for a short time, until the client has read it,
    or `SPARE` others follow. `num_by_address` does not count connections of trusted proxies.
    """

    settings: Settings
    metrics: Metrics
    open: dict[Connection, None] = field(default_factory=dict)
    idle: dict[Connection, None] = field(default_factory=dict)
    closing: dict[Connection, None] = field(default_factory=dict)
    num_by_address: Counter[str] = field(default_factory=Counter)
    is_leaving: bool = False  # every response is then the last one of its connection

    def leave(self) -> None:
        """Close each connection after its next response, so that clients continue on another server."""
        self.is_leaving = True
        for connection in self.open:
            connection.close_after_response()

    def admit(self, connection: Connection) -> HttpError | None:
        """Admit *connection*; if there are too many, close an idle one, or return the error for this one.

        There are too many in all, or from its address: an idle one of the same address is then
        closed. A refused one is counted, too, until its caller has closed it.
        """
        self.open[connection] = None
        if not connection.is_trusted:
            self.num_by_address[connection.address] += 1
        self.metrics.connections.set(len(self.open))

        # Choose among which connections one has to be closed.
        limit = self.settings.max_connections
        address = connection.address
        if self.num_by_address[address] > max(MIN_SHARE, limit // 4):
            idle = [one for one in self.idle if one.address == address]
        elif len(self.open) - len(self.closing) > limit:
            idle = list(self.idle)
        else:
            return None

        if not idle:
            return FULL
        longest_idle = idle[0]
        longest_idle.close()
        self.note_last_response(longest_idle)
        return None

    def note_last_response(self, connection: Connection) -> None:
        """Note that *connection* has its last response; of more than `SPARE`, abort the one that has it longest."""
        self.idle.pop(connection, None)

        if connection in self.open:
            self.closing[connection] = None
        if len(self.closing) > SPARE:
            longest = next(iter(self.closing))
            del self.closing[longest], self.open[longest]
            longest.abort()

    def remove(self, connection: Connection) -> None:
        """Remove *connection*, which is closed."""
        for state in (self.open, self.idle, self.closing):
            state.pop(connection, None)

        if not connection.is_trusted:
            self.num_by_address[connection.address] -= 1
            if not self.num_by_address[connection.address]:
                del self.num_by_address[connection.address]

        self.metrics.connections.set(len(self.open))
