"""Packages that only some need: imported where they are needed, or one line says how to get them."""

import importlib
from typing import Any

from sopdeploy.errors import SopdeployError


def how_to_get(package: str, source: str) -> str:
    """Return the line on *package*, which `pip install` of *source* brings: an extra or its own name."""
    return f'{package} is not installed; run: pip install "{source}"'


def imported(module: str, package: str, source: str, error: type[SopdeployError], needed_by: str = "") -> Any:
    """Return *module* of *package*; where it is missing raises *error*: *needed_by*, and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        where = f"{needed_by}: " if needed_by else ""
        raise error(where + how_to_get(package, source)) from problem
