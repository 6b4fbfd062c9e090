"""The machine that a measured figure depends on. No torch here."""

import importlib
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from sopdeploy.errors import SopdeployError


def machine() -> dict[str, str | int | float]:
    """Return what a figure depends on: processor, usable cores, load, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": processor(),
        "cores": cores,
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """Return the processor's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each of *packages* that is installed, by its own record: nothing is imported."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def install_hint(package: str, source: str) -> str:
    """Return the line on *package*, which `pip install` of *source* brings: an extra or its own name."""
    return f'{package} is not installed; run: pip install "{source}"'


def import_optional(
    module: str, package: str, source: str, error: type[SopdeployError], needed_by: str = ""
) -> Any:
    """Return *module* of *package*; where it is missing raises *error*: *needed_by*, and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        where = f"{needed_by}: " if needed_by else ""
        raise error(where + install_hint(package, source)) from problem
