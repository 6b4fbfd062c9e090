"""Rate limits of API keys that several front ends share.

The state of every bucket is in shared memory, without a lock: if two front ends charge a key in the same
microsecond, one of the charges is lost.
"""

import mmap
import os

from sopdeploy.errors import ConfigError

MAX_KEYS = 4096
BYTES = 16 * MAX_KEYS  # two numbers of 8 bytes for each key


def create_memory() -> int:
    """Create a memory file for all front ends."""
    file = os.memfd_create("sopdeploy-limits", os.MFD_CLOEXEC)
    os.ftruncate(file, BYTES)
    return file


class SharedBucketStates:
    """Creates states of buckets in the memory *file*, which may be closed afterwards."""

    def __init__(self, file: int) -> None:
        self._values = memoryview(mmap.mmap(file, BYTES)).cast("d")

    def __call__(self, key: int) -> "memoryview[float]":
        """Return the state of the key number *key*; raises `ConfigError` if there are too many keys."""
        if key >= MAX_KEYS:
            raise ConfigError(f"more than {MAX_KEYS} keys, the limit with front_ends; remove some")
        return self._values[2 * key : 2 * key + 2]
