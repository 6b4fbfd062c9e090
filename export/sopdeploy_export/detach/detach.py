"""The trained network without its training-only parts.

These are the second-order branches of DSoP (section III-A), the noise weights of the GM-SOP
gate and auxiliary classifiers such as those of GoogLeNet.
"""

from typing import Any, TypeVar

from torch import Tensor, nn

from sopdeploy.errors import DetachError
from sopdeploy.models.base import Classifier, is_in
from sopdeploy_export.detach.stubs import (
    Recording,
    full_of_nan,
    make_stubs,
    record_calls,
    removed_modules,
)
from sopdeploy_export.network import copy_network, tensors

_Network = TypeVar("_Network", bound=nn.Module)


def detach(
    network: _Network,
    training_only: tuple[str, ...] | None = None,
    pixels: Tensor | None = None,
) -> _Network:
    """Return a copy of *network*, in eval mode, without its *training_only* parts.

    *training_only* defaults to the parts that a network of the catalog declares. Returns
    *network* itself, in its mode, if there are none, and for a network of the catalog also if
    they have no tensors, as an empty list of branches. In a network outside of the catalog,
    stubs take the place of removed parts; *pixels*, normalized images (3, 3, H, W), show what
    the parts return.

    Raises `DetachError` if a name does not exist, and `LoweringError` if a part cannot have a
    stub.
    """
    is_of_catalog = isinstance(network, Classifier)
    if training_only is None:
        training_only = network.training_only if isinstance(network, Classifier) else ()
    # Raises for an unknown name
    owners = [_find_owner(network, name) for name in training_only]
    if not training_only or (is_of_catalog and not has_tensors(network, training_only)):
        return network
    removed = [getattr(owner, attribute) for owner, attribute in owners]
    # What `copy.deepcopy` puts in place of the object with an id
    substitutes: dict[int, Any] = {}
    if is_of_catalog:
        substitutes = dict.fromkeys(map(id, removed))
    else:
        parts = removed_modules(network, training_only)
        recording = Recording((), ())
        if parts and pixels is not None:
            recording = record_calls(copy_network(network), training_only, pixels)
        substitutes = {
            id(part): full_of_nan(part) for part in removed if isinstance(part, Tensor)
        }
        substitutes |= make_stubs(parts, recording)
    detached = copy_network(network, memo=substitutes)
    for name in training_only:
        owner, attribute = _find_owner(detached, name)
        substitute = getattr(owner, attribute)
        if is_of_catalog:
            delattr(owner, attribute)
        elif isinstance(substitute, Tensor):
            delattr(owner, attribute)
            vars(owner)[attribute] = substitute  # no parameter or buffer any more
    detached.eval()
    return detached


def has_tensors(network: nn.Module, parts: tuple[str, ...]) -> bool:
    """Return whether any of *parts* of *network* has a parameter or a buffer."""
    return any(is_in(name, *parts) for name in tensors(network))


def _find_owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the part *name* of *network*, and the attribute that it is held by."""
    path, _, attribute = name.rpartition(".")
    try:
        owner = network.get_submodule(path)
    except AttributeError as error:
        raise DetachError(
            f"{type(network).__name__}: no part named {name}; it has no {path}"
        ) from error
    if attribute not in {*owner._modules, *owner._parameters, *owner._buffers}:
        raise DetachError(
            f"{type(network).__name__}: no part named {name}; it is already detached, or `training_only` "
            "names a part that does not exist"
        )
    return owner, attribute
