"""The state of a network: its modules, tensors and attributes, and the detection of writes to them.

An exported network must be stateless. torch.export restores the attributes that `forward`
assigns and forgets the assignment, so a graph does not show such a write, and equal values on
probe images do not exclude it. Therefore objects, versions and addresses are compared, not
values.
"""

import gc
import inspect
import random
import sys
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType, GeneratorType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from sopdeploy.errors import LoweringError
from sopdeploy_export.network import modules

STATELESS = "an exported network must be stateless"
NOT_IN_EVAL = f"{STATELESS}: keep values in local variables, or only if self.training"
DEPTH = 4  # levels of nested lists, dicts and sets that are restored
MOST_OBJECTS = 200_000  # that are read; a network with more is refused
VALUES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)
_PLAIN = (dict, list, tuple, deque, OrderedDict)  # these hold nothing but their items
# of libraries whose objects are read
_MODULES = {
    *(
        "argparse",
        "array",
        "builtins",
        "collections",
        "functools",
        "itertools",
        "random",
        "types",
        "_random",
    )
}
FIXED = (type(...), type(NotImplemented), CodeType, FrameType, weakref.ref)


@cache
def is_library(package: str) -> bool:
    """Return whether the top-level *package* is Python's, ours or an installed one, not code of the user.

    A folder of installed packages has their metadata, unless a distribution of Linux installed
    them; packages that are installed in editable mode are elsewhere.
    """
    if package in sys.stdlib_module_names or package in ("sopdeploy", "torch"):
        return True
    module = sys.modules.get(package)
    paths = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    folders = {Path(path).parent for path in paths if isinstance(path, str)}
    return any(
        folder.name == "dist-packages" or next(folder.glob("*.dist-info"), None)
        for folder in folders
    )


def _is_of_library(definition: Any) -> bool:
    """Return whether *definition*, a class or a function, is one of a library."""
    return is_library(str(definition.__module__ or "").partition(".")[0])


@dataclass(frozen=True, slots=True)
class ObjectId:
    """An object, compared by its address, with numbers that a write to it changes, such as a version."""

    value: object = field(compare=False)  # kept, so that no other object gets its address
    address: int
    changed_by_writes: tuple[int, ...] = ()


def read_state(network: nn.Module) -> dict[str, object]:
    """Map the path of every tensor, number and object in the modules of *network* to a comparable form.

    Everything that is reachable from the modules is read: attributes, slots and containers, the
    classes and functions of users with the variables that they use, and the global random
    numbers. Of libraries, only modules and containers are read, not what their functions and
    classes use. Two states differ if anything was assigned, added, removed or written in place
    between them. Raises `LoweringError` if the network holds too many objects.
    """
    numpy_state = tree_leaves(np.random.get_state(legacy=False))  # noqa: NPY002
    state: dict[str, object] = {
        "random": hash(random.getstate()),
        "numpy.random": [
            leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf for leaf in numpy_state
        ],
    }
    owners = list(modules(network))
    seen = {id(module) for _, module in owners}  # each object is read once
    unread: list[tuple[str, Any]] = []
    for name, module in owners:
        prefix = f"{name}." if name else ""
        for attribute, value in vars(module).items():
            if attribute.startswith("_flat_weight") and isinstance(module, nn.RNNBase):
                continue  # torch updates these lists of parameters itself
            if attribute in ("_parameters", "_buffers", "_modules"):
                state |= {f"{prefix}{key}": object_id(item) for key, item in value.items()}
            else:
                unread.append((f"{prefix}{attribute}", value))
        # With class attributes
        unread += [(kind.__name__, kind) for kind in type(module).__mro__]
    while unread:
        path, value = unread.pop()
        content = _comparable_content(value)
        state[path] = object_id(value) if content is None else content
        # A value with content, such as a float, holds nothing else; a user's subclass can have
        # attributes.
        can_hold_more = content is None or not _is_of_library(type(value))
        if can_hold_more and id(value) not in seen:
            seen.add(id(value))
            unread += [(path + suffix, held) for suffix, held in _held_by(value)]
        if len(state) > MOST_OBJECTS:
            raise LoweringError(
                f"{path}: the network holds more than {MOST_OBJECTS:,} objects, as of a data set; remove them"
            )
    return state


def _comparable_content(value: Any) -> Any:
    """Return the content of a plain value, array, random generator or empty container.

    Returns None for other objects, whose identity is compared.
    """
    if isinstance(value, VALUES):
        return type(value), repr(value)  # NaN equals itself here
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    is_empty = type(value) in (*_PLAIN, set) and not value
    return type(value) if is_empty else None


