"""Check how the user names a network, `module:callable` and its options, before any code of it runs.

`check_builder` needs neither that code nor torch, whose imports take seconds.
"""

import ast
import pkgutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sopdeploy.errors import ConfigError
from sopdeploy.nearest import did_you_mean

WORDS = {"true": True, "false": False}  # as in TOML
NO_LITERALS = {"none", "null", "nil", "yes", "no", "on", "off", "true", "false"}


def check_builder(setting: str, import_path: str, option_texts: Sequence[str]) -> None:
    """Check the form of the arguments of `network_builder`, and that the first module can be found.

    It runs no code of the user and does not import torch. Raises `ConfigError`.
    """
    invalid = partial(ConfigError, setting=setting, value=import_path)
    module_name, _, attribute = import_path.partition(":")
    file = _file_of_path(module_name)
    if file == "" or not attribute:  # or the colon is missing
        raise invalid("write package.module:callable, as in torchvision.models:googlenet")

    # Modules are also found in the current folder, as by `python -m`.
    if "" not in sys.path:
        sys.path.insert(0, "")

    if file is not None:
        problem = f"write {file}:{attribute}, without .py or a path, and run the command in its folder"
        if not file.isidentifier():
            problem = (
                f"{file!r} is no name of a module; rename the file, with letters, digits and _"
            )
        raise invalid(problem)
    missing = _describe_missing(module_name)
    if missing is not None:
        raise invalid(missing)

    for text in option_texts:
        parse_option(text)


def _file_of_path(module_name: str) -> str | None:
    """Return the name of the file, without `.py`, if *module_name* is a path or ends in `.py`; otherwise None.

    A module `py` of a package is no such file. The name is empty if a part of the path or of the
    dotted name that must name a module is empty, as in `..`.
    """
    package, _, rest = module_name.partition(".")
    is_path = "/" in module_name or "\\" in module_name
    if not is_path and "" in module_name.removesuffix(".py").split("."):
        return ""
    is_dotted_name = all(part.isidentifier() for part in module_name.split("."))
    if is_dotted_name:
        spec = PathFinder.find_spec(package) if rest == "py" else None
        is_package = (
            spec is not None and spec.origin is not None and spec.submodule_search_locations
        )
        if rest != "py" or is_package:
            return None

    return Path(module_name.replace("\\", "/").removesuffix(".py")).name.lstrip(".")


def _describe_missing(module_name: str) -> str | None:
    """Say that the first module in the dotted *module_name* cannot be found, and what to do; None if it can."""
    package, _, rest = module_name.partition(".")
    if package in sys.modules or find_spec(package) is not None:
        return None

    missing, advice = f"{package}.py", "run the command in its folder"
    if rest:
        missing, advice = f"folder {package}", f"{advice}, or install {package}"
    here = Path.cwd()
    nearby = [module.name for module in pkgutil.iter_modules([str(here)])]
    return (
        f"no {missing} in {here} (nor on PYTHONPATH); {did_you_mean(package, nearby, advice)}"
    )


def parse_option(text: str) -> tuple[str, Any]:
    """Split `key=value` into the key and the value, a Python literal such as False, None, 3 or (8, 16).

    `true` and `false` are accepted, too; any other value is text. Raises `ConfigError` for
    another form, or for a value that is meant as a literal of another language.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key.isidentifier():
        raise ConfigError(f"{text}: write key=value, for example depth=18")
    if value in WORDS:
        return key, WORDS[value]
    try:
        return key, ast.literal_eval(value)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        if value.lower() in NO_LITERALS:
            quoted = f"{key}=\"'{value}'\""
            raise ConfigError(
                f"{text}: write True, False or None, or {quoted} for a text"
            ) from error
    return key, value
