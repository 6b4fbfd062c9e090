"""The request bodies in memory: their bytes have a limit, and clients share it."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.settings import LARGE_BODY_SHARE

# Most images are smaller; the rest of the budget, beside `LARGE_BODY_SHARE`, is for such bodies
SMALL_BODY = 1_000_000

UPLOADS_FULL = HttpError(
    "uploads_full", 429, "too many bytes are being uploaded; retry later", 2
)


@dataclass(eq=False, slots=True)
class Body:
    """The body of a request of *client*, a key or address; `num_bytes` are in memory.

    `timer` ends the wait for its next bytes, `is_refused` tells that it has made room for another.
    """

    client: str
    began: float = field(default_factory=time.monotonic)
    num_bytes: int = 0
    timer: asyncio.Timeout | None = None
    is_refused: bool = False

    def rate(self, now: float) -> float:
        """Return the bytes per second until *now*, a time of `time.monotonic`."""
        return self.num_bytes / max(now - self.began, 1e-3)


class Uploads:
    """The bodies of all requests, in at most *budget* bytes.

    If these are in use, a body that arrives takes the place of the slowest one that still
    arrives, of the client with most bytes, unless no such client has more than its own.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_bytes = 0
        self._bodies: set[Body] = set()

    @contextmanager
    def open(self, client: str) -> Iterator[Body]:
        """Count a body of *client*, which `add` lets grow, until the end of the block."""
        body = Body(client)
        self._bodies.add(body)
        try:
            yield body
        finally:
            self._remove(body)

    def check(self, body: Body, more: int) -> None:
        """Raise `RejectedError` (429) if *body* could not grow by *more* bytes."""
        self._find_room(body, more)

    def add(self, body: Body, more: int) -> None:
        """Let *body* grow by *more* bytes, or raise `RejectedError` (429); others may lose their place."""
        for slowest in self._find_room(body, more):
            slowest.is_refused = True
            self._remove(slowest)
            if slowest.timer is not None and not slowest.timer.expired():
                slowest.timer.reschedule(0.0)  # in the past: its wait ends now

        body.num_bytes += more
        self.num_bytes += more

    def _find_room(self, body: Body, more: int) -> list[Body]:
        """List the bodies that have to leave before *body* grows by *more* bytes; raises `RejectedError`."""
        # Large bodies leave the rest to small ones.
        budget = self.budget
        if body.num_bytes + more > SMALL_BODY:
            budget = int(budget * LARGE_BODY_SHARE)

        excess = self.num_bytes + more - budget
        if excess <= 0:
            return []

        # Bytes by client, as if this body had grown.
        sizes = Counter({body.client: more})
        for other in self._bodies:
            sizes[other.client] += other.num_bytes

        # Only bodies that are still arriving can leave: one that has arrived is being answered.
        now = time.monotonic()
        leaving = []
        arriving = {one for one in self._bodies if one.timer is not None and one.num_bytes}

        # Of the client with most bytes, if it has more than this one, the slowest body leaves.
        while excess > 0:
            slowest = max(
                (one for one in arriving if sizes[one.client] > sizes[body.client]),
                key=lambda one: (sizes[one.client], -one.rate(now)),
                default=None,
            )

            if slowest is None:
                raise RejectedError(UPLOADS_FULL)
            arriving.discard(slowest)
            leaving.append(slowest)
            sizes[slowest.client] -= slowest.num_bytes
            excess -= slowest.num_bytes
        return leaving

    def _remove(self, body: Body) -> None:
        """Forget *body* and its bytes, if it is there."""
        if body in self._bodies:
            self._bodies.discard(body)
            self.num_bytes -= body.num_bytes
