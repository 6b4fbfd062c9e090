"""Stubs in the place of removed parts: the network without these parts runs again, as a second network.

Code of users calls branches in eval mode, too, as deep supervision, self-distillation and early
exits do. So a `Stub` takes the place of a removed part. It answers each call as the part did
when the trained network ran: in the same structure, with tensors full of NaN, and with NaN for
a float. The outputs of the network with stubs are finite only if nothing removed is needed.
This is the second evidence; the first one is the graph, because code can hide a NaN
(`torch.where`, `nan_to_num`).

A stub has neither code nor tensors of its part. What it cannot answer is an error, such as a
number that the part holds, or the length of a list.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sopdeploy.errors import CertificateError, LoweringError
from sopdeploy.models.base import is_in
from sopdeploy_export.network import modules
from sopdeploy_export.state import VALUES

# Of the batches that show how sizes depend on the batch; a batch of one is recorded for itself.
SIZES = (2, 3)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The type and the sizes of a tensor."""

    dtype: torch.dtype
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """An object of a class that holds its values as attributes, which are specs here."""

    kind: type
    attributes: Any


def to_specs(returned: Any, part: str) -> Any:
    """Replace the tensors and objects in what *part* returned by their specs; values stay.

    Raises `LoweringError` for an object that a stub cannot make.
    """

    def to_spec(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return TensorSpec(leaf.dtype, tuple(leaf.shape))
        if isinstance(leaf, (*VALUES, Enum)):
            return leaf
        try:
            object.__new__(type(leaf))  # a `TypeError` for subclasses of dict and others
            has_attributes_only = hasattr(leaf, "__dict__") and not callable(leaf)
        except TypeError:
            has_attributes_only = False
        if not has_attributes_only:
            kind = type(leaf).__name__
            raise LoweringError(
                f"{part} returns a {kind}, so it cannot be removed; return tensors"
            )
        return ObjectSpec(type(leaf), to_specs(vars(leaf), part))

    return tree_map(to_spec, returned)


class PartCall(NamedTuple):
    """A call of a removed part by code outside of all removed parts.

    `first` and `second` are what it returned for `SIZES`, with specs in place of tensors and
    objects.
    """

    part: str
    method: str
    first: Any
    second: Any

    @property
    def callee(self) -> tuple[str, str]:
        """The part and its method."""
        return self.part, self.method

    def make_answer(self, pixels: Tensor) -> Any:
        """Make what the part returns for *pixels* (B, 3, H, W), with tensors full of NaN.

        They count as computed from *pixels*, and have their device and, in place of float32,
        their type; types without NaN get 0. Raises `LoweringError` if the part returned
        something else for other sizes.
        """
        leaves, structure = tree_flatten(self.first)
        others, other_structure = tree_flatten(self.second)
        if structure != other_structure:
            problem = f"another structure for {SIZES[1]} images than for {SIZES[0]}"
            raise LoweringError(f"{self.part} returns {problem}")
        made = [self._make_leaf(*pair, pixels) for pair in zip(leaves, others, strict=True)]
        return tree_unflatten(made, structure)

    def _make_leaf(self, first: Any, second: Any, pixels: Tensor) -> Any:
        """Make a leaf of the answer for *pixels*; it had the specs, or values, *first* and *second*."""
        batch = pixels.shape[0]
        if isinstance(first, TensorSpec) and isinstance(second, TensorSpec):
            if (first.dtype, len(first.sizes)) == (second.dtype, len(second.sizes)):
                pairs = zip(first.sizes, second.sizes, strict=True)
                sizes = [_extrapolate(batch, *pair) for pair in pairs]
                dtype = pixels.dtype if first.dtype == torch.float32 else first.dtype
                return pixels.new_full(sizes, _filler(dtype), dtype=dtype)
        elif (
            isinstance(first, ObjectSpec)
            and isinstance(second, ObjectSpec)
            and first.kind is second.kind
        ):
            made: Any = object.__new__(first.kind)
            of_attributes = PartCall(self.part, "", first.attributes, second.attributes)
            vars(made).update(of_attributes.make_answer(pixels))
            return made
        elif all(
            isinstance(leaf, float) and not isinstance(leaf, Enum) for leaf in (first, second)
        ):
            return torch.nan  # as the values of tensors; an integer can be a size
        elif repr(first) == repr(second):
            return first
        elif all(
            isinstance(leaf, int) and not isinstance(leaf, bool | Enum)
            for leaf in (first, second)
        ):
            return _extrapolate(batch, first, second)
        raise LoweringError(
            f"{self.part} returns {first!r} for {SIZES[0]} images and {second!r} for {SIZES[1]}"
        )


def _extrapolate(batch: Any, first: int, second: int) -> Any:
    """Compute the number for *batch* images, a symbol in torch.export, linearly from those for `SIZES`."""
    per_image = (second - first) // (SIZES[1] - SIZES[0])
    constant = first - per_image * SIZES[0]
    if per_image == 0:
        return constant
    if (per_image, constant) == (1, 0):
        return batch  # itself, without arithmetic on the symbol
    return per_image * batch + constant


class Recording(NamedTuple):
    """The calls of removed parts, in order, when the trained network ran on several images and on one."""

    several: tuple[PartCall, ...]
    one: tuple[PartCall, ...]


@torch.no_grad()
def record_calls(network: nn.Module, parts: Sequence[str], pixels: Tensor) -> Recording:
    """Run *network*, a copy that is changed, on *pixels* (3, 3, H, W), and record the calls of its *parts*.

    Raises `LoweringError` if the calls depend on the number of images in another way than by
    sizes.
    """
    calls: list[PartCall] = []
    depth = 0  # of calls of removed parts; only the outermost are calls from outside

    def with_recording(part: str, method: str, function: Any) -> Any:
        """Wrap *function*, the *method* of *part*, so that its calls from outside are added to `calls`."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                returned = function(*arguments, **options)
            finally:
                depth -= 1
            if depth == 0:
                specs = to_specs(returned, part)
                calls.append(PartCall(part, method, first=specs, second=specs))
            return returned

        return call

    for name, module in removed_modules(network, parts).items():
        for method in ("forward", *_methods_of_user(type(module))):
            vars(module)[method] = with_recording(name, method, getattr(module, method))
    calls_by_size: dict[int, tuple[PartCall, ...]] = {}
    for size in (*SIZES, 1):
        calls.clear()
        network(pixels[:size].clone())  # which the network may write to
        calls_by_size[size] = tuple(calls)
    for_first, for_second = (calls_by_size[size] for size in SIZES)
    if [call.callee for call in for_first] != [call.callee for call in for_second]:
        raise LoweringError(f"the network calls its parts in another way for {SIZES[1]} images")
    pairs = zip(for_first, for_second, strict=True)
    several = tuple(call._replace(second=other.second) for call, other in pairs)
    for call in several:
        # Raises the error of a call that depends on the size in another way
        call.make_answer(pixels)
    return Recording(several, one=calls_by_size[1])


def removed_modules(network: nn.Module, parts: Sequence[str]) -> dict[str, nn.Module]:
    """Map names to the modules in *parts* of *network*, except those that it also has elsewhere."""
    named = dict(modules(network))
    stays = {id(module) for name, module in named.items() if not is_in(name, *parts)}
    return {name: module for name, module in named.items() if id(module) not in stays}


def _methods_of_user(kind: type) -> list[str]:
    """List the methods that classes of users add to those of `nn.Module` and torch's modules."""
    classes = [
        cls
        for cls in kind.__mro__
        if not f"{cls.__module__}.".startswith(("torch.", "builtins."))
    ]
    names = {name for cls in classes for name, value in vars(cls).items() if callable(value)}
    return sorted(name for name in names - set(dir(nn.Module)) if not name.startswith("__"))


@dataclass(slots=True)
class _Run:
    """A run of a network on `pixels` (B, 3, H, W); `position` counts the calls of its stubs."""

    pixels: Tensor
    position: int = 0


_run: ContextVar[_Run | None] = ContextVar("_run", default=None)


@contextmanager
def stubs_answer(pixels: Tensor) -> Iterator[None]:
    """Let stubs answer for *pixels* (B, 3, H, W), on which the block runs a network once."""
    token = _run.set(_Run(pixels))
    try:
        yield
    finally:
        _run.reset(token)


class ReadError(CertificateError, TypeError):
    """Code read a Python value of the removed *part*, such as how many parts it has.

    It is a `TypeError`, because `list()` ignores one: it asks for the number, but can do
    without.
    """

    def __init__(self, value: str, part: str) -> None:
        super().__init__(
            f"the network reads {value} {part}, which was removed; remove what is in it only",
            remedies={"training_only": f"{part}.*"},
        )
        self.part = part


class Stub(nn.Module):
    """What remains of a removed part; its own parts are stubs.

    Attributes:
        part: Dotted name of the removed part.
        names_of_removed: The names of the attributes and methods of the removed part.
        methods: The names of its methods that the recording has.
        held: Its tensors, full of NaN.
        recording: The calls that all stubs of the network answer.
    """

    def __init__(self, part: str, removed: nn.Module, recording: Recording) -> None:
        """Take the place of the module *removed*: answer the calls of *part* in *recording*.

        The stub holds tensors of NaN in place of those of *removed*.
        """
        super().__init__()
        calls = (*recording.several, *recording.one)
        held = {**removed._parameters, **removed._buffers}
        # Not by assignment, for which `nn.Module` has rules
        vars(self).update(
            part=part,
            names_of_removed={*dir(type(removed)), *vars(removed)} - set(dir(nn.Module)),
            methods={call.method for call in calls if call.part == part},
            held={
                name: full_of_nan(tensor) for name, tensor in held.items() if tensor is not None
            },
            recording=recording,
        )

    def forward(self, *_arguments: Any, **_options: Any) -> Any:
        """Return what the removed part returned."""
        return self.answer("forward")

    def answer(self, method: str) -> Any:
        """Return the answer of the next call in the recording, which must be one of *method* of this part."""
        run = _run.get()
        if run is None:
            raise CertificateError(
                f"{self.part} was removed, and is called outside of a run of the network"
            )
        batch = run.pixels.shape[0]
        is_one = isinstance(batch, int) and batch == 1
        calls = self.recording.one if is_one else self.recording.several
        call = calls[run.position] if run.position < len(calls) else None
        if call is None or call.callee != (self.part, method):
            raise CertificateError(
                f"without its values, the network calls {self.part} in another order than the trained network"
            )
        run.position += 1
        return call.make_answer(run.pixels)

    def __getattr__(self, name: str) -> Any:
        """Return a part, a tensor or a method that was recorded.

        Raises `ReadError` for any other attribute of the removed part.
        """
        own = vars(self)  # `get`: `copy` and `pickle` ask for attributes before `__init__`
        if name in own.get("held", ()):
            return own["held"][name]
        if name in own.get("methods", ()):
            return lambda *_arguments, **_options: self.answer(name)
        is_of_removed = name in own.get("names_of_removed", ()) and not name.startswith("__")
        if is_of_removed and name not in own["_modules"]:
            raise ReadError(f"{name} of", self.part)
        return super().__getattr__(name)

    def __bool__(self) -> bool:
        return True  # because the part was there

    def __len__(self) -> int:
        raise ReadError("the length of", self.part)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the parts."""
        return iter(self._parts().values())

    def __getitem__(self, index: Any) -> Any:
        """Return the part at a position or with a name, or the parts of a slice."""
        parts = self._parts()
        return parts[index] if isinstance(index, str) else list(parts.values())[index]

    def _parts(self) -> "dict[str, Stub | Tensor]":
        """Map the names of the parts and tensors to them, as they follow each other in a list."""
        return {**self._modules, **vars(self)["held"]}


class StubSequential(Stub):
    """What remains of a removed `Sequential`: only modules have positions, and a slice can be called."""

    def __getitem__(self, index: Any) -> Any:
        """Return the part at a position, or the parts of a slice as a module."""
        chosen = super().__getitem__(index)
        return nn.Sequential(*chosen) if isinstance(index, slice) else chosen

    def _parts(self) -> "dict[str, Stub | Tensor]":
        return vars(self)["_modules"]


class StubDict(Stub):
    """What remains of a removed `ModuleDict` or `ParameterDict`."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the parts."""
        return iter(self._parts())

    def __contains__(self, name: object) -> bool:
        """Return whether there is a part with this *name*."""
        return name in self._parts()

    def keys(self) -> Any:
        """Return the names of the parts."""
        return self._parts().keys()

    def values(self) -> Any:
        """Return the parts."""
        return self._parts().values()

    def items(self) -> Any:
        """Return the parts with their names."""
        return self._parts().items()


def full_of_nan(tensor: Tensor) -> Tensor:
    """Return a tensor of NaN, or of zeros, with the type and shape of *tensor*, in the memory of a number."""
    return torch.full((), _filler(tensor.dtype), dtype=tensor.dtype).expand(tensor.shape)


def _filler(dtype: torch.dtype) -> float:
    """Return NaN, or 0 for a type without it."""
    return torch.nan if dtype.is_floating_point or dtype.is_complex else 0


def make_stubs(removed: Mapping[str, nn.Module], recording: Recording) -> dict[int, Any]:
    """Map the ids of *removed* modules to stubs, and those of their tensors to tensors of NaN."""
    substitutes: dict[int, Any] = {}
    for name, module in reversed([*removed.items()]):  # parts before what holds them
        kind = StubDict if isinstance(module, nn.ModuleDict | nn.ParameterDict) else Stub
        if isinstance(module, nn.Sequential):
            kind = StubSequential
        stub = kind(name, module, recording)
        for child, inner in module._modules.items():
            stub._modules[child] = None if inner is None else substitutes.get(id(inner))
        tensors = {**module._parameters, **module._buffers}
        substitutes |= {id(tensors[held]): value for held, value in vars(stub)["held"].items()}
        substitutes[id(module)] = stub
    return substitutes
