"""What every part of a network was given, seen once on probe images: shapes, and tensors to compare on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The first call of one part: its tensors in, its tensor out, and how often it was called in all."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    times: int


def observe(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Call]:
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
