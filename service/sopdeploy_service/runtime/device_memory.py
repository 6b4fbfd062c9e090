"""Memory of this process and of its GPU: how much is free, and how much a model occupies."""

import ctypes
from contextlib import suppress
from pathlib import Path
from resource import getpagesize

from sopdeploy.errors import ConfigError
from sopdeploy_service.runtime.base import Runtime

CGROUP = Path("/sys/fs/cgroup")
MEMINFO, STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
PROCESS_CGROUP = Path("/proc/self/cgroup")


def trim_heaps() -> None:
    """Return all free pages of all heaps to the system; takes milliseconds and releases the GIL."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class MemoryMeter:
    """Measures how many bytes a runtime occupies that is opened after this object was created.

    The GPU is queried only with *on_gpu*, because a query makes CUDA occupy memory there.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._resident, self._free_on_gpu = _resident_bytes(), free_gpu_bytes() if on_gpu else None

    def growth(self, runtime: Runtime) -> int:
        """Return the growth of this process or, if *runtime* is on a GPU, the decrease of its free memory.

        0 if the system does not tell it. Other work at the same time changes the result.
        """
        if runtime.device == "cpu":
            return _resident_bytes() - self._resident
        free = free_gpu_bytes()
        return 0 if free is None or self._free_on_gpu is None else self._free_on_gpu - free


def free_gpu_bytes() -> int | None:
    """Return the free bytes of the first GPU, None without one.

    Asks the driver, because not every CUDA runtime comes with bindings for Python.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    status: int = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    status = status or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if status or cuda.cuCtxPushCurrent_v2(context):
        return None
    status = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    return None if status else free.value


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


def available_bytes() -> int:
    """Return how many more bytes this process can use, within the limit of its container.

    Raises `ConfigError` if the system does not tell it.
    """
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    except OSError as error:
        raise ConfigError(
            "memory_budget=auto: the free memory is unknown on this system; give a size, such as 20GB"
        ) from error
    available = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup of version 2, or no limit: `max`
        return available
    return min(available, limit - used + int(counts["inactive_file"]))  # cached files make room


def _resident_bytes() -> int:
    """Return the memory of this process without free pages of its heaps; 0 if unknown."""
    trim_heaps()
    try:
        return int(STATM.read_text().split()[1]) * getpagesize()
    except OSError:
        return 0
