"""Detaching: a copy of a trained network without the parts that only its training needs.

Paper: DSoP section III-A: the second-order branches are taken off once training is over. The GM-SOP gate
loses its noise weights the same way. What may leave is the model's own `training_only`.
"""

import copy
from typing import Any

from torch import nn

from sopdeploy.errors import DetachError
from sopdeploy.models.base import Classifier


def detach(network: Classifier) -> Classifier:
    """Return a copy of *network* in eval mode without its `training_only` parts; *network* stays whole.

    Raises `DetachError` where there is nothing to detach, or where a declared name does not exist.
    """
    if not network.training_only:
        raise DetachError(
            f"{type(network).__name__} has nothing to detach: all of it computes the answer; "
            "export it without --detach"
        )
    left_out: dict[int, Any] = {}
    for name in network.training_only:
        owner, leaf = find(network, name)
        left_out[id(getattr(owner, leaf))] = None
    lean = copy.deepcopy(network, left_out)
    for name in network.training_only:
        owner, leaf = find(lean, name)
        delattr(owner, leaf)
    return lean.eval()


def find(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns the part with the dotted *name*, and the part's own name in it."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = network.get_submodule(path)
    except AttributeError as problem:
        raise DetachError(f"{type(network).__name__}: no part named {name}; it has no {path}") from problem
    if leaf not in {*owner._modules, *owner._parameters, *owner._buffers}:
        raise DetachError(
            f"{type(network).__name__}: no part named {name}; it was detached before, or `training_only` "
            "names a part that does not exist"
        )
    return owner, leaf
