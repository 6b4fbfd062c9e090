"""Catalog of networks: names, networks with their default configs, and image sizes."""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

import pydantic

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.models import (
    attention,
    dsop,
    gmsop,
    gsop,
    pooled,
    psdr,
    second_order_head,
    timm_networks,
)
from sopdeploy.models.base import Classifier, Entry, is_in
from sopdeploy.models.second_order_head import POOLED_HEAD, HeadConfig, SecondOrderHead, head_name
from sopdeploy.plugins import MODELS

FAMILIES: tuple[ModuleType, ...] = (  # in display order; each has its ENTRIES
    pooled,
    dsop,
    psdr,
    gsop,
    attention,
    gmsop,
)
CATALOG: dict[str, Entry] = {name: item for family in FAMILIES for name, item in family.ENTRIES.items()}


def entry(name: str) -> Entry:
    """Look up *name* in the catalog; raise `ConfigError` with the nearest names if it is unknown.

    `timm:NAME` is an entry for every NAME of timm, `dsop-timm:NAME` for those that have feature maps, and
    `head:NAME` for every network NAME without training-only parts.
    """
    family, colon, rest = name.partition(":")
    if colon and family == "head":
        return second_order_head.head_entry(rest, entry(rest))
    if colon and family in {"timm", "dsop-timm"}:
        return timm_networks.timm_entry(family, rest)
    if name in CATALOG:
        return CATALOG[name]
    found: Entry | None = MODELS.find(name)  # of the user or a plug-in
    if found is None:
        similar = [f"timm:{name}"] if "." in name else difflib.get_close_matches(name, CATALOG, n=3)
        hint = f"did you mean {', '.join(similar)}?" if similar else "`sopdeploy models` lists them all"
        raise ConfigError(f"model {name!r} is not in the catalog; {hint}")
    return found


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


def create_model(name: str, *, num_classes: int | None = None, **config: Any) -> Classifier:
    """Build network *name* of the catalog with fresh weights, in train mode.

    *num_classes* defaults to the catalog's (1000, 100 or 10); *config* sets options of the model's config
    class. Raises `ConfigError` for an unknown name, key or value.
    """
    classes = entry(name).num_classes if num_classes is None else num_classes
    if classes < 1:
        raise ConfigError(f"num_classes: must be at least 1 (got {classes})")
    return entry(name).network(make_config(name, config), classes)


def with_head(name: str, model: Classifier, head: HeadConfig) -> SecondOrderHead:
    """Build `head:NAME` with *head* for *model*, the network *name* of the catalog with any weights.

    The result is a new network on the same device and in the same mode, with copies of the tensors of *model*
    except those of its classifier and its training-only parts. The weights of the head are random. Raises
    `ConfigError` if the network cannot have this head.
    """
    with_head_name = head_name(name)
    fields = entry(with_head_name).config.model_fields
    options = {key: value for key, value in model.config.model_dump().items() if key in fields}
    options["head"] = head.model_dump()
    network = cast(SecondOrderHead, create_model(with_head_name, num_classes=model.num_classes, **options))
    state = network.state_dict()
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name in state and not is_in(tensor_name, POOLED_HEAD):
            state[tensor_name] = tensor
    network.load_state_dict(state)
    device = next(model.parameters()).device
    return network.to(device).train(model.training)


def title(family: ModuleType) -> str:
    """Return the first sentence of the docstring of *family*."""
    return (family.__doc__ or family.__name__).split("\n\n")[0].replace("\n", " ").rstrip(".")


def list_models() -> list[str]:
    """List the names of the catalog in display order, then those that are registered."""
    return [*CATALOG, *MODELS.names()]
