"""State that a network writes in every run and never reads, such as an attention map that it keeps.

Such an attribute cannot reach an output, because nothing passes from one run to the next. This
is what `check_unread` shows, for attributes that are replaced in every run:

- With an object in its place that raises at any use, the network has the same graph and returns bitwise equal
  logits. So no run needs a value of an earlier one.
- No run calls a function of torch on a tensor that an earlier run left there, or an operator on its memory.
- Whatever else is there, such as a number or the length of a list, is the same after every run.

Code can ask for the type of a value unseen, and for no more: `check_unchanged_by_run` compares
the graph after real runs, too. `prove_repetition` requires the last point in all of its calls.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.deployed import Deployed, generated_images
from sopdeploy_export.capture.program import Capture, capture
from sopdeploy_export.network import modules
from sopdeploy_export.program_hashes import are_equal
from sopdeploy_export.state import DEPTH, NOT_IN_EVAL, VALUES, attributes_restored

_OF_MODULE = frozenset(vars(nn.Module()))  # of every module, such as hooks
_IMAGES = 4
# Methods that Python looks up in the class of an object; those that its creation needs are left
# out.
_CREATION = (
    *(
        "__class__",
        "__class_getitem__",
        "__del__",
        "__delattr__",
        "__getattr__",
        "__getattribute__",
    ),
    *(
        "__init__",
        "__init_subclass__",
        "__new__",
        "__setattr__",
        "__subclasshook__",
        "__torch_function__",
    ),
)
_SPECIAL = {
    name
    for kind in (Tensor, dict, list, str, float, range, nn.Module)
    for name in dir(kind)
    if name.startswith("__") and name not in _CREATION and callable(getattr(kind, name, None))
}


def owning_attribute(path: str, attributes: Iterable[str]) -> str | None:
    """Return which of *attributes* is at *path* of the state, or holds what is there."""
    return next(
        (
            name
            for name in attributes
            if path == name or path.startswith((f"{name}[", f"{name} ("))
        ),
        None,
    )


def written_attributes(network: nn.Module, changed: Iterable[str]) -> tuple[str, ...]:
    """Name the attributes of modules that hold all *changed* paths of the state; () if one is elsewhere."""
    attributes = [
        f"{name}.{attribute}".lstrip(".")
        for name, module in modules(network)
        for attribute in vars(module).keys() - _OF_MODULE
    ]
    owners = [owning_attribute(path, attributes) for path in changed]
    return tuple(dict.fromkeys(filter(None, owners))) if all(owners) else ()


def constant_content(network: nn.Module, names: Iterable[str]) -> list[Any]:
    """Describe what the attributes *names* hold, without the values and sizes of tensors.

    An attribute that does not exist is None. Raises `LoweringError` for an object of another
    kind than tensors, numbers, text and plain containers, because it could hold anything.
    """
    return [_describe(name, _value(network, name), DEPTH) for name in names]


def _value(network: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    module = dict(modules(network)).get(owner)
    return None if module is None else vars(module).get(attribute)


def _describe(name: str, value: Any, depth: int) -> Any:
    if type(value) is Tensor and value.layout == torch.strided and not vars(value):
        return Tensor, value.dtype, value.dim(), value.requires_grad
    if type(value) in VALUES:
        return type(value), repr(value)  # NaN equals itself here
    if depth and type(value) is dict and all(type(key) in VALUES for key in value):
        return dict, [
            (repr(key), _describe(name, item, depth - 1)) for key, item in value.items()
        ]
    if depth and type(value) in (list, tuple):
        return type(value), [_describe(name, item, depth - 1) for item in value]
    raise _changes(name)


def _changes(name: str) -> LoweringError:
    return LoweringError(f"{name} changes while the trained network runs; {NOT_IN_EVAL}")


class _Uses:
    """Records in `found` whether the block uses one of *tensors*: a function of torch, or an operator."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors  # kept, so that no other one gets their memory
        self.found = False
        uses = self
        addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        known = {id(tensor) for tensor in tensors}

        class Functions(TorchFunctionMode):
            def __torch_function__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                uses.found |= any(id(leaf) in known for leaf in tree_leaves((args, kwargs)))
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                operands = [
                    leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
                ]
                uses.found |= any(
                    each.untyped_storage().data_ptr() in addresses for each in operands
                )
                return func(*args, **(kwargs or {}))

        self._modes = Functions(), Operators()  # type: ignore[no-untyped-call]

    def run(self, deployed: Deployed, images: Tensor) -> Tensor:
        """Return the logits of *images*."""
        functions, operators = self._modes
        with torch.no_grad(), functions, operators:
            logits: Tensor = deployed(images)[0]
        return logits


def _poison(uses: list[str]) -> Any:
    """Create an object that raises at any use, which it appends to *uses*; only its type can be read."""

    def refuse(name: str) -> Any:
        def use(*_args: Any, **_kwargs: Any) -> Any:
            uses.append(name)
            raise LoweringError(f"{name} of a value that an earlier run left")

        return use

    def read(poison: Any, attribute: str) -> Any:
        if attribute == "__class__":
            return type(poison)
        return refuse(attribute)()

    special = {name: refuse(name) for name in _SPECIAL}
    special |= {
        "__getattribute__": read,
        "__setattr__": refuse("setattr"),
        "__delattr__": refuse("delattr"),
    }
    return type(
        "Unread",
        (),
        {**special, "__torch_function__": classmethod(refuse("a function of torch"))},
    )()


def check_unread(
    deployed: Deployed,
    names: tuple[str, ...],
    preprocess: Preprocess,
    batch: BatchRange,
    captured: Capture,
) -> None:
    """Check that the network of *deployed*, which has run, never reads what a run left in attributes *names*.

    *captured* are its programs before it ran. Raises `LoweringError` otherwise.
    """
    network = deployed.network
    images = torch.from_numpy(generated_images(preprocess.crop)[-_IMAGES:])
    content = constant_content(network, names)
    expected = images[:0]
    stays = dict.fromkeys(names, True)  # whether the runs change what is in a container
    for run in (images[-1:], images, images[:1]):
        before = {name: _value(network, name) for name in names}
        uses = _Uses(
            [leaf for leaf in tree_leaves(list(before.values())) if isinstance(leaf, Tensor)]
        )
        expected = uses.run(deployed, run)
        stays = {name: stays[name] and _value(network, name) is before[name] for name in names}
        if uses.found or constant_content(network, names) != content:
            raise _changes(names[0])
    used: list[str] = []
    poison = _poison(used)
    owners = dict(modules(network))
    with attributes_restored(network):
        for name in names:
            owner, _, attribute = name.rpartition(".")
            kept = tree_map(lambda _: poison, _value(network, name)) if stays[name] else poison
            vars(owners[owner])[attribute] = kept
        try:
            poisoned = capture(network, preprocess, batch, known=[captured])
            with torch.no_grad():
                logits = deployed(images[:1])[0]
        except Exception as error:  # the network's own code
            raise _changes(names[0]) from error
    if used or not poisoned.computes_values_of(captured) or not are_equal(logits, expected):
        raise _changes(names[0])
