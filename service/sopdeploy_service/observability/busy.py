"""Which share of the last seconds workers were busy, for the gauge that an autoscaler reads."""

import asyncio
import threading
import time
from collections import deque
from pathlib import Path

WINDOW = 15  # seconds
LOOP_SECONDS = 0.25  # between measurements of an event loop
SCHEDULED = Path(
    "/proc/thread-self/schedstat"
)  # nanoseconds on a core and in its queue, and runs


class BusyShare:
    """The share of their time for which *capacity* workers were busy. Any thread may call its methods."""

    def __init__(self, capacity: int = 1) -> None:
        """Start with idle workers."""
        self.capacity = capacity
        self.num_busy = 0
        self._lock = threading.Lock()

        # Busy seconds of all workers in each second of the window, the last one unfinished.
        self._seconds = deque([0.0] * (WINDOW + 1), maxlen=WINDOW + 1)
        self._until = time.monotonic()

    def change(self, workers: int) -> None:
        """Count so many *workers* as busy from now on, or, if the number is negative, as idle."""
        with self._lock:
            self._advance()
            self.num_busy += workers

    def add(self, seconds: float) -> None:
        """Count one worker as busy for *seconds* that have just ended."""
        with self._lock:
            self._advance()
            self._seconds[-1] += seconds

    def share(self) -> float:
        """Return the busy share, from 0 to 1, of the last 15 to 16 seconds."""
        with self._lock:
            self._advance()
            # The first second of the window has begun to leave it.
            length = WINDOW + self._until % 1.0
            return min(1.0, sum(self._seconds) / (length * self.capacity))

    def _advance(self) -> None:
        """Add the time since the last call to the seconds in which it was."""
        now = time.monotonic()
        # What is older would have left the window.
        self._until = max(self._until, now - WINDOW - 1)
        busy = min(self.num_busy, self.capacity)

        while self._until < now:
            end = min(now, self._until // 1.0 + 1.0)
            self._seconds[-1] += busy * (end - self._until)
            self._until = end
            if end % 1.0 == 0.0:
                self._seconds.append(0.0)


async def measure_loop(busy: BusyShare) -> None:
    """Count the time for which the thread of the running event loop works as *busy*, until it is cancelled.

    An event loop that works all the time is full, whatever the decoders and the device do.
    """
    before = thread_seconds()
    while True:
        await asyncio.sleep(LOOP_SECONDS)
        now = thread_seconds()
        busy.add(now - before)
        before = now


def thread_seconds() -> float:
    """Return the seconds for which this thread has computed and, on Linux, has waited for a core.

    Without the waits, a server whose cores are busy with something else would seem to have time.
    """
    try:
        computed, waited, _ = map(int, SCHEDULED.read_text().split())
    except (OSError, ValueError):  # not Linux, or a kernel without these figures
        return time.thread_time()
    return (computed + waited) / 1e9
