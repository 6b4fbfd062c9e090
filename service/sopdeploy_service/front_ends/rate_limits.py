"""Rate limits of API keys that several front ends share.

The state of every bucket is in shared memory, without a lock: if two front ends charge a key in the same
microsecond, one of the charges is lost.
"""

import mmap
import os

from sopdeploy.errors import ConfigError
from sopdeploy_service.http.rate_limits import TokenBucket

MAX_KEYS = 4096


class SharedBuckets:
    """Shared memory with tokens and time of the last fill of each key."""

    def __init__(self, file: int) -> None:
        """Map the memory *file* of `create`; the file may be closed afterwards."""
        self._values = memoryview(mmap.mmap(file, 16 * MAX_KEYS)).cast("d")

    @staticmethod
    def create() -> int:
        """Create a memory file for all front ends."""
        file = os.memfd_create("sopdeploy-limits", os.MFD_CLOEXEC)
        os.ftruncate(file, 16 * MAX_KEYS)
        return file

    def create_bucket(self, rate: float, burst: int, number: int) -> "SharedTokenBucket":
        """Create the bucket of the key *number*; raises `ConfigError` if it is too large."""
        if number >= MAX_KEYS:
            raise ConfigError(f"more than {MAX_KEYS} keys, the limit with front_ends; remove some")
        return SharedTokenBucket(rate, burst, self._values[2 * number : 2 * number + 2])


class SharedTokenBucket(TokenBucket):
    """A token bucket whose *state*, tokens and time of the last fill, is shared."""

    def __init__(self, rate: float, burst: int, state: "memoryview[float]") -> None:
        super().__init__(rate, burst)
        self._state = state
        if not state[1]:  # this is the first process
            self._share()

    def spend(self, images: int, *, check_only: bool = False) -> None:
        """Take the tokens of *images*, as `TokenBucket.spend` does."""
        super().spend(images, check_only=check_only)
        self._share()

    def _fill(self) -> None:
        self._tokens, self._filled = self._state
        super()._fill()

    def _share(self) -> None:
        self._state[0], self._state[1] = self._tokens, self._filled
