"""Look up the networks of the catalog, of timm and of plug-ins by name, and build them."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pydantic

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.models.catalog import CATALOG, PREFIXES, Entry, load
from sopdeploy.plugins import MODELS

if TYPE_CHECKING:
    from sopdeploy.models.base import Classifier


def entry(name: str) -> Entry:
    """Look up *name* in the catalog; raise `ConfigError` with the nearest names if it is unknown.

    `timm:NAME` is an entry for every NAME of timm, `dsop-timm:NAME` for those that have feature maps, and
    `head:NAME` for every network NAME without training-only parts.
    """
    family, colon, rest = name.partition(":")
    if colon and family in PREFIXES:
        found: Entry = load(PREFIXES[family])(family, rest)
        return found
    if name in CATALOG:
        return CATALOG[name]
    registered: Entry | None = MODELS.find(name)  # of the user or a plug-in
    if registered is None:
        similar = [f"timm:{name}"] if "." in name else difflib.get_close_matches(name, CATALOG, n=3)
        hint = f"did you mean {', '.join(similar)}?" if similar else "`sopdeploy models` lists them all"
        raise ConfigError(f"model {name!r} is not in the catalog; {hint}")
    return registered


def make_config(name: str, values: Mapping[str, Any]) -> StrictModel:
    """Build the config of model *name* from the catalog's defaults and *values*.

    Raises `ConfigError` with the first key or value that the model does not accept.
    """
    network = entry(name)
    return parse_options(name, network.config, {**network.defaults, **values})


def parse_options(name: str, options: type[StrictModel], values: Mapping[str, Any]) -> StrictModel:
    """Build the *options* of *name*; raise `ConfigError` with the first key or value that is not accepted."""
    try:
        return options(**values)
    except pydantic.ValidationError as problem:
        known = ", ".join(options.model_fields)
        raise ConfigError(f"{name}: {first_problem(problem)}; its keys are {known}") from problem


class CatalogModel(StrictModel):
    """A model of the catalog and the fields of its config that are not defaults."""

    name: str
    config: dict[str, Any] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _check_catalog(self) -> "CatalogModel":
        make_config(self.name, self.config)
        return self


def create_model(name: str, *, num_classes: int | None = None, **config: Any) -> "Classifier":
    """Build network *name* of the catalog with fresh weights, in train mode.

    *num_classes* defaults to the catalog's (1000, 100 or 10); *config* sets options of the model's config
    class. Raises `ConfigError` for an unknown name, key or value.
    """
    classes = entry(name).num_classes if num_classes is None else num_classes
    if classes < 1:
        raise ConfigError(f"num_classes: must be at least 1 (got {classes})")
    return entry(name).network(make_config(name, config), classes)


def list_models() -> list[str]:
    """List the names of the catalog in display order, then those that are registered."""
    return [*CATALOG, *MODELS.names()]
