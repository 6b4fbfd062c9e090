"""Retries and deadlines of a request, without I/O.

A flow is a generator that yields actions (`Send`, `Sleep`, `RunInThread`) and receives their results. Both
clients run the same flows and differ only in how they perform the actions.
"""

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeAlias, TypeVar

import httpx

from sopdeploy.client.results import parse_error
from sopdeploy.errors import OverloadedError, UnreachableError

Value = TypeVar("Value")

FIRST_DELAY = 0.2  # seconds
MAX_DELAY = 5.0
MAX_TIMEOUT_MS = 999_999_999  # largest header value that the server accepts
RETRY_STATUSES = {429, 503}  # the server did not process the request


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request and wait at most *seconds*; the result is an `httpx.Response` or the exception."""

    method: str
    path: str
    seconds: float
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    form: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Sleep:
    """Sleep for *seconds*."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RunInThread:
    """Call a slow or blocking *function*; the result is its return value."""

    function: Callable[[], Any]


Action: TypeAlias = Send | Sleep | RunInThread
Flow: TypeAlias = Generator[Action, Any, Value]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryBudget:
    """Time limit of a call in *seconds* from now, and the number of *retries* after the first attempt."""

    seconds: float
    retries: int
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.started + self.seconds - time.monotonic()


def send_with_retries(send: Send, budget: RetryBudget) -> Flow[httpx.Response]:
    """Send a request and return its successful response, with retries within *budget*.

    Each request tells the server the remaining time. Retries follow 429, 503 and connections that broke
    before a response, after a delay of at least `Retry-After`. Raises `OverloadedError` or `UnreachableError`
    when time or attempts are used up, and `ServiceError` for responses that a retry would not change.
    """
    for attempt in range(budget.retries + 1):
        left = max(0.001, budget.left())
        milliseconds = min(MAX_TIMEOUT_MS, max(1, int(left * 1000)))
        headers = {**send.headers, "X-Request-Timeout-Ms": str(milliseconds)}
        outcome = yield replace(send, seconds=left, headers=headers)
        if isinstance(outcome, httpx.Response):
            if outcome.is_success:
                return outcome
            retry = outcome.status_code in RETRY_STATUSES
        else:
            retry = isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout)
        seconds = backoff(attempt, outcome)
        if not retry or attempt == budget.retries or seconds >= budget.left():
            _raise_error(send, outcome)
        yield Sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def _raise_error(send: Send, outcome: httpx.Response | Exception) -> NoReturn:
    if isinstance(outcome, httpx.Response):
        error = parse_error(outcome)
        if outcome.status_code not in RETRY_STATUSES:
            raise error
        raise OverloadedError(
            str(error), code=error.code, status=error.status, retry_after=retry_after(outcome)
        )
    try:
        url = str(outcome.request.url) if isinstance(outcome, httpx.RequestError) else send.path
    except RuntimeError:  # httpx: the exception has no request
        url = send.path
    if isinstance(outcome, httpx.TimeoutException | TimeoutError):
        message = f"{url}: no response within {send.seconds:.3g} s"
        raise UnreachableError(message, code="timeout", status=0) from outcome
    reason = str(outcome) or type(outcome).__name__
    raise UnreachableError(
        f"{url}: no response ({reason}); is a server running there?", code="unreachable", status=0
    ) from outcome


def backoff(attempt: int, outcome: httpx.Response | Exception) -> float:
    """Compute the delay in seconds before the next attempt: exponential with jitter, plus `Retry-After`."""
    longest = min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(attempt, 10))
    requested = retry_after(outcome) if isinstance(outcome, httpx.Response) else 0.0
    return requested + random.uniform(0.5, 1.0) * longest  # noqa: S311 - jitter needs no secure randomness


def retry_after(response: httpx.Response) -> float:
    """Parse `Retry-After`, a number of seconds or a date; 0 without a valid value."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # OverflowError: a number of more digits than a date can have
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
