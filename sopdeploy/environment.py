"""The machine, installed packages and optional imports. Does not import torch."""

import importlib
import os
import platform
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from sopdeploy.errors import MissingPackageError, SopdeployError

CPUINFO = Path("/proc/cpuinfo")  # Linux only
# x86 processors without VNNI add two products of uint8 and int8 in 16 bits, where the sum can saturate. With
# this session option ONNX Runtime stores the int8 weights as uint8, which is exact. With VNNI it changes no
# result and takes up to 2.2 times as long (ONNX Runtime 1.32).
EXACT_INT8 = ("session.x64quantprecision", "1")
DAEMON_THREAD, WORKER_THREAD = "daemon", "model_worker"  # names of threads that may never end
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
    """Count the cores that this process may use; macOS has no affinity, so all cores count there."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # None if unknown


def processor() -> str:
    """Return the processor model from /proc/cpuinfo, or the architecture if it is not listed."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def is_distributed() -> bool:
    """Check whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Check whether this is the process that prints and writes files."""
    return not is_distributed() or os.environ.get("RANK", "0") == "0"


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


def install_hint(package: str, source: str) -> str:
    """Explain how to install *package*; *source* is the `pip install` argument, such as `sopdeploy[s3]`."""
    return f'{package} is not installed; run: pip install "{source}"'


def import_optional(
    module: str, package: str, source: str, error: type[SopdeployError], needed_by: str = ""
) -> Any:
    """Import *module* of *package*; if it is missing, raise *error* with *needed_by* and an install hint."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        prefix = f"{needed_by}: " if needed_by else ""
        raise error(prefix + install_hint(package, source)) from problem


@contextmanager
def missing_extras() -> Iterator[None]:
    """Turn the failed import of a package that an extra of sopdeploy installs into `MissingPackageError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = error.name or ""
        package = {"sklearn": "scikit-learn"}.get(module, module.replace("_", "-"))  # its name on PyPI
        requirements = "\n".join(metadata.requires("sopdeploy") or [])  # lines: `timm>=1; extra == "train"`
        pairs = re.findall(r"^([\w.-]+).*\bextra == ['\"]([\w-]+)", requirements, re.MULTILINE)
        extras = [extra for required, extra in pairs if required == package]
        if not extras:  # no extra installs it: the error stays as it is
            raise
        advised = "train" if "train" in extras else extras[0]  # "train" has the most packages
        raise MissingPackageError(install_hint(package, f"sopdeploy[{advised}]")) from error


def exit_process(code: int | None) -> NoReturn:
    """Exit as `sys.exit` does, also while a load or a batch that hangs is in native code.

    At Python's own exit, C++ code that still runs in another thread can abort the process.
    """
    names = {thread.name for thread in threading.enumerate()}
    if names & {DAEMON_THREAD, WORKER_THREAD}:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code or 0)
    sys.exit(code)
