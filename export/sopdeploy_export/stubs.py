"""Stubs in the place of removed parts: the network without these parts runs again, as a second network.

Code of users calls branches in eval mode, too, as deep supervision, self-distillation and early exits do. So
a `Stub` takes the place of a removed part. It answers each call as the part did when the trained network
ran: in the same structure, with tensors full of NaN. The outputs of the network with stubs are finite only
if nothing removed is needed. This is the second evidence; the first one is the graph, because code can hide
a NaN (`torch.where`, `nan_to_num`).

A stub has neither code nor tensors of its part. What it cannot answer is an error, such as a number that the
part holds, or the length of a list.
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
from sopdeploy_export.state import VALUES, modules

# Of the batches that show how sizes depend on the batch; a batch of one is recorded for itself.
SIZES = (2, 3)


@dataclass(frozen=True, slots=True)
class TensorForm:
    """The type and the sizes of a tensor."""

    dtype: torch.dtype
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ObjectForm:
    """An object of a class that holds its values as attributes, which are forms here."""

    kind: type
    attributes: Any


def without_content(returned: Any, part: str) -> Any:
    """Replace the tensors and objects in what *part* returned by their forms.

    Raises `LoweringError` for an object that a stub cannot make.
    """

    def form_of(leaf: Any) -> Any:
        """Return the form of a tensor or an object; a value is its own form."""
        if isinstance(leaf, Tensor):
            return TensorForm(leaf.dtype, tuple(leaf.shape))
        if isinstance(leaf, (*VALUES, Enum)):
            return leaf
        if callable(leaf) or not hasattr(leaf, "__dict__"):
            kind = type(leaf).__name__
            raise LoweringError(f"{part} returns a {kind}, so it cannot be removed; return tensors")
        return ObjectForm(type(leaf), without_content(vars(leaf), part))

    return tree_map(form_of, returned)


class PartCall(NamedTuple):
    """A call of a removed part by code outside of all removed parts.

    `first` and `second` are what it returned for `SIZES`, with forms in place of tensors and objects.
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

        They count as computed from *pixels*, and have their device and, in place of float32, their type;
        types without NaN get 0. Raises `LoweringError` if the part returned something else for other sizes.
        """
        leaves, structure = tree_flatten(self.first)
        others, other_structure = tree_flatten(self.second)
        if structure != other_structure:
            problem = f"another structure for {SIZES[1]} images than for {SIZES[0]}"
            raise LoweringError(f"{self.part} returns {problem}")
        made = [self._make_leaf(*pair, pixels) for pair in zip(leaves, others, strict=True)]
        return tree_unflatten(made, structure)

    def _make_leaf(self, one: Any, other: Any, pixels: Tensor) -> Any:
        """Make a leaf of the answer that had the forms, or values, *one* and *other* for `SIZES`."""
        if isinstance(one, TensorForm) and isinstance(other, TensorForm):
            if (one.dtype, len(one.sizes)) == (other.dtype, len(other.sizes)):
                pairs = zip(one.sizes, other.sizes, strict=True)
                sizes = [_number_for(pixels.shape[0], *pair) for pair in pairs]
                dtype = pixels.dtype if one.dtype == torch.float32 else one.dtype
                return pixels.new_full(sizes, _filler(dtype), dtype=dtype)
        elif isinstance(one, ObjectForm) and isinstance(other, ObjectForm) and one.kind is other.kind:
            made: Any = object.__new__(one.kind)
            vars(made).update(PartCall(self.part, "", one.attributes, other.attributes).make_answer(pixels))
            return made
        elif repr(one) == repr(other):  # NaN equals itself here
            return one
        elif all(isinstance(leaf, int) and not isinstance(leaf, bool | Enum) for leaf in (one, other)):
            return _number_for(pixels.shape[0], one, other)
        raise LoweringError(f"{self.part} returns {one!r} for {SIZES[0]} images and {other!r} for {SIZES[1]}")


def _number_for(batch: Any, first: int, second: int) -> Any:
    """Return the number for *batch* images, which torch.export gives as a symbol, from those for `SIZES`."""
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

    Raises `LoweringError` if the calls depend on the number of images in another way than by sizes.
    """
    calls: list[PartCall] = []
    depth = 0  # of calls of removed parts; only the outermost are calls from outside

    def recorded(part: str, method: str, function: Any) -> Any:
        """Wrap *function*, the *method* of *part*, so that its calls from outside are recorded."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                returned = function(*arguments, **options)
            finally:
                depth -= 1
            if depth == 0:
                form = without_content(returned, part)
                calls.append(PartCall(part, method, form, form))
            return returned

        return call

    for name, module in removed_modules(network, parts).items():
        for method in ("forward", *_own_methods(type(module))):
            vars(module)[method] = recorded(name, method, getattr(module, method))
    runs: list[tuple[PartCall, ...]] = []
    for size in (*SIZES, 1):
        calls.clear()
        network(pixels[:size].clone())  # which the network may write to
        runs.append(tuple(calls))
    first, second, one = runs
    if [call.callee for call in first] != [call.callee for call in second]:
        raise LoweringError(f"the network calls its parts in another way for {SIZES[1]} images")
    pairs = zip(first, second, strict=True)
    several = tuple(call._replace(second=other.second) for call, other in pairs)
    for call in several:
        call.make_answer(pixels)  # raises the error of a call that depends on the size in another way
    return Recording(several, one)


def removed_modules(network: nn.Module, parts: Sequence[str]) -> dict[str, nn.Module]:
    """Map names to the modules in *parts* of *network*, except those that it also has elsewhere."""
    named = dict(modules(network))
    stays = {id(module) for name, module in named.items() if not is_in(name, *parts)}
    return {name: module for name, module in named.items() if id(module) not in stays}


def _own_methods(kind: type) -> list[str]:
    """List the methods that classes of users add to those of `nn.Module` and torch's modules."""
    classes = [cls for cls in kind.__mro__ if not f"{cls.__module__}.".startswith(("torch.", "builtins."))]
    names = {name for cls in classes for name, value in vars(cls).items() if callable(value)}
    return sorted(name for name in names - set(dir(nn.Module)) if not name.startswith("__"))


