"""Read the body of a request under limits of size, time, rate and memory.

The memory budget counts the bytes of a body from their arrival until the end of the request. It does not
count announced bytes, because a client could then use up the budget with a header.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from fastapi import Request

from sopdeploy.images.formats import too_large_error
from sopdeploy_service.inference.results import CLIENT_GONE, HttpError, RejectedError
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import RequestContext

SMALL_BODY = 1_000_000  # most images are smaller; the last eighth of the budget is reserved for such bodies

ENCODED = HttpError("unsupported_encoding", 415, "send the image itself, without a Content-Encoding")
SLOW_BODY = HttpError("slow_body", 408, "the body arrives more slowly than this server allows")
LATE_BODY = HttpError("slow_body", 408, "the body did not arrive before the deadline")
UPLOADS_FULL = HttpError("uploads_full", 429, "too many bytes are being uploaded; retry later", 2)


async def read_body(
    request: Request,
    service: Service,
    limit: int,
    deadline: float,
    consume: Callable[[bytes], None] | None = None,
) -> bytes:
    """Read the body of *request*, at most *limit* bytes, before *deadline*; *consume* gets it in pieces.

    A client may be slower than the minimum rate for a grace period in total. Returns the body, empty with
    *consume*. Raises `RejectedError`: 408 too slow, 413 too large, 415 for a Content-Encoding, 429 for a full
    budget, 499 client disconnected.
    """
    context: RequestContext = request.state.context
    settings = service.settings
    check_encoding(context.headers)
    announced = int(context.headers.get("content-length", "0"))
    pieces: list[bytes] = []
    grace, more = settings.body_grace_seconds, True
    while more:
        # Also before the first byte: a client that waits for `100 Continue` must not send the body in vain.
        _check_budget(service, context.bytes, max(0, announced - context.bytes))
        started = time.monotonic()
        try:
            async with asyncio.timeout(min(grace, deadline - started)):
                message = await request.receive()
        except TimeoutError as problem:
            raise RejectedError(LATE_BODY if time.monotonic() >= deadline else SLOW_BODY) from problem
        if message["type"] == "http.disconnect":
            raise RejectedError(CLIENT_GONE)
        piece = message.get("body", b"")
        waited = time.monotonic() - started
        grace = min(settings.body_grace_seconds, grace - waited + len(piece) / settings.min_body_rate)
        _check_budget(service, context.bytes, len(piece))
        service.upload_bytes += len(piece)
        context.bytes += len(piece)
        if context.bytes > limit:
            raise RejectedError(HttpError.of(too_large_error(limit)))
        if piece:
            (consume or pieces.append)(piece)
        more = message.get("more_body", False)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_encoding(headers: Mapping[str, str]) -> None:
    """Raise `RejectedError` (415) for a body with a Content-Encoding."""
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RejectedError(ENCODED)


def _check_budget(service: Service, received: int, more: int) -> None:
    """Raise `RejectedError` (429) if a body of *received* bytes may not grow by *more* bytes."""
    budget = service.max_upload_bytes
    if received + more > SMALL_BODY:
        budget = budget * 7 // 8
    if service.upload_bytes + more > budget:
        raise RejectedError(UPLOADS_FULL)
