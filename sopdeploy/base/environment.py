"""The machine, installed packages and optional imports. Does not import torch."""

import gc
import importlib
import os
import platform
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NoReturn

from sopdeploy.errors import ConfigError, MissingPackageError, SopdeployError, first_line

# What `pip install` takes for the papers' tables: both wheels, because the second one needs the first
PAPERS: tuple[str, ...] = (".[train]", "./plugins/papers")
CPUINFO = Path("/proc/cpuinfo")  # Linux only
# Linux only
CGROUP = Path("/sys/fs/cgroup")
PROCESS_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
# x86 processors without VNNI add two products of uint8 and int8 in 16 bits, where the sum can
# saturate. With this session option ONNX Runtime stores the int8 weights as uint8, which is
# exact. With VNNI it changes no result and takes up to 2.2 times as long (ONNX Runtime 1.32).
EXACT_INT8 = ("session.x64quantprecision", "1")
# names of threads that may never end
DAEMON_THREAD = "daemon"
WORKER_THREAD = "model_worker"
SLOW_INT8 = "int8 is exact on this processor but slower than on one with VNNI; compare with sopdeploy bench"


def machine() -> dict[str, str | int | float]:
    """Describe the machine for benchmark reports: processor, usable cores, load average and system."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Count the cores that this process may use, at least 1; a container's quota of CPU time limits them.

    macOS has neither affinity nor quotas, so all cores count there.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))

    for folder, version in control_groups("cpu"):
        # Without a quota, the text `max` or -1; a group can also lack these files.
        with suppress(OSError, ValueError):
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
                quota, period = (int((folder / name).read_text()) for name in names)

            if quota > 0:
                cores = min(cores, max(1, quota // period))  # a quota may be less than one core
    return cores


def control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """List the control groups of this process that can limit *controller*, as folders, and their version.

    These are its own group and those around it. A container can have its limit at the root,
    with a path that exists on its host only.
    """
    with suppress(OSError):
        for line in PROCESS_CGROUP.read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":  # version 2, such as `0::/user.slice`
                roots = [CGROUP]
                version = 2
            # A line of version 1, such as `9:cpu,cpuacct:/docker/1f`; the folder of these groups
            # has the name of one controller or of all of them.
            elif controller in controllers.split(","):
                roots = [CGROUP / name for name in dict.fromkeys((controller, controllers))]
                version = 1
            else:
                continue

            for root in roots:
                folder = root / path.lstrip("/")
                for group in (folder, *folder.parents):
                    yield group, version


def memory_limit() -> int:
    """Return the bytes that the container of this process may use, or the machine has; 2**62 if unknown."""
    limits = [2**62]

    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        limits.append(int(lines["MemTotal"].split()[0]) * 1024)

    for folder, version in control_groups("memory"):
        with suppress(OSError, ValueError):  # no such file, or `max` instead of a number
            name = "memory.max" if version == 2 else "memory.limit_in_bytes"
            limits.append(int((folder / name).read_text()))
    return min(limits)


def processor() -> str:
    """Return the processor model from /proc/cpuinfo, or the architecture if it is not listed."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def is_distributed() -> bool:
    """Check whether torchrun started several processes."""
    return launcher_number("WORLD_SIZE", 1) > 1


def is_main_process() -> bool:
    """Check whether this is the process that prints and writes files."""
    return not is_distributed() or launcher_number("RANK", 0) == 0


def launcher_number(variable: str, default: int) -> int:
    """Read the number that torchrun, or another launcher of several processes, has put into *variable*."""
    text = os.environ.get(variable) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text):
        problem = f"{variable}={text!a}: not a number of processes, as torchrun sets it"
        raise ConfigError(f"{problem}; start with torchrun, or unset {variable}")
    return int(text)


def lacks_vnni() -> bool:
    """Check for an x86 processor without VNNI, or with unknown features; `SLOW_INT8` tells the effect."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not CPUINFO.exists() or "vnni" not in CPUINFO.read_text(encoding="utf-8")


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Look up the version of each installed package in *packages* without importing it."""
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def install_command(*sources: str) -> str:
    """Say how to install *sources*, arguments of `pip install`; `.[s3]` is the extra s3 of a checkout.

    No package index has sopdeploy, so its name would install what a stranger has put there.
    """
    place = "in the checkout of sopdeploy, " if sources[0].startswith(".") else ""
    return " ".join([f"{place}run: pip install", *(f'"{source}"' for source in sources)])


