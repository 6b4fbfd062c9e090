"""What one request did: for its rate limit, its log line and its spans.

There is one tally for each request, known to whatever runs on its behalf by the context of its task, so that
no endpoint can forget to charge or to count.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from sopdeploy_service.http.api_keys import Key
from sopdeploy_service.http.rate_limit import TokenBucket
from sopdeploy_service.inference.results import Rejection


class Span(NamedTuple):
    """One stage of one image, on the clock of `time.monotonic`."""

    stage: str
    started: float
    ended: float


class Stages:
    """Seconds by stage; of several images in one request the slowest counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []

    def note(self, stage: str, seconds: float, ended: float | None = None) -> None:
        """Keep *seconds* for *stage*, which ended now or at *ended*; the slowest image is what counts."""
        self.seconds[stage] = max(seconds, self.seconds.get(stage, 0.0))
        end = time.monotonic() if ended is None else ended
        self.spans.append(Span(stage, end - seconds, end))

    def header(self) -> str:
        """Return the header's value; durations in milliseconds, as the standard has it."""
        return ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in self.seconds.items())


class Trace(Protocol):
    """The trace that a request belongs to; times are those of `time.monotonic`."""

    @property
    def id(self) -> str:
        """Return the trace's id as W3C has it, 32 hexadecimal digits."""
        ...

    def batch(self, sharing: Sequence["Trace"], started: float, ended: float) -> None:
        """Tell of a batch, linked to the requests *sharing* it."""
        ...

    def end(self, route: str, status: int, stages: Stages) -> None:
        """Tell of the request, answered now with *status*, and of its *stages*."""
        ...


# The headers of a request and when it began (`time.monotonic`) to its trace, or None where it is not sampled.
OpenTrace: TypeAlias = Callable[[Mapping[str, str], float], Trace | None]


@dataclass(slots=True)
class RequestContext:
    """One request: its id, whose key it came with, what it asked for, its body's bytes and how it went."""

    request: str
    key: Key | None = None
    bucket: TokenBucket | None = None
    bytes: int = 0
    images: int = 0
    code: str = "ok"
    stages: Stages = field(default_factory=Stages)
    trace: Trace | None = None


# The tally of the running task's request, and of the tasks it starts.
CURRENT: ContextVar[RequestContext | None] = ContextVar("sopdeploy_tally", default=None)


def current_trace() -> Trace | None:
    """Return the trace of the request that the running task works for, where it is traced."""
    tally = CURRENT.get()
    return None if tally is None else tally.trace


def rate_refusal() -> Rejection | None:
    """Return why the key of the running task's request may not send one more image now, or None."""
    tally = CURRENT.get()
    return None if tally is None or tally.bucket is None else tally.bucket.refusal(1)


def charge(images: int, stages: Stages) -> Rejection | None:
    """Count *images*, whose times *stages* keeps, for the running task's request and take them from its rate.

    Return why the rate does not allow them; then none is taken.
    """
    tally = CURRENT.get()
    if tally is None:
        return None
    tally.images += images
    tally.stages = stages
    return None if tally.bucket is None else tally.bucket.spend(images)
