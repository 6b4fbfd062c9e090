"""The connections of a server: what each waits for, and which one makes room if there are too many."""

from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from sopdeploy_service.inference.results import HttpError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.server.sockets import SPARE
from sopdeploy_service.settings import Settings

# Seconds for headers, a body or reading; who takes longer may have to make room for another one.
GRACE = 1.0
MIN_SECONDS = 0.001  # of a body, for its rate
# Connections of an address, or a quarter of `max_connections` if that is more; those beyond make
# room at once.
MIN_SHARE = 64
FULL = HttpError("too_many_connections", 503, "too many connections; retry later", 1)


class Connection(Protocol):
    """What `Connections` needs to know of one, and does to it; `LimitedHttpProtocol` is one."""

    address: str  # of the client or proxy
    is_trusted: bool  # that of a proxy in the settings
    body_bytes: int  # of the present request, so far
    loop: AbstractEventLoop

    def close_after_response(self) -> None:
        """Say in the response to the present request, if there is one, that it is the last one."""

    def evict(self) -> None:
        """Close for another connection."""

    def abort(self) -> None:
        """Close immediately and discard the pending output."""


@dataclass
class Connections:
    """The connections of one server; used on its event loop only.

    `open` are all, in the order of their arrival, `idle` those between two requests, in the
    order in which this began. `waiting` has those without complete headers, the earliest first,
    `bodies` those without a complete body, `unread` those whose client does not read; each with
    the time at which this began. For one that closes after its last response, the time in
    `unread` is later (`note_last_output`). `closing` has those that have their last response
    and do not count any more, the earliest first. They stay open for a short time, until the
    client has read it, or `SPARE` others follow. `num_by_address` does not count those of trusted proxies.
    """

    settings: Settings
    metrics: Metrics
    open: dict[Connection, None] = field(default_factory=dict)
    idle: dict[Connection, None] = field(default_factory=dict)
    waiting: dict[Connection, float] = field(default_factory=dict)
    bodies: dict[Connection, float] = field(default_factory=dict)
    unread: dict[Connection, float] = field(default_factory=dict)
    closing: dict[Connection, None] = field(default_factory=dict)
    num_by_address: Counter[str] = field(default_factory=Counter)
    is_leaving: bool = False  # every response is then the last one of its connection

    def leave(self) -> None:
        """Close each connection after its next response, so that clients continue on another server."""
        self.is_leaving = True
        for connection in self.open:
            connection.close_after_response()

    def admit(self, connection: Connection) -> HttpError | None:
        """Admit *connection*; if there are too many, close another one, or return the error for this one.

        A refused one is counted, too, until its caller has closed it.
        """
        self.open[connection] = None
        if not connection.is_trusted:
            self.num_by_address[connection.address] += 1
        self.metrics.connections.set(len(self.open))

        if len(self.open) - len(self.closing) <= self.settings.max_connections:
            return None
        evicted = self._find_evictable(connection.loop.time())
        if evicted is None:
            return FULL

        evicted.evict()
        self.note_last_response(evicted)  # if it has not done so itself
        return None

    def note_last_response(self, connection: Connection) -> None:
        """Note that *connection* has its last response; of more than `SPARE`, abort the one that has it longest."""
        for state in (self.idle, self.waiting, self.bodies, self.unread):
            state.pop(connection, None)

        if connection in self.open:
            self.closing[connection] = None
        if len(self.closing) > SPARE:
            longest = next(iter(self.closing))
            del self.closing[longest], self.open[longest]
            longest.abort()

    def note_last_output(self, connection: Connection) -> None:
        """Note that *connection* closes as soon as its client has read the pending output.

        Until then it counts as one whose client does not read, since a time that is `GRACE` in
        the future: it has to make room later than one that stops reading now.
        """
        self.unread.setdefault(connection, connection.loop.time() + GRACE)

    def _find_evictable(self, now: float) -> Connection | None:
        """Find the connection to close for another one, or None: all are new or being answered.

        If an address has more than its share, it is one of its connections, even a new one,
        unless all of these are being answered. Otherwise it is one of any address, for longer
        than `GRACE` in its state.
        """
        # Of the address with the most connections, if it has more than its share.
        busiest, count = max(
            self.num_by_address.items(), key=lambda item: item[1], default=("", 0)
        )

        if count > max(MIN_SHARE, self.settings.max_connections // 4):
            of_busiest = [
                connection for connection in self.open if connection.address == busiest
            ]
            for before in (now - GRACE, now):
                evictable = self._find_first_to_close(of_busiest, before)
                if evictable is not None:
                    return evictable

        # Of all.
        return self._find_first_to_close(self.open, now - GRACE)

    def _find_first_to_close(
        self, among: Iterable[Connection], before: float
    ) -> Connection | None:
        """Find the first connection to close *among* these, or None.

        It looks for them in this order:

        1. the one that has waited longest for its headers,
        2. the one that has been idle longest,
        3. among those whose client does not read or sends a body, one of the address with the
           most connections: one whose client does not read; else the one with the slowest body.

        Those that are not idle count only if their state began at the time *before*, or earlier.
        """
        # One that has waited for its headers for too long.
        candidates = set(among)
        longest_in_headers = next((one for one in self.waiting if one in candidates), None)
        if longest_in_headers is not None and self.waiting[longest_in_headers] <= before:
            return longest_in_headers

        # One that has no request.
        longest_idle = next((one for one in self.idle if one in candidates), None)
        if longest_idle is not None:
            return longest_idle

        # The slowest one of the address with the most connections: bytes per second, -1 if the
        # client does not read, even if it sends a body.
        rates: dict[Connection, float] = {}

        for connection, since in self.bodies.items():
            if connection in candidates and since <= before:
                seconds = max(connection.loop.time() - since, MIN_SECONDS)
                rates[connection] = connection.body_bytes / seconds
        for connection, since in self.unread.items():
            if connection in candidates and since <= before:
                rates[connection] = -1.0
        return min(
            rates, key=lambda one: (-self.num_by_address[one.address], rates[one]), default=None
        )

    def remove(self, connection: Connection) -> None:
        """Remove *connection*, which is closed."""
        for state in (
            self.open,
            self.waiting,
            self.idle,
            self.bodies,
            self.unread,
            self.closing,
        ):
            state.pop(connection, None)

        if not connection.is_trusted:
            self.num_by_address[connection.address] -= 1
            if not self.num_by_address[connection.address]:
                del self.num_by_address[connection.address]

        self.metrics.connections.set(len(self.open))
