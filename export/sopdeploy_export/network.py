"""The modules and tensors of a network, read from torch's own tables, and its copy."""

import copy
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sopdeploy.errors import LoweringError, first_line
from sopdeploy.layers.normalize import IMAGES_FORMAT, images_format

LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}
_Network = TypeVar("_Network", bound=nn.Module)


def copy_network(network: _Network, memo: dict[int, Any] | None = None) -> _Network:
    """Copy *network* with `copy.deepcopy` and its *memo*; the locks of modules become new ones.

    Tensors in attributes lose the operations that computed them, without which they can be
    copied.

    Raises `LoweringError` if this fails, or if a `__deepcopy__` returns another class or parts
    of *network*.
    """
    memo = {} if memo is None else memo
    for _, module in modules(network):
        for value in tree_leaves(list(vars(module).values())):
            if type(value) in LOCKS:  # which deepcopy cannot copy
                memo[id(value)] = LOCKS[type(value)]()
            elif type(value) is Tensor and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(network, memo)
    except Exception as error:  # classes can define how they are copied
        raise LoweringError(f"the network cannot be copied: {first_line(error)}") from error
    originals = {id(module) for _, module in modules(network)}
    # Each has its own class
    kind = fx.GraphModule if isinstance(network, fx.GraphModule) else type(network)
    if not isinstance(copied, kind) or any(
        id(module) in originals for _, module in modules(copied)
    ):
        raise LoweringError(
            "the network is not copied by copy.deepcopy; remove its __deepcopy__"
        )
    return copied


def with_contiguous_tensors(network: _Network) -> _Network:
    """Return *network*, or a copy with contiguous tensors if any is not: graphs contain the strides.

    The copy keeps the layout of the images, which may follow from the strides.
    """
    if all(tensor.is_contiguous() for tensor in tensors(network).values()):
        return network
    copied = copy_network(network)
    vars(copied)[IMAGES_FORMAT] = images_format(network)
    for tensor in tensors(copied).values():
        tensor.data = tensor.detach().contiguous()
    return copied


def modules(network: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield *network* and every module in it, each under all of its dotted names.

    This reads torch's own tables, because a class can override `named_modules`.
    """
    yield name, network
    for child, module in network._modules.items():
        if module is not None:
            yield from modules(module, f"{name}.{child}" if name else child)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Map every name of every parameter and buffer of *network* to its tensor, parameters first."""
    owners = list(modules(network))
    return {
        f"{owner}.{name}" if owner else name: tensor
        for table in ("_parameters", "_buffers")
        for owner, module in owners
        for name, tensor in vars(module)[table].items()
        if tensor is not None
    }


def unstored_buffers(network: nn.Module) -> dict[str, Tensor | None]:
    """Map the names of the buffers of *network* that state dicts of torch do not store to their tensors."""
    return {
        f"{owner}.{name}" if owner else name: module._buffers.get(name)
        for owner, module in modules(network)
        for name in module._non_persistent_buffers_set
    }
