"""The state of a network: its modules, tensors and attributes, and the detection of writes to them.

An exported network must be stateless. torch.export restores the attributes that `forward` assigns and forgets
the assignment, so a graph does not show such a write, and equal values on probe images do not exclude it.
Therefore objects, versions and addresses are compared, not values.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEPTH = 4  # levels of nested lists, dicts and objects that are read
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


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


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """An object, compared by `is`, with numbers that a write to it changes, such as a tensor's version."""

    value: object
    changed_by_writes: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return False
        return self.value is other.value and self.changed_by_writes == other.changed_by_writes


def read_state(network: nn.Module) -> dict[str, Any]:
    """Map the path of every tensor, number and object in the modules of *network* to a comparable form.

    Attributes of the modules and of their classes are read, with lists, dicts and objects in them, and the
    global variables that the methods use. Two states differ if anything was assigned, added, removed or
    written in place between them.
    """
    state: dict[str, Any] = {}
    owners = list(modules(network))
    seen = {id(module) for _, module in owners}  # each object is read once
    for name, module in owners:
        prefix = f"{name}." if name else ""
        for attribute, value in vars(module).items():
            if attribute.startswith("_flat_weight") and isinstance(module, nn.RNNBase):
                continue  # torch updates these lists of parameters itself
            if attribute in ("_parameters", "_buffers", "_modules"):
                state |= {f"{prefix}{key}": _identify(item) for key, item in value.items()}
            else:
                state.update(_leaves(f"{prefix}{attribute}", value, DEPTH, seen))
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] not in ("torch", "builtins") and id(kind) not in seen:
                seen.add(id(kind))
                held = {f"{kind.__name__}.{name}": value for name, value in vars(kind).items()}
                for path, value in (held | _used_by_functions(kind)).items():
                    if isinstance(value, (Tensor, np.ndarray, Mapping, list, *VALUES)):
                        state.update(_leaves(path, value, DEPTH, seen))
    return state


def _used_by_functions(kind: type) -> dict[str, Any]:
    """Map the global and the enclosing variables that the methods of *kind* use to their values."""
    used: dict[str, Any] = {}
    functions = [inspect.unwrap(value) for value in vars(kind).values() if inspect.isfunction(value)]
    for function in functions:  # grows by the functions that these call
        codes = [function.__code__]
        for code in codes:  # grows by the functions that are defined inside
            codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
        names = {name for code in codes for name in code.co_names} & function.__globals__.keys()
        variables = {f"{function.__module__}.{name}": function.__globals__[name] for name in names}
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        enclosing = {name: cell.cell_contents for name, cell in cells if _is_set(cell)}
        defaults = {**(function.__kwdefaults__ or {}), "(defaults)": list(function.__defaults__ or ())}
        for name, value in (defaults | enclosing).items():
            variables[f"{function.__qualname__}.{name}"] = value
        for value in variables.values():
            is_new = inspect.isfunction(value) and value not in functions
            if is_new and value.__module__.partition(".")[0] != "torch":
                functions.append(value)
        used |= variables
    return used


def _is_set(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _leaves(path: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, VALUES):
        yield path, (type(value), repr(value))  # NaN equals itself here
    elif isinstance(value, np.ndarray):
        yield path, (value.shape, value.tobytes())
    elif depth and isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            shown = repr(key) if isinstance(key, VALUES) else f"{type(key).__name__} {id(key)}"
            yield from _leaves(f"{path}[{shown}]", item, depth - 1, seen)
    else:
        yield path, _identify(value)
        inside = {} if isinstance(value, Tensor | type | ModuleType) else getattr(value, "__dict__", {})
        if depth and id(value) not in seen:
            seen.add(id(value))
            for attribute, item in inside.items():
                yield from _leaves(f"{path}.{attribute}", item, depth - 1, seen)


def _identify(value: object) -> Identity:
    """Identify *value*; the tensors that torch.export uses in place of others have no address."""
    if type(value) in (Tensor, nn.Parameter) and isinstance(value, Tensor) and value.layout == torch.strided:
        return Identity(value, (-1 if value.is_inference() else value._version, value.data_ptr()))
    return Identity(value, (len(value),) if isinstance(value, set) else ())


def first_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Name the first path that was added, removed or changed."""
    for path in (*before, *(path for path in after if path not in before)):
        if path not in before or path not in after or before[path] != after[path]:
            return path
    return None


def first_written_tensor(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Name the first tensor of *before* that was written to or replaced; new tensors may be added."""
    for path, leaf in before.items():
        if isinstance(leaf, Identity) and isinstance(leaf.value, Tensor) and after.get(path) != leaf:
            return path
    return None


def held_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Map the path of every tensor in the state of *network*, also outside of its parameters and buffers."""
    leaves = ((path, leaf.value) for path, leaf in read_state(network).items() if isinstance(leaf, Identity))
    return {path: value for path, value in leaves if isinstance(value, Tensor)}


class InPlaceWrites(TorchDispatchMode):
    """Record the paths of tensors that operations write to; `tensor.data` hides this from versions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: list[str] = []
        self._paths = {
            tensor.untyped_storage().data_ptr(): path for path, tensor in held_tensors(network).items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        del types
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        arguments |= kwargs or {}
        for argument in func._schema.arguments if func._schema.is_mutable else ():
            value = arguments.get(argument.name)
            if argument.is_write and isinstance(value, Tensor):
                path = self._paths.get(value.untyped_storage().data_ptr())
                self.written += [] if path is None else [path]
        return func(*args, **(kwargs or {}))


class PythonReads(TorchFunctionMode):
    """Record the first Python code that reads the layout or the values of a tensor: no graph contains this.

    torch.export raises an error where code reads values, but the code can catch it.
    """

    READS = frozenset({
        "is_contiguous", "stride", "storage_offset", "data_ptr", "storage", "untyped_storage", "dim_order",
        "__bool__", "is_nonzero", "equal", "allclose", "tolist", "numpy", "__array__",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call *function*; record it if it is the first read by code outside of torch and this package."""
        del types
        name = getattr(function, "__name__", "")
        if name in self.READS and self.first is None:
            module = sys._getframe(1).f_globals.get("__name__", "")  # of the calling code
            if module.partition(".")[0] not in ("torch", "sopdeploy_export"):
                self.first = f"{name} in {module}"
        return function(*args, **(kwargs or {}))


@contextmanager
def preserved(network: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules of *network*, and the lists and dicts in them, at the end."""
    tables = [vars(module) for _, module in modules(network)]
    saved = [(table, dict(table)) for table in tables]
    inside = [inner for table in tables for inner in _containers(table, DEPTH)]
    saved_inside = [(container, container.copy()) for container in inside]
    try:
        yield
    finally:
        for table, before in saved:
            table.clear()
            table.update(before)
        for container, content in saved_inside:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _containers(value: Any, depth: int) -> Iterator[Any]:
    for item in value.values() if isinstance(value, dict) else value:
        if depth and isinstance(item, dict | list | set):
            yield item
            yield from _containers(item, depth - 1)
