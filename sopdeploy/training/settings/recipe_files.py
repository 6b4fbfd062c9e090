"""Recipes as text: the packaged ones and TOML files, their base, and `key=value`. Does not import torch."""

from collections.abc import Mapping
from copy import deepcopy
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sopdeploy.base.config import FieldValues, parse_toml
from sopdeploy.base.files import read_text
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.base.plugins import RECIPES, own_entry_points
from sopdeploy.errors import ConfigError
from sopdeploy.models.families import lead_on

# What selecting the procedure `fine_tune` sets: short training by small steps, because the
# start is good. A rate of 1e-3 lost 27 points of signs and 73 of packages on one draw, with
# heads on averages.
FINE_TUNE_SETTINGS: Mapping[str, Any] = {
    "epochs": 6,
    "batch_size": 8,
    "augment": {"kind": "random-resized-crop", "scale": (0.5, 1.0), "flip": 0.5},
    "optimizer": {"kind": "adamw", "lr": 3e-4},
    "schedule": {"kind": "cosine", "warmup_epochs": 0.5},
    "loss": {"label_smoothing": 0.1},
    "ema": None,
    "mixing": None,
    "teacher": None,
    "validation": {"mirror": False},  # the comparison is that of exported networks
    "start.classifier_epochs": 0,  # the classifier is fitted
    "start.classifier_lr": None,
    "start.learn": "last_stages",
    "start.head_factor": 1.0,
}
_KINDS = ("kind", "name")  # keys that say to what the other keys of a table belong
# The tables of a recipe that have such a key. A text in place of the table is its value.
SELECTORS = {
    "augment": "augment.kind",
    "data": "data.kind",
    "model": "model.name",
    "optimizer": "optimizer.kind",
    "procedure": "procedure.kind",
    "schedule": "schedule.kind",
}


def list_recipes() -> list[str]:
    """List the names of the packaged recipes."""
    return sorted(_packaged())


def _packaged() -> dict[str, Traversable]:
    """Find the packaged recipes by name: those of sopdeploy, and of other packages of this project."""
    packages = ["sopdeploy.recipes", *(point.module for point in own_entry_points(RECIPES))]

    return {
        file.name.removesuffix(".toml"): file
        for package in packages
        for file in resources.files(package).iterdir()
        if file.name.endswith(".toml")
    }


def recipe_text(source: str | Path) -> str:
    """Read the TOML text of *source*, a packaged recipe or a path ending in `.toml`.

    Raises `ConfigError` if there is none, or it cannot be read.
    """
    if str(source).endswith(".toml"):
        try:
            return read_text(source)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error  # without the path
            raise ConfigError(
                f"{source}: cannot be read ({reason}); give a recipe file"
            ) from error

    recipes = _packaged()

    if str(source) not in recipes:
        names = sorted(recipes)
        hint = lead_on(str(source), "recipes", names) or did_you_mean(
            str(source), names, "`sopdeploy recipes` lists them"
        )
        raise ConfigError(
            f"recipe {str(source)!r}: no such recipe; {hint} (a file must end in .toml)"
        )

    return recipes[str(source)].read_text(encoding="utf-8")


def read_values(source: str | Path) -> FieldValues:
    """Read the values of *source*, and of its `base` where it has none; raises `ConfigError`.

    A table of another `kind` or `name` replaces that of the base; others only set keys.
    """
    try:
        values = parse_toml(recipe_text(source))
    except ValueError as error:
        raise ConfigError(f"{source}: {error}; correct the file") from error

    if "base" not in values:
        return values
    base = values.pop("base")
    if base not in list_recipes():
        raise ConfigError(
            f"{source}: base: no packaged recipe {base!r}; `sopdeploy recipes` lists them"
        )

    merged = read_values(base)
    # For a recipe that selects `fine_tune` on a base with another procedure,
    # `FINE_TUNE_SETTINGS` replace these settings of the base; its others stay.
    add_fine_tune_settings(merged, procedure_kind(values))

    # A table of another kind replaces that of the base: the keys of the base would not fit it.
    for key, value in values.items():
        inherited = merged.get(key)
        merged[key] = value
        if isinstance(value, dict) and isinstance(inherited, dict):
            is_other_kind = any(
                name in value and value[name] != inherited.get(name) for name in _KINDS
            )
            if not is_other_kind:
                merged[key] = {**inherited, **value}

    return merged


def procedure_kind(values: Mapping[str, Any]) -> Any:
    """Return the procedure that the *values* of a recipe name; None if they name none."""
    procedure = values.get("procedure")
    return procedure.get("kind") if isinstance(procedure, dict) else None


def add_fine_tune_settings(values: FieldValues, kind: Any) -> None:
    """Set `FINE_TUNE_SETTINGS` in the *values* of another procedure if *kind* is `fine_tune`."""
    if kind == "fine_tune" and procedure_kind(values) != kind:
        for key, value in FINE_TUNE_SETTINGS.items():
            set_value(values, key, value)


def set_value(values: FieldValues, key: str, value: Any) -> None:
    """Set the dotted *key* in *values*, with the tables that it needs; raises `ConfigError`."""
    *tables, last = key.split(".")
    table = values
    for name in tables:
        # A recipe may omit a table, such as `ema`, `teacher` or `start`.
        if table.get(name) is None:
            table[name] = {}
        table = table[name]
        if not isinstance(table, dict):
            raise ConfigError(f"{key}: {name} is a value, not a table with keys")

    table[last] = deepcopy(value)


def parse_override(override: str) -> tuple[str, Any]:
    """Split `key=value` into the dotted key and the parsed TOML value.

    A value that is not TOML is a string, and `null` removes a value or a table. Raises
    `ConfigError` without an equals sign or with an empty key.
    """
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override}: write key=value, for example optimizer.lr=0.05")

    if text == "null":  # TOML has no null
        return key, None
    try:
        parsed = parse_toml(f"value = {text}")
    except ValueError:
        return select_by_name(key, text)

    is_one_value = parsed.keys() == {"value"}  # a text of several lines may define more keys
    return select_by_name(key, parsed["value"] if is_one_value else text)


def select_by_name(key: str, value: Any) -> tuple[str, Any]:
    """Return `("model.name", "resnet20")` for `("model", "resnet20")`, other changes as they are."""
    return (SELECTORS.get(key, key) if isinstance(value, str) else key), value
