"""Recipes as text: the packaged ones and TOML files, their base, and `key=value`. Does not import torch."""

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sopdeploy.config import FieldValues, parse_toml
from sopdeploy.errors import ConfigError
from sopdeploy.files import read_text
from sopdeploy.plugins import RECIPES, own_entry_points

_KINDS = ("kind", "name")  # keys that say to what the other keys of a table belong


def list_recipes() -> list[str]:
    """List the names of the packaged recipes."""
    return sorted(_packaged())


def _packaged() -> dict[str, Traversable]:
    """Find the packaged recipes by name: those of sopdeploy, and of other packages of its wheel."""
    packages = ["sopdeploy.recipes", *(point.module for point in own_entry_points(RECIPES))]
    return {
        file.name.removesuffix(".toml"): file
        for package in packages
        for file in resources.files(package).iterdir()
        if file.name.endswith(".toml")
    }


def recipe_text(source: str | Path) -> str:
    """Read the TOML text of *source*, a packaged recipe or a path ending in `.toml`."""
    if str(source).endswith(".toml"):
        try:
            return read_text(source)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error  # without the path
            raise ConfigError(f"{source}: cannot be read ({reason}); give a recipe file") from error
    recipes = _packaged()
    if str(source) not in recipes:
        names = sorted(recipes)
        close = difflib.get_close_matches(str(source), names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {', '.join(names)}"
        raise ConfigError(f"recipe {str(source)!r}: no such recipe; {hint} (a file must end in .toml)")
    return recipes[str(source)].read_text(encoding="utf-8")


def read_values(source: str | Path) -> FieldValues:
    """Read the values of *source*, and of its `base` where it has none.

    A table of another `kind` or `name` replaces that of the base; others only set keys. Raises `ConfigError`.
    """
    try:
        values = parse_toml(recipe_text(source))
    except ValueError as error:
        raise ConfigError(f"{source}: {error}; correct the file") from error
    if "base" not in values:
        return values
    base = values.pop("base")
    if base not in list_recipes():
        raise ConfigError(f"{source}: base: no packaged recipe {base!r}; `sopdeploy recipes` lists them")
    merged = read_values(base)
    for key, value in values.items():
        inherited = merged.get(key)
        merged[key] = value
        if isinstance(value, dict) and isinstance(inherited, dict):
            is_other_kind = any(name in value and value[name] != inherited.get(name) for name in _KINDS)
            if not is_other_kind:
                merged[key] = {**inherited, **value}
    return merged


def parse_override(override: str) -> tuple[str, Any]:
    """Split `key=value` into the dotted key and the parsed TOML value.

    A value that is not TOML is a string. Raises `ConfigError` without an equals sign or with an empty key.
    """
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override}: write key=value, for example optimizer.lr=0.05")
    try:
        parsed = parse_toml(f"value = {text}")
    except ValueError:
        return key, text
    is_one_value = parsed.keys() == {"value"}  # a text of several lines may define more keys
    return key, parsed["value"] if is_one_value else text
