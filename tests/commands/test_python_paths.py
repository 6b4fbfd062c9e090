"""The public functions of docs/python.md take a path as text or as `Path` alike."""

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def public_functions() -> Iterator[Callable[..., Any]]:
    for name in re.findall(r"^::: (\S+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except AttributeError:
            found = importlib.import_module(name)
        members = (
            vars(found).values() if isinstance(found, type | types.ModuleType) else [found]
        )
        functions = (inspect.unwrap(one) for one in members if inspect.isfunction(one))
        yield from (one for one in functions if not one.__name__.startswith("_"))


def test_a_parameter_that_is_a_path_may_be_text() -> None:
    checked = 0
    for function in public_functions():
        for name, parameter in inspect.signature(function).parameters.items():
            annotation = inspect.formatannotation(parameter.annotation)
            annotation = annotation.replace("pathlib._local.", "pathlib.")  # Python 3.13
            if "Callable[" not in annotation:  # it is called with a path
                found = re.findall(r"([\w.]+ \| )?\b(?:pathlib\.)?Path\b", annotation)
                checked += len(found)
                assert {"str | "}.issuperset(found), (
                    f"{function.__qualname__}: {name}: {annotation}"
                )

    assert checked > 10
