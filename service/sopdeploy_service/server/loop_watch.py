"""Measure how late an event loop is."""

import time
from collections import deque
from dataclasses import dataclass, field

BEAT_SECONDS = 0.1  # interval of uvicorn's ticks
BEATS = 100  # the last ten seconds


@dataclass
class LoopWatch:
    """Measures how late an event loop is. `beat` runs on that loop, the other methods on any thread."""

    _last: float = field(default_factory=lambda: time.monotonic())
    _lags: deque[float] = field(default_factory=lambda: deque(maxlen=BEATS))

    def beat(self) -> None:
        """Record that the loop is running; call it every `BEAT_SECONDS`."""
        self._lags.append(self.lag())
        self._last = time.monotonic()

    def lag(self) -> float:
        """Seconds by which the next beat is overdue."""
        return max(0.0, time.monotonic() - self._last - BEAT_SECONDS)

    def worst(self) -> float:
        """Largest lag in seconds of the last ten seconds of beats."""
        return max([*tuple(self._lags), self.lag()])
