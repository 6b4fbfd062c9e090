"""Where the time of a start went, in milliseconds."""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from sopdeploy_service.observability.logs import START_UP

log = logging.getLogger(START_UP)


class Timeline:
    """Steps one after another, the first from the start of this process on."""

    def __init__(self) -> None:
        self._last = time.monotonic() - process_age()
        self.steps_ms: dict[str, float] = {}

    def mark(self, step: str) -> None:
        """Say that *step* has ended now."""
        now = time.monotonic()
        self.add(step, now - self._last)
        self._last = now

    def add(self, step: str, seconds: float) -> None:
        """Count *seconds* to *step*; they end with the next `mark` at the latest."""
        self.steps_ms[step] = round(self.steps_ms.get(step, 0.0) + seconds * 1000, 1)
        self._last += seconds

    def opened(self, bundles: Iterable[Mapping[str, float]]) -> None:
        """Count the seconds of each step of opening *bundles*, one after another."""
        for seconds in bundles:
            for step, spent in seconds.items():
                self.add(step, spent)

    def tell(self) -> None:
        """Log the steps and their sum."""
        total = round(sum(self.steps_ms.values()), 1)
        log.info("started", extra={"ms": total, "steps_ms": self.steps_ms})


def process_age() -> float:
    """Return for how many seconds this process has been running; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # the 22nd of the line: when the process began, since the system's boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
