"""Memory that was freed goes back to the system: a server at rest holds what it needs, not its highest peak.

glibc gives every thread a heap of its own, up to 8 for a core, and once a large block was freed (to import
the libraries is enough) it puts blocks of up to 32 MB into these heaps and leaves twice as much free at the
end of each. So the memory of a server would be the sum of the peaks that its threads ever had, and would grow
for hours in steps that look like a leak. Nothing happens where the C library is not glibc.
"""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable, Mapping

YOUNG = 10_000  # objects made and not yet freed before garbage is looked for among them; Python's own is 700
REST_SECONDS = 1.0
MIB = 1 << 20
# glibc's variable, which overrules us; mallopt's number of it (malloc.h); what we say. To map smaller blocks
# alone too would cost 5 to 8 % of a picture's CPU, so it is left to `Rest` to return them.
RULES = (
    ("MALLOC_ARENA_MAX", -8, 2),  # heaps
    ("MALLOC_MMAP_THRESHOLD_", -3, MIB),  # bytes from which on a block is mapped alone
    ("MALLOC_TRIM_THRESHOLD_", -1, 4 * MIB),  # bytes that may stay free at the end of a heap
)


def keep_little(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Tell the allocator of this process `RULES`, before its threads start; return which it took.

    What *environment* says about the allocator holds instead.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "malloc" in environment.get("GLIBC_TUNABLES", ""):
        return ()
    return tuple(name for name, rule, value in RULES if name not in environment and mallopt(rule, value))


def collect_seldom() -> None:
    """Look for garbage among what a server makes from now on, and not often: every look stops all threads.

    What the imports made stays for good: to look through it takes 45 ms. A request leaves no garbage, so the
    many that are open at once need not be looked through every time that some more have come.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])


def give_back() -> None:
    """Give every page that is free in any heap back to the system; takes some milliseconds, not the GIL."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_in_a_thread() -> None:
    """`give_back` in a thread of the running event loop."""
    asyncio.get_running_loop().run_in_executor(None, give_back)


class Rest:
    """Calls *then* once, each time that there was nothing to do for `REST_SECONDS` after there was."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then
        self._busy: float | None = None  # when there was last something to do, None once *then* was called

    def tick(self, now: float, requests: int) -> None:
        """Take note that at *now* (seconds) so many *requests* are here."""
        if requests:
            self._busy = now
        elif self._busy is not None and now - self._busy >= REST_SECONDS:
            self._busy = None
            self._then()
