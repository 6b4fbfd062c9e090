"""The proof of a rewrite by numbers: what replaces a part must give its numbers in float64.

A rule's algebra says that two forms are one function; this says that the code of both is. float64 leaves
1e-13 of rounding, so a wrong number of iterations, a shifted index or a scale applied twice stands out by
orders of magnitude. Inputs are those of the probe images, and random ones of the same shapes: real
covariances are symmetric, and a transposed one would hide an error of layout.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError

TOLERANCE = 1e-9  # of the largest value; two correct forms differ by 1e-15 to 1e-12

Build = Callable[[Any], nn.Module]


def prove(rule: str, where: str, before: nn.Module, build: Build, inputs: tuple[Tensor, ...]) -> None:
    """Raise `LoweringError` unless ``build(before)`` computes what *before* computes, in float64."""
    exact = copy.deepcopy(before).double().eval()
    rebuilt = build(copy.deepcopy(exact)).eval()
    with torch.no_grad():
        for given in (tuple(value.double() for value in inputs), other_inputs(inputs)):
            expected, found = exact(*given), rebuilt(*given)
            if found.shape != expected.shape:
                shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
                raise LoweringError(f"rule {rule!r} at {where}: gives shape {shapes}; nothing was written")
            scale = max(float(expected.abs().max()), torch.finfo(torch.float64).tiny)
            difference = float((found - expected).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise LoweringError(
                    f"rule {rule!r} at {where}: changes the answer by {difference:.2g} of its largest value "
                    "in float64; nothing was written (--no-lowering leaves the rules out)"
                )


def other_inputs(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return random maps of the same shapes, rectified; vectors keep their numbers, in another order."""
    generator = torch.Generator().manual_seed(0)
    others = []
    for value in inputs:
        if value.ndim == 2:
            others.append(value.double().roll(1, dims=1))
        else:
            random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            others.append(random.relu())
    return tuple(others)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The first call of one part: its tensors in, its tensor out, and how often it was called in all."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    times: int


def record_activations(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Call]:
    """Return the calls of all named parts of *network* that take and give tensors, by name."""
    calls: dict[str, Call] = {}
    handles = [
        part.register_forward_hook(recorder(name, calls)) for name, part in network.named_modules() if name
    ]
    try:
        with torch.no_grad():
            network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def recorder(name: str, calls: dict[str, Call]) -> Any:
    """Return the hook that writes down the calls of the part *name*."""

    def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not all(isinstance(value, Tensor) for value in inputs):
            return
        if name in calls:
            first = calls[name]
            calls[name] = Call(inputs=first.inputs, output=first.output, times=first.times + 1)
        else:
            calls[name] = Call(inputs=tuple(inputs), output=output, times=1)

    return record


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Say whether both are one tensor in memory, dropout in eval mode or flattening between them."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
