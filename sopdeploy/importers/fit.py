"""Fitting a translated file to the network the user named: its config, then tensor by tensor."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.importers.source import Mapped, Translation, WeightFile
from sopdeploy.models.registry import create_model, entry, make_config

COUNTER = "num_batches_tracked"  # of a batch norm; plays no part in what a network computes
ABSENT = "absent, set to 0"


def choose_config(file: WeightFile, found: Translation, name: str, wishes: Mapping[str, Any]) -> StrictModel:
    """Return the config of model *name*: its own values, the project's, the user's *wishes*, the file's.

    Raises `WeightsError` where the file is of another network, `ConfigError` where a wish contradicts the
    file or is missing.
    """
    defaults = entry(name).defaults
    config = make_config(name, merged(defaults, wishes)).model_dump(mode="json")
    for key, value in found.must.items():
        if looked_up(config, key) != value:
            raise misfit(file, found, name, f"{key} is {looked_up(config, key)}, not {value}")
    for key, reason in found.ask.items():
        if key not in wishes:
            raise ConfigError(f"{file.path}: {reason}; add --set {key}=..")
    for key, value in leaves(found.read):
        wish = looked_up(wishes, key)
        if wish is not None and wish != value:
            raise ConfigError(f"--set {key}={wish}: {file.path} holds {value}; leave the setting out")
    return make_config(name, merged(merged(merged(defaults, found.usual), wishes), found.read))


def fitted(
    file: WeightFile, found: Translation, name: str, config: StrictModel
) -> tuple[dict[str, Tensor], list[Mapped]]:
    """Return the state dict of *name*, and every tensor of it with where it came from.

    Raises `WeightsError` naming the first tensor that is left over, missing, of another shape or not finite.
    """
    with torch.device("meta"):
        network = create_model(name, num_classes=found.num_classes, **values_of(config))
    expected = network.state_dict()
    by_name = {one.ours: one for one in found.mapped}
    used = {theirs for one in found.mapped for theirs in one.theirs} | found.ignored.keys()
    for theirs in file.tensors:
        if theirs not in used:
            raise misfit(file, found, name, f"{theirs} has no place in it")
    for ours in by_name.keys() - expected.keys():
        raise misfit(file, found, name, f"it has no {ours} for {by_name[ours].theirs[0]}")
    state: dict[str, Tensor] = {}
    rows: list[Mapped] = []
    for ours, wanted in expected.items():
        one = by_name.get(ours)
        if one is None and ours.endswith(COUNTER):
            one = Mapped(ours, (), torch.zeros((), dtype=wanted.dtype), ABSENT)
        if one is None:
            raise misfit(file, found, name, f"{ours} is not in the file")
        if ours.endswith(COUNTER):
            one = one._replace(tensor=one.tensor.reshape(()))
        if one.tensor.shape != wanted.shape:
            shapes = f"{tuple(one.tensor.shape)}, not {tuple(wanted.shape)}"
            raise misfit(file, found, name, f"{ours} is {shapes}")
        state[ours] = stored(file, one, wanted.dtype)
        rows.append(one)
    return state, rows


def values_of(config: StrictModel) -> dict[str, Any]:
    """Return the fields of *config* as the catalog takes them."""
    return {key: getattr(config, key) for key in type(config).model_fields}


def stored(file: WeightFile, one: Mapped, dtype: torch.dtype) -> Tensor:
    """Return the tensor as the network stores it; raises `WeightsError` where a value is not finite."""
    tensor = one.tensor.detach().to(dtype).contiguous().clone()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WeightsError(f"{file.path}: {one.theirs[0]} has values that are not finite in {dtype}")
    return tensor


def misfit(file: WeightFile, found: Translation, name: str, difference: str) -> WeightsError:
    """Return the error of a file that is not the network *name*, saying what it looks like."""
    if found.name == name:
        return WeightsError(f"{file.path}: does not fit {name} ({difference})")
    advice = f"import it --as {found.name}" if found.name else "the catalog has no such network"
    return WeightsError(
        f"{file.path}: does not fit {name} ({difference}); it looks like {found.looks_like}, {advice}"
    )


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return *base* with the values of *over*; a choice by its bare name counts as one with its `kind`."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = result.get(key, {})
            below = below if isinstance(below, Mapping) else {"kind": below}
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of *values* and what they hold."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def looked_up(values: Mapping[str, Any], key: str) -> Any:
    """Return what the dotted *key* holds, `None` where there is no such key."""
    here: Any = values
    for part in key.split("."):
        if isinstance(here, str) and part == "kind":
            return here
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def column_positions(channels: int) -> Tensor:
    """Return where each element of the row-wise order stands in the column-wise one, int64."""
    rows, columns = torch.triu_indices(channels, channels)
    position: Tensor = columns * (columns + 1) // 2 + rows
    return position


def triangle_side(length: int) -> int | None:
    """Return d for a *length* of d (d + 1) / 2, else `None`."""
    side = (math.isqrt(8 * length + 1) - 1) // 2
    return side if side > 0 and side * (side + 1) // 2 == length else None
