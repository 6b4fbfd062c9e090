"""Bodies on their way in: how slow one may be, and how many bytes all of them may hold at once.

Bytes count from their arrival until their request is answered, because that long they are in memory.
What only was announced does not count: a client could reserve the memory of others by a header.
"""

import asyncio
import contextlib
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.http.disconnect import Begun
from sopdeploy_service.http.headers import header
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.request_context import CURRENT
from sopdeploy_service.settings import Settings

SMALL_BODY = 1_000_000  # most pictures; the last eighth of the room is for them alone

GLANCE_SECONDS = 0.05
SLOW = Rejection("slow_body", 408, "the body arrives more slowly than this server waits for")
NO_ROOM = Rejection("uploads_full", 429, "too many bytes are being uploaded; send it later", 2)


class UploadBudget:
    """The bytes that all bodies hold; used on one event loop only."""

    def __init__(self, size: int, metrics: Metrics) -> None:
        self._size = size
        self._held = 0
        metrics.upload_bytes(lambda: self._held)

    def fits(self, held: int, more: int) -> bool:
        """Return whether a body that holds *held* bytes may hold *more*."""
        size = self._size if held + more <= SMALL_BODY else self._size * 7 // 8
        return self._held + more <= size

    def add(self, count: int) -> None:
        """Count bytes that came, or with a minus bytes that are gone."""
        self._held += count


class Intake:
    """Wraps *app*; a body that breaks a limit raises `RefusedError` where the app reads it."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._room = UploadBudget(settings.max_upload_bytes, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, announced(scope), self._room, self._settings)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._room.add(-body.held)
            tally = CURRENT.get()
            if tally is not None:
                tally.bytes = body.held


class Body:
    """The body of one request, as far as it has arrived."""

    def __init__(self, receive: Receive, length: int, room: UploadBudget, settings: Settings) -> None:
        self.held = 0
        self._receive = receive
        self._length = length
        self._room = room
        self._rate = settings.min_body_rate
        self._grace = self._patience = settings.body_grace_seconds
        self._more = True

    async def receive(self) -> Message:
        """Return the next message; raises `RefusedError` for a body that is slow or finds no room.

        Before the first byte is asked for, the length announced must fit: a client that waits for
        `100 Continue` then sends nothing in vain.
        """
        if not self._more:
            return await self._receive()
        if not self._room.fits(self.held, max(0, self._length - self.held)):
            raise self._refused(NO_ROOM)
        message = await self._in_time()
        count = len(message.get("body", b""))
        if not self._room.fits(self.held, count):
            raise self._refused(NO_ROOM)
        self._room.add(count)
        self.held += count
        self._more = message.get("more_body", False)
        return message

    async def _in_time(self) -> Message:
        """Wait for the next piece; only the time spent here counts, not the server's own.

        A bucket of seconds: waiting empties it, bytes fill it, and it never holds more than the grace.
        """
        started = time.monotonic()
        begun: Begun[Message] = Begun(self._receive())
        message = begun.value if begun.done else await self._wait_for(begun)
        earned = len(message.get("body", b"")) / self._rate - (time.monotonic() - started)
        self._patience = min(self._grace, self._patience + earned)
        return message

    async def _wait_for(self, begun: Begun[Message]) -> Message:
        """Wait for what has *begun*, then look once more: a loop that was blocked sees its clock first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._patience)):
                return await begun
        try:
            async with asyncio.timeout(GLANCE_SECONDS):
                return await self._receive()
        except TimeoutError as problem:
            raise self._refused(SLOW) from problem

    def _refused(self, refusal: Rejection) -> RejectedError:
        self._more = False
        return RejectedError(refusal)


def announced(scope: Scope) -> int:
    """Return the `Content-Length` of a request, 0 where it has none."""
    return int(header(scope, b"content-length") or 0)
