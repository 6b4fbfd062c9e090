"""Limits on request bodies: size, transfer rate, and the memory of all bodies together.

Bytes count from their arrival until their request is finished, while they are in memory. Announced bytes do
not count: otherwise a client could reserve the memory of others with a header.
"""

import asyncio
import contextlib
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sopdeploy_service.http.problems import RejectedError, reject
from sopdeploy_service.images.decode import too_large_error
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

SMALL_BODY = 1_000_000  # most images; the last eighth of the budget is reserved for them
RECHECK_SECONDS = 0.05
MAX_LENGTH_DIGITS = 20

SLOW_BODY = Rejection("slow_body", 408, "the body arrives more slowly than this server allows")
UPLOADS_FULL = Rejection("uploads_full", 429, "too many bytes are being uploaded; retry later", 2)


class UploadBudget:
    """Counts the bytes of all bodies in memory; used on one event loop only."""

    def __init__(self, size: int, metrics: Metrics) -> None:
        self._size = size
        self._held = 0
        metrics.upload_bytes.set_function(lambda: self._held)

    def fits(self, held: int, more: int) -> bool:
        """Check whether a body of *held* bytes may grow by *more* bytes."""
        size = self._size if held + more <= SMALL_BODY else self._size * 7 // 8
        return self._held + more <= size

    def add(self, count: int) -> None:
        """Count received bytes, or released ones as a negative number."""
        self._held += count


class BodyLimitsMiddleware:
    """Rejects bodies that announce too many bytes (413) and limits all others while the app reads them."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._budget = UploadBudget(settings.max_upload_bytes, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        text = Headers(scope=scope).get("content-length", "")
        length = int(text[:MAX_LENGTH_DIGITS]) if text.isascii() and text.isdigit() else 0
        if length > self._settings.max_body_bytes:
            rejection = Rejection.of(too_large_error(self._settings.max_body_bytes))
            self._metrics.rejected.labels(rejection.code).inc()
            await reject(scope, rejection)(scope, receive, send)
            return
        body = LimitedBody(receive, length, self._budget, self._settings)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._budget.add(-body.held)
            context = scope["state"].get("context") if "state" in scope else None
            if context is not None:
                context.bytes = body.held


class LimitedBody:
    """The body of one request; *length* is its announced size, 0 if unknown."""

    def __init__(self, receive: Receive, length: int, budget: UploadBudget, settings: Settings) -> None:
        self.held = 0
        self._receive = receive
        self._length = length
        self._budget = budget
        self._rate = settings.min_body_rate
        self._grace = self._patience = settings.body_grace_seconds
        self._more = True

    async def receive(self) -> Message:
        """Receive the next message; raises `RejectedError` for a slow body and for a full budget.

        The announced size is checked before the first byte is requested, so a client that waits for `100
        Continue` sends nothing in vain.
        """
        if not self._more:
            return await self._receive()
        self._check_budget(max(0, self._length - self.held))
        message = await self._receive_in_time()
        count = len(message.get("body", b""))
        self._check_budget(count)
        self._budget.add(count)
        self.held += count
        self._more = message.get("more_body", False)
        return message

    def _check_budget(self, more: int) -> None:
        if not self._budget.fits(self.held, more):
            self._more = False
            raise RejectedError(UPLOADS_FULL)

    async def _receive_in_time(self) -> Message:
        """Receive with a token bucket of seconds: waiting takes, bytes give, up to the grace period.

        Only the time of waiting counts. A blocked event loop sees the timeout before the data, so the timeout
        is followed by a short second attempt.
        """
        started = time.monotonic()
        message: Message | None = None
        for seconds in (max(0.0, self._patience), RECHECK_SECONDS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    message = await self._receive()
                break
        if message is None:
            self._more = False
            raise RejectedError(SLOW_BODY)
        earned = len(message.get("body", b"")) / self._rate - (time.monotonic() - started)
        self._patience = min(self._grace, self._patience + earned)
        return message