@dataclass(slots=True)
class _Run:
    """A run of a network on `pixels` (B, 3, H, W); `position` counts the calls of its stubs."""

    pixels: Tensor
    position: int = 0


_run: ContextVar[_Run | None] = ContextVar("_run", default=None)


@contextmanager
def answering(pixels: Tensor) -> Iterator[None]:
    """Let stubs answer for *pixels* (B, 3, H, W), on which the block runs a network once."""
    token = _run.set(_Run(pixels))
    try:
        yield
    finally:
        _run.reset(token)


class ReadError(CertificateError, TypeError):
    """Code read a Python value of the removed *part*, such as how many parts it has.

    It is a `TypeError`, because `list()` ignores one: it asks for the number, but can do without.
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
        """Take the place of the module *removed*, the *part*, in the *recording*; its tensors become NaN."""
        super().__init__()
        calls = (*recording.several, *recording.one)
        held = {**removed._parameters, **removed._buffers}
        vars(self).update(  # not by assignment, for which `nn.Module` has rules
            part=part,
            names_of_removed={*dir(type(removed)), *vars(removed)} - set(dir(nn.Module)),
            methods={call.method for call in calls if call.part == part},
            held={name: without_values(tensor) for name, tensor in held.items() if tensor is not None},
            recording=recording,
        )

    def forward(self, *_arguments: Any, **_options: Any) -> Any:
        """Return what the removed part returned."""
        return self.answer("forward")

    def answer(self, method: str) -> Any:
        """Return the answer of the next call in the recording, which must be one of *method* of this part."""
        run = _run.get()
        if run is None:
            raise CertificateError(f"{self.part} was removed, and is called outside of a run of the network")
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
        """Return True, because the part was there."""
        return True

    def __len__(self) -> int:
        """Raise `ReadError`."""
        raise ReadError("the length of", self.part)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the parts."""
        return iter(self._content().values())

    def __getitem__(self, index: Any) -> Any:
        """Return the part at a position or with a name, or the parts of a slice."""
        content = self._content()
        return content[index] if isinstance(index, str) else list(content.values())[index]

    def _content(self) -> "dict[str, Stub | Tensor]":
        """Map the names of the parts and tensors to them, as they follow each other in a list."""
        return {**self._modules, **vars(self)["held"]}


class StubDict(Stub):
    """What remains of a removed `ModuleDict` or `ParameterDict`."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the parts."""
        return iter(self._content())

    def __contains__(self, name: object) -> bool:
        """Return whether there is a part with this *name*."""
        return name in self._content()

    def keys(self) -> Any:
        """Return the names of the parts."""
        return self._content().keys()

    def values(self) -> Any:
        """Return the parts."""
        return self._content().values()

    def items(self) -> Any:
        """Return the parts with their names."""
        return self._content().items()


def without_values(tensor: Tensor) -> Tensor:
    """Return a tensor of NaN, or of zeros, with the type and shape of *tensor*, in the memory of a number."""
    return torch.full((), _filler(tensor.dtype), dtype=tensor.dtype).expand(tensor.shape)


def _filler(dtype: torch.dtype) -> float:
    """Return NaN, or 0 for a type without it."""
    return torch.nan if dtype.is_floating_point or dtype.is_complex else 0


def stubs_of(removed: Mapping[str, nn.Module], recording: Recording) -> dict[int, Any]:
    """Map the ids of *removed* modules and of their tensors to what takes their place."""
    substitutes: dict[int, Any] = {}
    for name, module in reversed([*removed.items()]):  # parts before what holds them
        kind = StubDict if isinstance(module, nn.ModuleDict | nn.ParameterDict) else Stub
        stub = kind(name, module, recording)
        for child, inner in module._modules.items():
            stub._modules[child] = None if inner is None else substitutes.get(id(inner))
        tensors = {**module._parameters, **module._buffers}
        substitutes |= {id(tensors[held]): value for held, value in vars(stub)["held"].items()}
        substitutes[id(module)] = stub
    return substitutes
