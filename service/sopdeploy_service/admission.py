"""What every endpoint that answers images does first and last: which model, until when, for whom?"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request

from sopdeploy_service.gate import require
from sopdeploy_service.heads import header
from sopdeploy_service.model import Model
from sopdeploy_service.outcome import DEADLINE, Refusal
from sopdeploy_service.problems import RefusedError
from sopdeploy_service.service import Service
from sopdeploy_service.tally import rate_refusal

Value = TypeVar("Value")

TIMEOUT_HEADER = b"x-request-timeout-ms"
DIGITS = 9  # more milliseconds than any deadline may have; `int` refuses thousands of digits
BAD_TIMEOUT = Refusal("invalid_timeout", 400, "X-Request-Timeout-Ms: say how many milliseconds, at least 1")


def service_of(request: Request) -> Service:
    """Return the service behind the app that got *request*."""
    service: Service = request.app.state.service
    return service


def admit(request: Request, name: str | None = None, version: str | None = None) -> tuple[Model, float]:
    """Return the model for *request* and its deadline (`time.monotonic`), before its body is read.

    The answer will carry the model's digest. Raises `RefusedError` where its key does not allow it, the model
    is not here, or it could not answer in time.
    """
    require("classify")
    service = service_of(request)
    deadline = time.monotonic() + seconds_allowed(request, service.settings.deadline_seconds)
    model = unless_refused(service.repository.find(name, version))
    request.scope["state"]["model"] = model
    unless_refused(service.refusal(model, deadline) or rate_refusal())
    return model, deadline


@asynccontextmanager
async def taking_apart(service: Service, model: Model, deadline: float) -> AsyncIterator[None]:
    """Hold what finds the images of a request that has arrived to its *deadline*, and count it as one image.

    So what waits for a parser, or for the host of a URL, is bounded like all that waits. Raises
    `RefusedError`.
    """
    unless_refused(service.overload(model))
    try:
        with service.held():
            async with asyncio.timeout(deadline - time.monotonic()):
                yield
    except TimeoutError as problem:
        raise RefusedError(DEADLINE) from problem


def seconds_allowed(request: Request, longest: float) -> float:
    """Return for how long *request* may take: what its header says, but never more than *longest*."""
    given = header(request.scope, TIMEOUT_HEADER)
    if given is None:
        return longest
    digits = given.lstrip(b"0")
    if not given.isdigit() or not digits:
        raise RefusedError(BAD_TIMEOUT)
    return longest if len(digits) > DIGITS else min(longest, int(digits) / 1000)


def unless_refused(value: Value | Refusal) -> Value:
    """Return *value*; raises `RefusedError` where it is a refusal."""
    if isinstance(value, Refusal):
        raise RefusedError(value)
    return value
