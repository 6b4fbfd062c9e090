"""Limits on request bodies (size, transfer rate, memory of all bodies together), and disconnects.

Bytes count from their arrival until their request is finished, while they are in memory. Announced bytes do
not count: otherwise a client could reserve the memory of others with a header.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.http.problems import RejectedError, reject
from sopdeploy_service.images.decode import too_large_error
from sopdeploy_service.inference.results import CLIENT_GONE, Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

SMALL_BODY = 1_000_000  # most images; the last eighth of the budget is reserved for them
RECHECK_SECONDS = 0.05
MAX_LENGTH_DIGITS = 20

SLOW_BODY = Rejection("slow_body", 408, "the body arrives more slowly than this server allows")
UPLOADS_FULL = Rejection("uploads_full", 429, "too many bytes are being uploaded; retry later", 2)

Value = TypeVar("Value")


class BodyLimitsMiddleware:
    """Rejects bodies that announce too many bytes (413) and limits all others while the app reads them.

    `held` counts the bytes of all bodies in memory; used on one event loop only.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.held = 0
        self.settings = settings
        self._app = app
        self._metrics = metrics
        metrics.upload_bytes.set_function(lambda: self.held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        text = Headers(scope=scope).get("content-length", "")
        length = int(text[:MAX_LENGTH_DIGITS]) if text.isascii() and text.isdigit() else 0
        if length > self.settings.max_body_bytes:
            rejection = Rejection.of(too_large_error(self.settings.max_body_bytes))
            self._metrics.rejected.labels(rejection.code).inc()
            await reject(scope, rejection)(scope, receive, send)
            return
        body = LimitedBody(receive, length, self)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.held -= body.held
            context = scope["state"].get("context") if "state" in scope else None
            if context is not None:
                context.bytes = body.held


class LimitedBody:
    """The body of one request; *length* is its announced size, 0 if unknown."""

    def __init__(self, receive: Receive, length: int, shared: BodyLimitsMiddleware) -> None:
        self.held = 0
        self._receive = receive
        self._length = length
        self._shared = shared
        self._limits = shared.settings
        self._patience = self._limits.body_grace_seconds
        self._more = True

    async def receive(self) -> Message:
        """Receive the next message; raises `RejectedError` for a slow body and for a full budget.

        The announced size is checked before the first byte is requested, so a client that waits for `100
        Continue` sends nothing in vain. Patience is a token bucket of seconds: waiting takes, bytes give, up
        to the grace period. Only the time of waiting counts. A blocked event loop sees the timeout before the
        data, so the timeout is followed by a short second attempt.
        """
        if not self._more:
            return await self._receive()
        self._more = False  # also after an error
        self._check_budget(max(0, self._length - self.held))
        started = time.monotonic()
        message: Message | None = None
        for seconds in (max(0.0, self._patience), RECHECK_SECONDS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    message = await self._receive()
                break
        if message is None:
            raise RejectedError(SLOW_BODY)
        count = len(message.get("body", b""))
        earned = count / self._limits.min_body_rate - (time.monotonic() - started)
        self._patience = min(self._limits.body_grace_seconds, self._patience + earned)
        self._check_budget(count)
        self._shared.held += count
        self.held += count
        self._more = message.get("more_body", False)
        return message

    def _check_budget(self, more: int) -> None:
        """Raise `RejectedError` (429) if the body may not grow by *more* bytes."""
        size = self._limits.max_upload_bytes
        if self.held + more > SMALL_BODY:
            size = size * 7 // 8
        if self._shared.held + more > size:
            raise RejectedError(UPLOADS_FULL)


async def cancel_on_disconnect(work: Coroutine[Any, Any, Value], receive: Receive) -> Value:
    """Run *work*; cancel it and raise `RejectedError` (499) if the client disconnects first.

    The request body must have been read: the next message of *receive* is the disconnect.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("cancel_on_disconnect must run in a task")

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        disconnected = watcher.done() and not watcher.cancelled()
        if not disconnected or task.uncancel():  # cancelled by something else, or additionally
            raise
        raise RejectedError(CLIENT_GONE) from None
    finally:
        watcher.cancel()
