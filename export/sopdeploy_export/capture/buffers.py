"""What the first run of a network makes: buffers, caches of tensors, and the results that functions keep."""

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.capture.deployed import compute_outputs
from sopdeploy_export.network import (
    NOT_OF_NETWORKS,
    attributes_restored,
    modules,
    tensors,
    unstored_buffers,
)
from sopdeploy_export.program_hashes import are_equal


def create_buffers(network: nn.Module, preprocess: Preprocess) -> tuple[str, ...]:
    """Give *network* the buffers that its first run creates or replaces; return their names.

    These are buffers that the state dict does not store, such as a table of positions for the
    size of the images. Buffers that depend on the images are not among them.
    """
    pixels = _blank_images(network, preprocess)

    # Most networks create none. A run on images with values shows this. It comes first, because a
    # run on images without values can leave tensors without values in objects that are not
    # restored.
    before = unstored_buffers(network)
    if not _changed_buffers(network, pixels, before):
        return ()

    # In a run on images without values, a buffer has values only if it does not depend on them.
    without_values = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(pixels)
    created = _changed_buffers(network, without_values, before)

    owners = dict(modules(network))
    for name, tensor in created.items():
        owner, _, key = name.rpartition(".")
        owners[owner].register_buffer(key, tensor, persistent=False)
    return tuple(created)


def _blank_images(network: nn.Module, preprocess: Preprocess) -> Tensor:
    """Make two normalized black images (2, 3, H, W) for *network*, on its device."""
    images = torch.zeros(2, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    device = next((tensor.device for tensor in tensors(network).values()), images.device)
    return Normalize(preprocess, images_format(network))(images).to(device)


def empty_caches(network: nn.Module, preprocess: Preprocess) -> None:
    """Empty the dicts of tensors in *network* that a run fills again with equal tensors.

    Levit keeps a table of its weights for each device in such a dict. If an earlier run filled it,
    a capture would read the table as a constant, not as a function of the weights. Other dicts
    stay as they are: those that no run fills, and those that were filled from other weights.
    """
    own_tables = nn.Module().__dict__.keys()  # such as `_buffers`
    caches: list[dict[Any, Tensor]] = [
        value
        for _, module in modules(network)
        for name, value in vars(module).items()
        if name not in own_tables and type(value) is dict and _holds_tensors(value)
    ]
    if not caches:
        return

    # Empty all, and see what a run puts into them. `attributes_restored` empties them again.
    contents = [cache.copy() for cache in caches]
    filled: list[dict[Any, Tensor]] = [{} for _ in caches]
    for cache in caches:
        cache.clear()
    # The user's code can fail; a later run gives the message.
    with suppress(Exception), attributes_restored(network), torch.no_grad():
        compute_outputs(network, _blank_images(network, preprocess))
        filled = [cache.copy() for cache in caches]

    # Those that the run filled with other tensors, or not at all, get their content back.
    for cache, content, again in zip(caches, contents, filled, strict=True):
        if not _are_equal_dicts(content, again):
            cache.update(content)


def _holds_tensors(values: dict[Any, Any]) -> bool:
    return bool(values) and all(
        type(value) is Tensor and value.is_cpu for value in values.values()
    )


def _are_equal_dicts(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> bool:
    if first.keys() != second.keys() or not _holds_tensors(second):
        return False
    return all(are_equal(tensor, second[key]) for key, tensor in first.items())


def make_kept_results_anew(network: nn.Module, preprocess: Preprocess) -> None:
    """Let functions whose results `functools.lru_cache` keeps compute those of a run of *network* anew.

    These are the functions in the packages of its classes, but for those of torch and of this
    project, which keep no results of a network. The results have values: those of a run while
    torch.export captures would have none.
    """
    classes = {type(module) for _, module in modules(network)}
    for function in _functions_that_keep(
        {_package(kind) for kind in classes} - NOT_OF_NETWORKS
    ):
        function.cache_clear()

    # The user's code can fail; a later run gives the message.
    with suppress(Exception), attributes_restored(network), torch.no_grad():
        compute_outputs(network, _blank_images(network, preprocess))


def _functions_that_keep(packages: set[str]) -> Iterator[Any]:
    """Yield the functions of *packages* whose results `functools.lru_cache` keeps.

    They are in modules, in classes, and inside of what a decorator returns.
    """
    unvisited = [
        value
        for name, module in [*sys.modules.items()]
        if name.partition(".")[0] in packages
        for value in [*getattr(module, "__dict__", {}).values()]
    ]
    visited: set[int] = set()

    while unvisited:
        value = unvisited.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))

        # By `type`, because a proxy in a module can do anything when `isinstance` asks for its class.
        kind = type(value)
        if kind is functools._lru_cache_wrapper:
            yield value
        elif kind in (staticmethod, classmethod):
            unvisited.append(value.__func__)
        elif issubclass(kind, type) and _package(value) in packages:
            unvisited += vars(value).values()
        elif kind is FunctionType and _package(value) in packages:
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # of an empty cell
                    unvisited.append(cell.cell_contents)


def _package(of: type | FunctionType) -> str:
    return str(of.__module__).partition(".")[0]


def _changed_buffers(
    network: nn.Module, pixels: Tensor, before: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Map the names of unstored buffers that a run on *pixels* creates or replaces to the new tensors.

    *before* are the unstored buffers of *network* now. Of a run that fails, the buffers count that it
    made before. Tensors without values are left out. *network* is unchanged afterwards.
    """
    with attributes_restored(network), torch.no_grad():
        with suppress(Exception):  # of the user's code; a later run gives the message
            compute_outputs(network, pixels)
        after = unstored_buffers(network)

    # Tensors without values are of a class of their own.
    return {
        name: tensor
        for name, tensor in after.items()
        if type(tensor) is Tensor and tensor is not before.get(name)
    }
