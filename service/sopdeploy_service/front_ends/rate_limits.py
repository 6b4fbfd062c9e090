"""Rate limits of API keys that several front ends share.

Every front end writes the images that it has charged into its own row of the shared memory and reads the rows
of the others, so no lock is needed. Two requests at the same moment may both get the last tokens; the bucket
then goes below zero, and the limit holds on average.
"""

import mmap
import os

from sopdeploy.errors import ConfigError
from sopdeploy_service.http.rate_limits import TokenBucket

MAX_KEYS = 4096


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

    def create_bucket(self, rate: float, burst: int, number: int) -> "SharedTokenBucket":
        """Create the bucket of the key *number*; raises `ConfigError` if it is too large."""
        if number >= MAX_KEYS:
            raise ConfigError(f"more than {MAX_KEYS} keys, the limit with front_ends; remove some")
        return SharedTokenBucket(rate, burst, number, self)


class SharedTokenBucket(TokenBucket):
    """A token bucket from which the other front ends take tokens, too."""

    def __init__(self, rate: float, burst: int, number: int, shared: SharedSpending) -> None:
        super().__init__(rate, burst, number)
        self._shared, self._number = shared, number
        self._seen = shared.others(number)

    def spend(self, images: int, *, check_only: bool = False) -> None:
        """Take the tokens of *images*, as `TokenBucket.spend` does."""
        super().spend(images, check_only=check_only)
        if not check_only:
            self._shared.add(self._number, images)

    def _fill(self) -> None:
        super()._fill()
        seen, self._seen = self._seen, self._shared.others(self._number)
        if self._seen > seen:  # a wrong sum from a compromised front end takes at most one burst
            self._tokens -= min(self._seen - seen, float(self.burst))
