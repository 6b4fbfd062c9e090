"""Check how the user names a network, `module:callable` and its options, before any code of it runs.

`check_builder` needs neither that code nor torch, whose imports take seconds.
"""

import ast
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from sopdeploy.errors import ConfigError

WORDS = {"true": True, "false": False}  # as in TOML
TIMM = "timm"  # in front of a name of timm's, as in timm:resnet50
NO_LITERALS = {"none", "null", "nil", "yes", "no", "on", "off", "true", "false"}


def check_builder(setting: str, import_path: str, option_texts: Sequence[str]) -> None:
    """Check the form of the arguments of `network_builder`, and that the first module can be found.

    It runs no code of the user and does not import torch. Raises `ConfigError`.
    """
    module_name, _, attribute = import_path.partition(":")
    names = module_name.split(".")
    if not attribute or not all(name.isidentifier() for name in names):
        raise ConfigError(
            "write package.module:callable, as in torchvision.models:googlenet",
            setting=setting,
            value=import_path,
        )

    # Modules are also found in the current folder, as by `python -m`.
    if "" not in sys.path:
        sys.path.insert(0, "")
    if names[0] not in sys.modules and find_spec(names[0]) is None:
        raise ConfigError(
            f"no module named {names[0]}; run the command in its folder, or install it",
            setting=setting,
            value=import_path,
        )

    for text in option_texts:
        parse_option(text)


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
