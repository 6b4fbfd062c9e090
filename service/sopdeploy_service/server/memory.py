"""Keep the memory of an idle server low: fewer malloc arenas, and free pages returned to the system.

glibc creates up to 8 heaps per core. Once a large block is freed (importing the libraries is enough), it
keeps blocks of up to 32 MB in these heaps and leaves up to 64 MB free at the end of each. Without these
settings, the memory of a server would be the sum of the peaks of all threads and look like a leak. On C
libraries other than glibc these functions do nothing.
"""

import asyncio
import ctypes
import os

from sopdeploy_service.runtime.device_memory import trim_heaps

IDLE_SECONDS = 1.0
_MIB = 1 << 20
# (environment variable that takes precedence, mallopt parameter number of malloc.h, value). A lower mmap
# threshold would cost 5 to 8 % of the CPU time of an image; `IdleTrigger` returns those blocks instead.
MALLOPT = (
    ("MALLOC_ARENA_MAX", -8, 2),  # heaps
    ("MALLOC_MMAP_THRESHOLD_", -3, _MIB),  # bytes from which a block is mapped on its own
    ("MALLOC_TRIM_THRESHOLD_", -1, 4 * _MIB),  # bytes that may stay free at the end of a heap
)


def limit_heaps() -> None:
    """Apply `MALLOPT` before the threads start; allocator settings in the environment take precedence."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        for name, option, value in MALLOPT:
            if name not in os.environ:
                mallopt(option, value)


class IdleTrigger:
    """Calls `trim_heaps` in a thread after each `IDLE_SECONDS` without requests."""

    _last_busy: float | None = None  # None after the call

    def tick(self, now: float, requests: int) -> None:
        """Update with the number of active *requests* at *now* (seconds)."""
        if requests:
            self._last_busy = now
        elif self._last_busy is not None and now - self._last_busy >= IDLE_SECONDS:
            self._last_busy = None
            asyncio.get_running_loop().run_in_executor(None, trim_heaps)
