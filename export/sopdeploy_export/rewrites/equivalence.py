"""Numerical proof that a replacement computes what the original computes.

The algebra of a rule shows that two forms are the same function; this check shows that their code is.
Correct forms differ by about 1e-13 in float64, so a wrong number of iterations, a shifted index or a scale
that is applied twice stands out by orders of magnitude. Inputs are the activations of the probe images, and
random ones of the same
shapes: real covariances are symmetric and would hide a transposed layout.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError

TOLERANCE = 1e-9  # relative to the largest value; correct forms differ by 1e-15 to 1e-12

Build = Callable[[Any], nn.Module]


def assert_equivalent(
    rule: str, where: str, before: nn.Module, build: Build, inputs: tuple[Tensor, ...]
) -> None:
    """Raise `LoweringError` unless ``build(before)`` equals *before* in float64.

    Args:
        rule: Name of the rewrite rule, for the message.
        where: Name of the part in the network, for the message.
        before: The original part.
        build: Builds the replacement from a copy of the original.
        inputs: Activations of the original; matrices (B, N) are gate weights or vectors, others are maps.
    """
    original = copy.deepcopy(before).double().eval()
    replacement = build(copy.deepcopy(original)).eval()
    generator = torch.Generator().manual_seed(0)
    observed = tuple(value.double() for value in inputs)
    synthetic = tuple(  # a random map; gate weights keep their values, in a different order
        value.roll(1, dims=1)
        if value.ndim == 2
        else torch.randn(value.shape, generator=generator, dtype=torch.float64).relu()
        for value in observed
    )
    with torch.no_grad():
        for given in (observed, synthetic):
            expected, found = original(*given), replacement(*given)
            if found.shape != expected.shape:
                shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
                raise LoweringError(f"rule {rule!r} at {where}: outputs shape {shapes}; nothing was written")
            scale = max(float(expected.abs().max()), torch.finfo(torch.float64).tiny)
            difference = float((found - expected).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise LoweringError(
                    f"rule {rule!r} at {where}: changes the output by {difference:.2g} of its largest value "
                    "in float64; nothing was written (--no-lowering exports without rewrite rules)"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """Inputs and output of the first call of one part, and the number of calls."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    times: int


def record_activations(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Activation]:
    """Run *network* and record each named part whose inputs and output are tensors."""
    activations: dict[str, Activation] = {}

    def record(name: str, _: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and all(isinstance(value, Tensor) for value in given):
            first = activations.get(name, Activation(inputs=tuple(given), output=output, times=0))
            activations[name] = Activation(inputs=first.inputs, output=first.output, times=first.times + 1)

    handles = [
        part.register_forward_hook(partial(record, name)) for name, part in network.named_modules() if name
    ]
    try:
        with torch.no_grad():
            network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return activations
