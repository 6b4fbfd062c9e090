"""Copy a trained network without the parts that only its training needs.

DSoP section III-A removes the second-order branches after training; the GM-SOP gate loses its noise weights
the same way. Auxiliary classifiers, as in GoogLeNet, are parts of the same kind.
"""

import copy
from typing import Any, TypeVar

from torch import nn

from sopdeploy.errors import DetachError
from sopdeploy.models.base import Classifier, is_in
from sopdeploy_export.proof.preconditions import tensors

Network = TypeVar("Network", bound=nn.Module)

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def detach(
    network: Network, training_only: tuple[str, ...] | None = None, *, requested: bool = True
) -> Network:
    """Copy *network*, in eval mode, without its *training_only* parts; the same network if not *requested*.

    A network of the catalog lists the parts itself. Parts without tensors, such as the branches of a network
    that was configured without any, do not count. A removed part of another network becomes `None`, because
    its `forward` may test for that. Raises `DetachError` if *requested* and there is nothing to detach, if
    not *requested* and there are such parts, or if a name does not exist.
    """
    if training_only is None:
        training_only = network.training_only if isinstance(network, Classifier) else ()
    kind, names = type(network).__name__, ", ".join(training_only)
    for name in training_only:
        _find(network, name)
    detachable = any(is_in(name, *training_only) for name in tensors(network))
    if not requested:
        if detachable:
            raise DetachError(
                f"{kind} still carries training-only parts ({names}); add --detach to remove them"
            )
        return network
    if not detachable:
        reason = f"its {names} hold no tensors" if names else "it has no training-only parts"
        raise DetachError(f"{kind} has nothing to detach: {reason}; export it without --detach")
    excluded: dict[int, Any] = {}  # deepcopy replaces the parts in this memo by None
    for name in training_only:
        owner, attribute = _find(network, name)
        excluded[id(getattr(owner, attribute))] = None
    detached = copy.deepcopy(network, excluded)
    for name in training_only:
        owner, attribute = _find(detached, name)
        if isinstance(network, Classifier) or isinstance(owner, CONTAINERS):
            delattr(owner, attribute)
    detached.eval()
    return detached


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
