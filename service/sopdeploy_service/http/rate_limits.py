"""Rate limits of API keys: one token bucket per key, shared by all front ends of a server.

Every front end writes the images that it has charged into its own row of the shared memory and reads the rows
of the others, so no lock is needed. Two requests at the same moment may both get the last tokens; the bucket
then goes below zero, and the limit holds on average.
"""

import math
import mmap
import os
import time

from sopdeploy_service.inference.results import RejectedError, Rejection

MAX_KEYS = 4096  # the largest number of keys with a rate


class SharedSpending:
    """Shared memory with the images that each front end has charged; *row* is that of this front end."""

    def __init__(self, file: int, row: int, rows: int) -> None:
        """Map the memory *file* of `create`; the file may be closed afterwards."""
        self._sums = memoryview(mmap.mmap(file, 8 * MAX_KEYS * rows)).cast("d")
        self._own, self._rows = row, rows

    @staticmethod
    def create(rows: int) -> int:
        """Create a memory file for *rows* front ends."""
        file = os.memfd_create("sopdeploy-limits", os.MFD_CLOEXEC)
        os.ftruncate(file, 8 * MAX_KEYS * rows)
        return file

    def add(self, key: int, images: int) -> None:
        """Charge *images* to the key with number *key*."""
        self._sums[self._own * MAX_KEYS + key] += images

    def others(self, key: int) -> float:
        """Return what the other front ends have charged to *key* since the server started."""
        return sum(self._sums[row * MAX_KEYS + key] for row in range(self._rows) if row != self._own)


class TokenBucket:
    """Holds up to *burst* tokens and gains *rate* per second; an image takes one. For one event loop.

    With *shared*, the other front ends take tokens of the key with this *number*, too.
    """

    def __init__(
        self, rate: float, burst: int, shared: SharedSpending | None = None, number: int = 0
    ) -> None:
        self._rate = rate
        self.burst = burst
        self._tokens = float(burst)
        self._filled = time.monotonic()
        self._shared, self._number = shared, number
        self._seen = 0.0 if shared is None else shared.others(number)

    def spend(self, images: int, *, check_only: bool = False) -> None:
        """Take the tokens of *images*, unless *check_only*.

        Raises `RejectedError`, and takes none, if *images* exceed the limit now.
        """
        self._fill()
        if images > self.burst:
            message = f"{images} images exceed the limit of this key ({self.burst}); send fewer per request"
            raise RejectedError(Rejection("too_many_images", 400, message))
        if images > self._tokens:
            wait = max(1, math.ceil((images - self._tokens) / self._rate))
            message = f"this key may send {self._rate:g} images per second; retry later"
            raise RejectedError(Rejection("rate_limited", 429, message, wait))
        if not check_only:
            self._tokens -= images
            if self._shared is not None:
                self._shared.add(self._number, images)

    def headers(self) -> dict[str, str]:
        """Format the response headers; `Reset` is the time in seconds until the bucket is full."""
        self._fill()
        return {
            "RateLimit-Limit": str(self.burst),
            "RateLimit-Remaining": str(max(0, int(self._tokens))),
            "RateLimit-Reset": str(math.ceil((self.burst - self._tokens) / self._rate)),
        }

    def _fill(self) -> None:
        now = time.monotonic()
        self._tokens = min(float(self.burst), self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._shared is not None:
            seen, self._seen = self._seen, self._shared.others(self._number)
            if self._seen > seen:  # a wrong sum from a compromised front end takes at most one burst
                self._tokens -= min(self._seen - seen, float(self.burst))
