"""Memory of processes: the limit of the container, and what a process occupies."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

# glibc creates up to 8 heaps per core. Once a large block is freed (importing the libraries is
# enough), it keeps blocks of up to 32 MB in these heaps and leaves up to 64 MB free at the end
# of each. Without these settings, the memory of a server would be the sum of the peaks of all
# threads and look like a leak.
_MIB = 1 << 20
# (environment variable that takes precedence, mallopt parameter number of malloc.h, value). A
# lower mmap threshold would cost 5 to 8 % of the CPU time of an image.
MALLOPT = (
    ("MALLOC_ARENA_MAX", -8, 2),  # heaps
    ("MALLOC_MMAP_THRESHOLD_", -3, _MIB),  # bytes from which a block is mapped on its own
    ("MALLOC_TRIM_THRESHOLD_", -1, 4 * _MIB),  # bytes that may stay free at the end of a heap
)

MAX_HEAP_BLOCK = 32 * _MIB  # the largest mmap threshold that glibc accepts


def limit_heaps() -> None:
    """Apply `MALLOPT` if the C library is glibc; allocator settings in the environment take precedence."""
    if "malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        _set_heaps({name: value for name, _, value in MALLOPT if name not in os.environ})


def keep_freed(num_bytes: int) -> None:
    """Keep up to *num_bytes* that this process frees for what it needs next, if it uses glibc.

    A WebP of 2 megapixels takes 32 MB, whose pages cost as much as two thirds of its decoding
    if the system gives them again for each image.
    """
    _set_heaps({"MALLOC_MMAP_THRESHOLD_": MAX_HEAP_BLOCK, "MALLOC_TRIM_THRESHOLD_": num_bytes})


def _set_heaps(values: Mapping[str, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, option, _ in MALLOPT:
        if mallopt is not None and name in values:
            mallopt(option, values[name])


def resident_bytes(process: int | str = "self") -> int:
    """Return the memory of a process, shared pages in proportion; 0 if unknown."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0
