"""The catalog: a name, the network it builds, and the size of image it is meant for."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic

from sopdeploy.backbones.resnet import ResNetConfig
from sopdeploy.backbones.small_resnet import SmallResNetConfig
from sopdeploy.errors import ConfigError
from sopdeploy.frozen import Frozen, first_problem
from sopdeploy.models.base import Classifier
from sopdeploy.models.dsop_networks import (
    DSoPResNet,
    DSoPResNetConfig,
    DSoPSmallResNet,
    DSoPSmallResNetConfig,
)
from sopdeploy.models.plain import PlainResNet, PlainSmallResNet


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the catalog; `image_size` is the side of the images its paper uses, in pixels."""

    network: type[Classifier]
    config: type[Frozen]
    defaults: Mapping[str, Any]
    image_size: int
    num_classes: int
    summary: str


def resnet(depth: int) -> Entry:
    """Return the entry of a plain ResNet."""
    return Entry(
        network=PlainResNet,
        config=ResNetConfig,
        defaults={"depth": depth},
        image_size=224,
        num_classes=1000,
        summary=f"plain ResNet-{depth}",
    )


def dsop_resnet(depth: int) -> Entry:
    """Return the entry of a ResNet that learns with second-order branches."""
    return Entry(
        network=DSoPResNet,
        config=DSoPResNetConfig,
        defaults={"depth": depth},
        image_size=224,
        num_classes=1000,
        summary=f"DSoP on ResNet-{depth}: four second-order branches, detached before it ships",
    )


def small_resnet(depth: int) -> Entry:
    """Return the entry of a plain ResNet for 32-pixel images."""
    return Entry(
        network=PlainSmallResNet,
        config=SmallResNetConfig,
        defaults={"depth": depth},
        image_size=32,
        num_classes=10,
        summary=f"plain ResNet-{depth} for 32-pixel images",
    )


def dsop_small_resnet(depth: int) -> Entry:
    """Return the entry of a ResNet for 32-pixel images that learns with branches."""
    return Entry(
        network=DSoPSmallResNet,
        config=DSoPSmallResNetConfig,
        defaults={"depth": depth},
        image_size=32,
        num_classes=10,
        summary=f"DSoP on ResNet-{depth} for 32-pixel images",
    )


CATALOG: dict[str, Entry] = {
    **{f"resnet{depth}": resnet(depth) for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}": small_resnet(depth) for depth in (8, 20, 32, 44, 56, 110)},
    **{f"dsop-resnet{depth}": dsop_resnet(depth) for depth in (18, 34, 50, 101)},
    **{f"dsop-resnet{depth}": dsop_small_resnet(depth) for depth in (8, 20, 32, 44, 56, 110)},
}


def entry(name: str) -> Entry:
    """Return the catalog's entry *name*; raises `ConfigError` with the nearest names."""
    if name not in CATALOG:
        near = difflib.get_close_matches(name, CATALOG, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`sopdeploy models` lists them all"
        raise ConfigError(f"model {name!r} is not in the catalog; {hint}")
    return CATALOG[name]


def make_config(name: str, values: Mapping[str, Any]) -> Frozen:
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


def list_models() -> list[str]:
    """Return the names of the catalog in the order they are shown."""
    return list(CATALOG)
