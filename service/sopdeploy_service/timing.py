"""Where the time of one request went, for its `Server-Timing` header, its log line and its spans."""

import time
from typing import NamedTuple


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
