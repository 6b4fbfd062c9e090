"""How one request goes: sent, sent again where that is safe, never beyond its deadline. Without any I/O.

A talk is a generator: it yields what is to be done, a `Send`, a `Pause` or a `Compute`, and is told what
came of it. The two clients differ only in how they do these three, so none of the rules is written twice.
"""

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeAlias, TypeVar

import httpx

from sopdeploy.client.results import problem_of
from sopdeploy.errors import OverloadedError, UnreachableError

Value = TypeVar("Value")

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
LONGEST_TIMEOUT_MS = 999_999_999  # more digits the server does not take
AGAIN = {429, 503}  # the server says itself that it did not answer and may do so later


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Send this and wait at most *seconds*; the outcome is an `httpx.Response` or the error that came."""

    method: str
    path: str
    seconds: float
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    form: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait so many *seconds*."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Compute:
    """Call *function*, which takes processor time or reads files; the outcome is what it returns."""

    function: Callable[[], Any]


Step: TypeAlias = Send | Pause | Compute
Talk: TypeAlias = Generator[Step, Any, Value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long and how often a request is tried: *seconds* from now, *retries* after the first time."""

    seconds: float
    retries: int
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.started + self.seconds - time.monotonic()


def ask(what: Send, patience: Patience) -> Talk[httpx.Response]:
    """Send *what* until it is answered with a success, within *patience*.

    Raises `OverloadedError` or `UnreachableError` where there is no time or attempt left, `ServiceError` for
    an answer that would be the same again.
    """
    for attempt in range(patience.retries + 1):
        outcome = yield before_deadline(what, patience)
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            return outcome
        seconds = pause(attempt, outcome)
        if attempt == patience.retries or seconds >= patience.left() or not may_be_sent_again(outcome):
            give_up(what, outcome)
        yield Pause(seconds)
    raise AssertionError("the last attempt returns or raises")


def before_deadline(what: Send, patience: Patience) -> Send:
    """Return *what* with the time that is left, told to the server too."""
    left = max(0.001, patience.left())
    milliseconds = min(LONGEST_TIMEOUT_MS, max(1, int(left * 1000)))
    headers = {**what.headers, "X-Request-Timeout-Ms": str(milliseconds)}
    return replace(what, seconds=left, headers=headers)


def may_be_sent_again(outcome: httpx.Response | Exception) -> bool:
    """Say whether another attempt can help and does no harm; a timeout has used up the deadline."""
    if isinstance(outcome, httpx.Response):
        return outcome.status_code in AGAIN
    return isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout)


def give_up(what: Send, outcome: httpx.Response | Exception) -> NoReturn:
    """Raise the error that *outcome* stands for."""
    if isinstance(outcome, httpx.Response):
        problem = problem_of(outcome)
        if outcome.status_code not in AGAIN:
            raise problem
        raise OverloadedError(
            str(problem), code=problem.code, status=problem.status, retry_after=retry_after(outcome)
        )
    if isinstance(outcome, httpx.TimeoutException | TimeoutError):
        raise UnreachableError(
            f"{asked(what, outcome)}: no answer within {what.seconds:.3g} s", code="timeout", status=0
        ) from outcome
    reason = str(outcome) or type(outcome).__name__
    raise UnreachableError(
        f"{asked(what, outcome)}: no answer ({reason}); is a server running there?",
        code="unreachable",
        status=0,
    ) from outcome


def asked(what: Send, outcome: Exception) -> str:
    """Return what was asked for: the whole URL where *outcome* knows it, else the path of *what*."""
    try:
        return str(outcome.request.url) if isinstance(outcome, httpx.RequestError) else what.path
    except RuntimeError:  # httpx's, of an error without its request
        return what.path


def pause(attempt: int, outcome: httpx.Response | Exception) -> float:
    """Return the seconds before the next attempt: never less than the server asks for, and jittered."""
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 10))
    asked = retry_after(outcome) if isinstance(outcome, httpx.Response) else 0.0
    return asked + random.uniform(0.5, 1.0) * longest  # noqa: S311 - clients must not come back together


def retry_after(response: httpx.Response) -> float:
    """Return the seconds of a `Retry-After` header, a number or a date; 0 without one or for nonsense."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