def describe_failed_import(error: ImportError, package: str, *sources: str) -> str:
    """Say why *package* raised *error* and what to do; *sources* are those of `install_command`.

    A package that is there may fail, too: its libraries do not fit into the memory, or into the system.
    """
    # A package may raise an error of its own from the one that says what is wrong.
    cause = error
    while not isinstance(cause, ModuleNotFoundError):
        if not isinstance(cause.__cause__, ImportError):
            break
        cause = cause.__cause__
    else:
        return f"{package} is not installed; {install_command(*sources)}"

    reason = f"{package} is installed, but cannot be loaded ({first_line(cause)})"
    return f"{reason}; allow more memory, or install it again"


def import_optional(
    module: str, package: str, source: str, error: type[SopdeployError], needed_by: str = ""
) -> Any:
    """Import *module* of *package*; if that fails, raise *error* with *needed_by* and what to do."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        prefix = f"{needed_by}: " if needed_by else ""
        raise error(prefix + describe_failed_import(problem, package, source)) from problem


def missing_store_error(address: str, error: ImportError) -> MissingPackageError:
    """Build the error for an *address* whose client raised *error*; fsspec knows its package."""
    scheme = address.partition("://")[0].split("::")[-1]
    client = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp"}.get(scheme)
    if client is not None:  # s3fs requires aiohttp, too
        problem = describe_failed_import(error, client, ".[s3]")
        return MissingPackageError(f"{address}: {problem}")

    known = importlib.import_module("fsspec.registry").known_implementations
    package = known.get(scheme, {}).get("class", scheme).partition(".")[0]
    return MissingPackageError(f"{address}: {describe_failed_import(error, package, package)}")


@contextmanager
def missing_extras() -> Iterator[None]:
    """Turn the failed import of a package that a checkout of sopdeploy installs into `MissingPackageError`.

    Another `ImportError` than a missing module or a library that cannot be loaded stays as it is.
    """
    try:
        yield
    except ImportError as error:
        package = _failed_package(error)

        # Each line is like `timm>=1; extra == "train"`.
        requirements = "\n".join(metadata.requires("sopdeploy") or [])
        pairs = re.findall(r"^([\w.-]+).*\bextra == ['\"]([\w-]+)", requirements, re.MULTILINE)
        extras = [extra for required, extra in pairs if required == package]

        if package == "sopdeploy-papers":
            sources = PAPERS
        elif extras:
            advised = (
                "train" if "train" in extras else extras[0]
            )  # "train" has the most packages
            sources = (f".[{advised}]",)
        else:  # no extra installs it
            raise
        message = describe_failed_import(error, package, *sources)
        raise MissingPackageError(message) from error


def _failed_package(error: ImportError) -> str:
    """Return the name on PyPI of the package whose import raised *error*; empty if neither says it."""
    module = ""
    if isinstance(error, ModuleNotFoundError):
        module = error.name or ""
    elif error.path is not None and error.path.endswith(tuple(EXTENSION_SUFFIXES)):
        # A library, in a folder of its package. Its own name has no package.
        library = Path(error.path)
        roots = [root for root in sys.path if library.is_relative_to(root)]
        module = library.relative_to(max(roots, key=len, default="/")).parts[0]

    return {"sklearn": "scikit-learn"}.get(module, module.replace("_", "-"))


def exit_process(code: int | None) -> NoReturn:
    """Exit as `sys.exit` does, or at once if a thread remains in which a load or a batch may hang.

    At once means without the functions of `atexit`; what was printed is written before. At
    Python's own exit, C++ code that still runs in such a thread can abort the process.
    """
    names = {thread.name for thread in threading.enumerate()}
    if names & {DAEMON_THREAD, WORKER_THREAD}:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code or 0)

    sys.exit(code)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Switch the garbage collector off in the block.

    It would visit all nodes of a graph again and again, for a tenth of the time of a capture or a
    conversion.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