def _held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what *value* holds, with the suffix of each path; of libraries, only modules and containers."""
    if isinstance(value, (Tensor, ModuleType, *FIXED)):
        # a tensor has a version; of a module, only the variables that functions use are read
        return
    if isinstance(value, type | FunctionType):
        if _is_of_library(value):  # then it holds no state of the network
            return
        if isinstance(value, FunctionType):
            yield from _held_by_function(value)
        else:
            yield from (
                (f".{name}", item)
                for name, item in vars(value).items()
                if name != "__weakref__"
            )
        return
    kind = type(value)
    package = str(kind.__module__).partition(".")[0]
    if _is_of_library(kind) and not isinstance(value, nn.Module) and package not in _MODULES:
        return
    held: dict[str, Any] = {}
    with suppress(AttributeError):  # `object` does not call `__getattr__` of the class
        held = object.__getattribute__(value, "__dict__")
    yield from ((f".{name}", item) for name, item in held.items())
    # The dict of attributes can be among the referents.
    yield from (
        (suffix, item) for suffix, item in _items_and_referents(value) if item is not held
    )
    yield f" ({kind.__name__})", kind  # a class of a user has attributes, too


def _items_and_referents(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the items of a container; of other objects than modules, also their state and what they refer to.

    Plain containers have nothing but items. The state is for example the position of an
    iterator.
    """
    if isinstance(value, dict):
        for key, item in dict.items(value):  # subclasses can import or compute what they list
            key_text = (
                repr(key) if isinstance(key, VALUES) else f"{type(key).__name__} {id(key)}"
            )
            yield f"[{key_text}]", item
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    if type(value) in _PLAIN or isinstance(value, nn.Module):  # a module holds attributes only
        return
    if isinstance(value, GeneratorType):
        # None: it has ended
        yield (
            " (state)",
            value.gi_frame.f_lasti if value.gi_frame else None,
        )
    elif type(value).__module__ in _MODULES:
        yield " (state)", _describe_state(value)
    # Slots, and what iterators, methods and subclasses of containers hold, are known to `gc`
    # only.
    yield from ((f" ({index})", item) for index, item in enumerate(gc.get_referents(value)))


def _describe_state(value: Any) -> str:
    """Describe the position of an iterator such as `itertools.count`, or the items of a set or an array."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python deprecates the copies of some iterators
            # What `pickle` would store, such as "(<class 'itertools.count'>, (3,))" before
            # number 3.
            return str(value.__reduce_ex__(4))
    except Exception:  # not every object can be reduced
        return object.__repr__(value)


def _held_by_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield attributes and defaults of *function*, and the enclosing, global and module variables it uses."""
    names: set[str] = set()  # of global variables and attributes
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += filter(inspect.iscode, code.co_consts)  # the functions that are defined inside
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        yield f" uses {name}", value
        if isinstance(value, ModuleType) and not is_library(value.__name__.partition(".")[0]):
            yield from (
                (f" uses {name}.{key}", vars(value)[key]) for key in names & vars(value).keys()
            )
    for name, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        with suppress(ValueError):  # not set yet
            yield f".{name}", cell.cell_contents
    named = {**vars(function), **(function.__kwdefaults__ or {})}
    yield from ((f".{key}", item) for key, item in named.items())
    yield " (defaults)", function.__defaults__


