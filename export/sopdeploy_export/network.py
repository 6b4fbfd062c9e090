"""The modules and tensors of a network, read from torch's own tables; its copy, and what restores it."""

import copy
import linecache
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sopdeploy.errors import LoweringError, first_line

DEPTH = 4  # levels of nested lists, dicts and sets that are restored
LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}
# Code whose lines tell a user nothing; packages of others can lie within that of Python.
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
_OF_PYTHON = sysconfig.get_path("stdlib")
_MOST_OF_LINE = 100  # characters
_Network = TypeVar("_Network", bound=nn.Module)


def is_network_code(file: str) -> bool:
    """Return whether *file* can hold code of a network: not of torch, Python or this package."""
    is_of_python = file.startswith(_OF_PYTHON) and "site-packages" not in file
    return not is_of_python and not file.startswith(_FOREIGN)


def at_line(file: str, number: int) -> str:
    """Write a place in code as ` in net.py:12 (the line)`."""
    line = shortened(linecache.getline(file, number).strip(), _MOST_OF_LINE)
    return f" in {Path(file).name}:{number} ({line})"


def shortened(text: str, most: int) -> str:
    """Return *text*, of which at most *most* characters stay."""
    return text if len(text) <= most else f"{text[:most]} ..."


def copy_network(network: _Network, *, share_weights: bool = False) -> _Network:
    """Copy *network* with `copy.deepcopy`, also if its modules hold what deepcopy refuses.

    Locks become new ones. A tensor that autograd has computed becomes a copy without its history. With
    *share_weights*, each parameter of the copy has the memory of the original, so nothing may write to it.
    Raises `LoweringError` if copying fails, or if a `__deepcopy__` returns another class or shares
    modules with *network*.
    """
    # The copies that deepcopy is to use of what it cannot copy, by the id of the original.
    memo: dict[int, Any] = {}
    for _, module in modules(network):
        for value in tree_leaves(list(vars(module).values())):
            if type(value) in LOCKS:
                memo[id(value)] = LOCKS[type(value)]()
            elif type(value) is Tensor and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        if share_weights:
            parameters = [value for value in module._parameters.values() if value is not None]
            memo |= {id(each): nn.Parameter(each.detach(), False) for each in parameters}

    try:
        copied = copy.deepcopy(network, memo)
    except Exception as error:  # classes can define how they are copied
        raise LoweringError(f"the network cannot be copied: {first_line(error)}") from error

    # The copy must have the same class, but each graph module has a class of its own. It must not
    # share a module with the original.
    kind = fx.GraphModule if isinstance(network, fx.GraphModule) else type(network)
    originals = {id(module) for _, module in modules(network)}
    shares_module = any(id(module) in originals for _, module in modules(copied))
    if not isinstance(copied, kind) or shares_module:
        raise LoweringError(
            "the network is not copied by copy.deepcopy; remove its __deepcopy__"
        )
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
        for name, tensor in _table_of(module, table).items()
        if tensor is not None
    }


def _table_of(module: nn.Module, name: str) -> Any:
    """Return the table *name* of *module*; that of a ScriptModule is in C++."""
    is_scripted = isinstance(module, torch.jit.ScriptModule)
    return getattr(module, name) if is_scripted else vars(module)[name]


def unstored_buffers(network: nn.Module) -> dict[str, Tensor | None]:
    """Map the names of the buffers of *network* that state dicts of torch do not store to their tensors."""
    return {
        f"{owner}.{name}" if owner else name: module._buffers.get(name)
        for owner, module in modules(network)
        for name in module._non_persistent_buffers_set
    }


@contextmanager
def tensors_converted(
    network: nn.Module, convert: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the content of each tensor of *network* by what *convert* makes of it, for the block."""
    # Each tensor once, also if it has several names.
    by_id = {id(tensor): tensor for tensor in tensors(network).values()}
    replaced: list[tuple[Tensor, Tensor]] = []

    try:
        for tensor in by_id.values():
            content = tensor.data
            converted = convert(content)
            if converted is not content:  # the `data` of some tensors cannot be set
                replaced.append((tensor, content))
                tensor.data = converted
        yield
    finally:
        for tensor, content in replaced:
            tensor.data = content


@contextmanager
def contents_restored(network: nn.Module) -> Iterator[None]:
    """Give the tensors of *network* their content back after the block, if its modules define `train` or `eval`.

    Such a method can rewrite weights, as that of an adapter which merges itself into a layer. Only
    then are the contents copied.
    """
    defines_mode = any(
        getattr(type(module), method) is not getattr(nn.Module, method)
        or method in vars(module)
        for _, module in modules(network)
        for method in ("train", "eval")
    )
    by_id = {id(tensor): tensor for tensor in tensors(network).values()} if defines_mode else {}
    saved = [(tensor, tensor.data, tensor.data.clone()) for tensor in by_id.values()]

    try:
        yield
    finally:
        for tensor, content, copied in saved:
            content.copy_(copied)
            if tensor.data_ptr() != content.data_ptr():
                tensor.data = content


@contextmanager
def attributes_restored(network: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules of *network* after the block.

    The dicts, lists and sets in them, down to `DEPTH` levels, get their items back, too.
    """
    attributes = [vars(module) for _, module in modules(network)]
    nested = [
        container for table in attributes for container in _nested_containers(table, DEPTH)
    ]
    saved: list[tuple[Any, Any]] = [
        (container, container.copy()) for container in (*attributes, *nested)
    ]

    try:
        yield
    finally:
        for container, content in saved:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:  # a dict or a set
                container.update(content)


def _nested_containers(container: Any, depth: int) -> Iterator[Any]:
    """Yield the dicts, lists and sets in *container*, down to *depth* levels."""
    for item in container.values() if isinstance(container, dict) else container:
        if depth and isinstance(item, dict | list | set):
            yield item
            yield from _nested_containers(item, depth - 1)
