"""Detach: copy a trained network without the parts that only its training needs.

DSoP section III-A removes the second-order branches after training; the GM-SOP gate loses its noise weights
the same way. The model lists the removable parts in `training_only`.
"""

import copy
from typing import Any

from torch import nn

from sopdeploy.errors import DetachError, LoweringError
from sopdeploy.models.base import Classifier


def check_exportable(network: Classifier) -> None:
    """Raise `LoweringError` if a layer of *network* is declared `not_exportable`."""
    for module in network.modules():
        reason = getattr(module, "not_exportable", None)
        if reason is not None:
            raise LoweringError(f"{type(module).__name__} cannot be exported: {reason}")


def require_detached(network: Classifier) -> Classifier:
    """Return *network*; raise `DetachError` if it has training-only parts."""
    if network.training_only:
        raise DetachError(
            f"{type(network).__name__} still carries training-only parts "
            f"({', '.join(network.training_only)}); add --detach to remove them"
        )
    return network


def detach(network: Classifier) -> Classifier:
    """Copy *network*, in eval mode, without its `training_only` parts.

    Raises `DetachError` if there is nothing to detach or a name in `training_only` does not exist.
    """
    if not network.training_only:
        raise DetachError(
            f"{type(network).__name__} has nothing to detach: it has no training-only parts; "
            "export it without --detach"
        )
    excluded: dict[int, Any] = {}  # a memo entry of None keeps deepcopy from copying these parts
    for name in network.training_only:
        owner, attribute = _find(network, name)
        excluded[id(getattr(owner, attribute))] = None
    detached = copy.deepcopy(network, excluded)
    for name in network.training_only:
        owner, attribute = _find(detached, name)
        delattr(owner, attribute)
    return detached.eval()


def _find(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    try:
        owner = network.get_submodule(path)
    except AttributeError as error:
        raise DetachError(f"{type(network).__name__}: no part named {name}; it has no {path}") from error
    if attribute not in {*owner._modules, *owner._parameters, *owner._buffers}:
        raise DetachError(
            f"{type(network).__name__}: no part named {name}; it is already detached, or `training_only` "
            "names a part that does not exist"
        )
    return owner, attribute