def object_id(value: object) -> ObjectId:
    """Identify *value*; writes change the version and the memory of a tensor, and the length of a set."""
    # Sparse tensors, and those of torch.export's tracing, whose types are others, have no
    # address of memory.
    if (
        type(value) in (Tensor, nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
    ):
        # Inference tensors have no version
        version = -1 if value.is_inference() else value._version
        return ObjectId(value, id(value), (version, value.data_ptr()))
    return ObjectId(value, id(value), (len(value),) if isinstance(value, set) else ())


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths that were added, removed or changed."""
    return (path for path in {**before, **after} if before.get(path) != after.get(path))


def first_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Name the first path that was added, removed or changed."""
    return next(changes(before, after), None)


def held_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Map the path of every tensor in the state of *network*, also outside of its parameters and buffers."""
    leaves = (
        (path, leaf.value)
        for path, leaf in read_state(network).items()
        if isinstance(leaf, ObjectId)
    )
    return {path: value for path, value in leaves if isinstance(value, Tensor)}


class InPlaceWrites(TorchDispatchMode):
    """Record the paths of tensors that operations write to; `tensor.data` hides this from versions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: list[str] = []
        held = held_tensors(network).items()
        self._paths = {tensor.untyped_storage().data_ptr(): path for path, tensor in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation; record the paths of the tensors that its schema declares as written."""
        del types
        declared = func._schema.arguments
        values = dict(zip((argument.name for argument in declared), args, strict=False)) | (
            kwargs or {}
        )
        written = [values.get(argument.name) for argument in declared if argument.is_write]
        leaves = tree_leaves(written)  # an argument can be a list of tensors
        addresses = [
            leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)
        ]
        self.written += [
            self._paths[address] for address in addresses if address in self._paths
        ]
        return func(*args, **(kwargs or {}))


class PythonNumbers:
    """Tensors that code makes of Python numbers, such as a deviation per channel, and comparisons of them.

    Code may read them, as `normalize` of torchvision does: they are the same for all images.
    They are unknown from the first other call on one of them, which can write to its memory or
    share it.
    """

    MAKERS = (torch.tensor, torch.as_tensor)
    FUNCTIONS = frozenset({
        "__bool__", "__eq__", "__float__", "__ge__", "__gt__", "__int__", "__le__", "__lt__", "__ne__", "all",
        "any", "eq", "ge", "gt", "item", "le", "lt", "ne",
    })  # fmt: skip

    def __init__(self) -> None:
        # Also of tensors that torch.export gives no values
        self._values = WeakIdKeyDictionary()

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Compute a call on known tensors, or one that makes a tensor of Python numbers.

        Returns the value, which the caller passes to `remember`, so that the result of the call
        is a known tensor; None for any other call, which makes all tensors unknown if it has a
        known one as operand.
        """
        if not len(self._values) and function not in self.MAKERS:  # most calls
            return None
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        are_known = [operand in self._values for operand in operands]
        if operands:
            computes = all(are_known) and getattr(function, "__name__", "") in self.FUNCTIONS
        else:
            # Without an array, whose memory the tensor can share
            numbers = tree_leaves(args[:1])
            are_numbers = bool(numbers) and all(
                isinstance(number, int | float) for number in numbers
            )
            computes = function in self.MAKERS and are_numbers
        if not computes:
            if any(are_known):
                self._values = WeakIdKeyDictionary()
            return None
        args, kwargs = tree_map_only(Tensor, self._values.__getitem__, (args, kwargs))
        with _disable_current_modes():
            return function(*args, **kwargs)

    def remember(self, result: Any, value: Any) -> None:
        """Remember *value*, if it is a tensor: `compute` returned it for the call with *result*."""
        if isinstance(value, Tensor):
            self._values[result] = value


class PythonReads(TorchFunctionMode):
    """Record the first Python code that reads the layout or the values of a tensor: no graph contains this.

    A call on tensors is a read if it returns anything else, unless it is known to return what a
    graph fixes, or if it gives values to a callback. torch.export raises an error where code
    reads values, but the code can catch it.
    """

    FIXED_BY_GRAPH = frozenset({
        "__get__", "__hash__", "__iter__", "__len__", "__set__", "__setitem__", "dim", "element_size",
        "get_device", "is_complex", "is_conj", "is_floating_point", "is_inference", "is_neg",
        "is_same_size", "is_signed", "ndimension", "nelement", "numel", "requires_grad_", "result_type",
        "size", "type",
    })  # fmt: skip
    CALLBACKS = frozenset({"apply_", "map_", "map2_"})

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None
        self._numbers = PythonNumbers()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call *function*; record it if it is the first read by code outside of torch.nn and this package."""
        del types
        known_value = self._numbers.compute(function, args, kwargs or {})
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        self._numbers.remember(result, known_value)
        returns_data = not all(
            isinstance(leaf, Tensor | NoneType) for leaf in tree_leaves(result)
        )
        is_read = (returns_data and name not in self.FIXED_BY_GRAPH) or name in self.CALLBACKS
        # `record_function`, for example, has no operands that are tensors.
        reads_tensor = is_read and any(
            isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))
        )
        if self.first is None and reads_tensor and known_value is None:
            module = _calling_module()
            if module.partition(".")[0] != "sopdeploy_export" and not module.startswith(
                "torch.nn."
            ):
                self.first = f"{name} in {module}"
        return result


@contextmanager
def recording_calls(record: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Pass the calls of the block to *record*, as `sys.setprofile` does, instead of to an active profiler."""
    previous: Any = sys.getprofile()
    sys.setprofile(record)
    try:
        yield
    finally:
        if callable(previous) or previous is None:
            sys.setprofile(previous)
        else:  # cProfile's object, which is no function
            sys.setprofile(None)
            previous.enable()


def _calling_module() -> str:
    """Return the name of the module that called a function of torch; "" if there is none.

    The frames of torch's own functions in between are skipped.
    """
    frame: FrameType | None = sys._getframe(2)  # 1 is `__torch_function__`
    while frame is not None:
        module: str = frame.f_globals.get("__name__", "")
        if module not in ("torch.overrides", "torch._tensor", "torch.utils._contextlib"):
            return module
        frame = frame.f_back
    return ""


@contextmanager
def attributes_restored(network: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules of *network*, and the containers in them, at the end."""
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
            # of a dict or a set
            fill = container.extend if isinstance(container, list) else container.update
            fill(content)


def _nested_containers(container: Any, depth: int) -> Iterator[Any]:
    """Yield the dicts, lists and sets in *container*, down to *depth* levels."""
    for item in container.values() if isinstance(container, dict) else container:
        if depth and isinstance(item, dict | list | set):
            yield item
            yield from _nested_containers(item, depth - 1)
