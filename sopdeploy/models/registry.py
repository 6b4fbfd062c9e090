"""The catalog: a name, the network it builds, and the size of image it is meant for."""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pydantic

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.models import (
    attention,
    dsop,
    dsop_cifar,
    gmsop,
    gmsop_baselines,
    gsop,
    plain,
    pooled,
    psdr,
    timm_networks,
)
from sopdeploy.models.base import Classifier, Entry

FAMILIES: tuple[ModuleType, ...] = (  # in the order they are shown; each has its ENTRIES
    plain,
    pooled,
    dsop,
    dsop_cifar,
    psdr,
    gsop,
    attention,
    gmsop,
    gmsop_baselines,
)
CATALOG: dict[str, Entry] = {name: line for family in FAMILIES for name, line in family.ENTRIES.items()}


def entry(name: str) -> Entry:
    """Return the catalog's entry *name*; raises `ConfigError` with the nearest names.

    `timm:NAME` and `dsop-timm:NAME` are entries for every NAME of timm that has feature maps.
    """
    family, colon, rest = name.partition(":")
    if colon and family in timm_networks.FAMILIES:
        return timm_networks.FAMILIES[family](rest)
    if name not in CATALOG:
        near = difflib.get_close_matches(name, CATALOG, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`sopdeploy models` lists them all"
        raise ConfigError(f"model {name!r} is not in the catalog; {hint}")
    return CATALOG[name]


def make_config(name: str, values: Mapping[str, Any]) -> StrictModel:
    """Return the config of model *name* with *values* over the catalog's defaults.

    Raises `ConfigError` naming the first key or value that the model does not accept.
    """
    found = entry(name)
    try:
        return found.config(**{**found.defaults, **values})
    except pydantic.ValidationError as problem:
        known = ", ".join(found.config.model_fields)
        raise ConfigError(f"{name}: {first_problem(problem)}; its keys are {known}") from problem


def create_model(name: str, *, num_classes: int | None = None, **config: Any) -> Classifier:
    """Return network *name* of the catalog with fresh weights, in train mode.

    *num_classes* defaults to the catalog's (1000 or 10); *config* are the switches of the model's
    config class. Raises `ConfigError` for an unknown name, key or value.
    """
    classes = entry(name).num_classes if num_classes is None else num_classes
    if classes < 1:
        raise ConfigError(f"num_classes: must be at least 1 (got {classes})")
    return entry(name).network(make_config(name, config), classes)


def title(family: ModuleType) -> str:
    """Return what the first sentence of *family* says it is."""
    return (family.__doc__ or family.__name__).split("\n\n")[0].replace("\n", " ").rstrip(".")


def list_models() -> list[str]:
    """Return the names of the catalog in the order they are shown."""
    return list(CATALOG)
