"""Memory of processes: the limit of the container, and what a process occupies."""

import ctypes
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
PROCESS_CGROUP = Path("/proc/self/cgroup")


def trim_heaps() -> None:
    """Return all free pages of all heaps to the system; takes milliseconds and releases the GIL."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_limit() -> int:
    """Return the bytes that the container of this process may use, or the machine has; 2**62 if unknown."""
    limits = [2**62]
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        limits.append(int(lines["MemTotal"].split()[0]) * 1024)
    with suppress(OSError):
        for line in PROCESS_CGROUP.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                version1 = number != "0"
                root = CGROUP / "memory" if version1 else CGROUP
                name = "memory.limit_in_bytes" if version1 else "memory.max"
                folder = root / path.lstrip("/")
                for parent in (folder, *folder.parents):  # in a container, the path may be that of the host
                    with suppress(OSError, ValueError):  # `max`
                        limits.append(int((parent / name).read_text()))
    return min(limits)


def resident_bytes(process: int | str = "self") -> int:
    """Return the memory of a process, shared pages in proportion; 0 if unknown."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0
