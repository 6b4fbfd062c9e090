"""Counting layer by layer: learnable parameters and multiply-adds of one image.

Conventions: parameters are all learnable tensors (batch norm's affine in, running statistics out);
MACs are the multiply-adds of convolutions and linear layers for one image, without bias. A module that
does less than its layers show (a mixture runs K of N components) counts itself: `CountsItself`.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.layers.isqrt_cov import ISqrtCov

PROBE_BATCH = 2  # a batch of one would hide what depends on the batch
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@runtime_checkable
class CountsItself(Protocol):
    """A module that knows its multiply-adds better than its layers do."""

    def macs(self, features: torch.Size) -> int:
        """Return the multiply-adds of one image of an input of this shape."""


class Counts(StrictModel):
    """Learnable parameters, and multiply-adds of one image."""

    parameters: int
    macs: int


@dataclass
class Tally:
    """Counts by the dotted names of tensors and modules, and what some papers count beside them.

    `norm_outputs` are the values that batch norms give for one image, `root_products` the sum of d^3
    over all covariance roots that compute.
    """

    parameters: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    norm_outputs: int = 0
    root_products: int = 0

    def total(self) -> Counts:
        """Return the counts of the whole network."""
        return Counts(parameters=self.parameters.total(), macs=self.macs.total())

    def by_part(self, split: Collection[str]) -> dict[str, Counts]:
        """Return the counts of each part of the network; parts named in *split* are shown one level down."""
        parts = {part_of(name, split): None for name in self.parameters}
        return {
            part: Counts(
                parameters=sum(n for name, n in self.parameters.items() if part_of(name, split) == part),
                macs=sum(n for name, n in self.macs.items() if part_of(name, split) == part),
            )
            for part in parts
        }


def part_of(name: str, split: Collection[str]) -> str:
    """Return the part that the module or tensor *name* belongs to."""
    first, second, *_ = [*name.split("."), ""]
    return f"{first}.{second}" if first in split else first


def count(network: nn.Module, image_size: int) -> Counts:
    """Return the counts of *network*, which lies on `meta`, in the mode it is in."""
    return tally(network, image_size).total()


def tally(network: nn.Module, image_size: int) -> Tally:
    """Return the counts of *network*, which lies on `meta`, in the mode it is in, name by name."""
    found = Tally(parameters=Counter({name: p.numel() for name, p in network.named_parameters()}))

    def hook(name: str) -> Any:
        return lambda module, inputs, output: note(found, name, module, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    norms = [part for part in network.modules() if isinstance(part, NORMS) and part.training]
    for norm in norms:
        norm.training = False  # of the same shape, and on `meta` statistics take most of the time
    with torch.no_grad():
        network(torch.empty(PROBE_BATCH, 3, image_size, image_size, device="meta"))
    for norm in norms:
        norm.training = True
    for handle in handles:
        handle.remove()
    return found


def note(found: Tally, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Add what *module* did for one image to *found*."""
    if isinstance(module, CountsItself):
        found.macs[name] += module.macs(inputs[0].shape)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
        found.macs[name] += layer_macs(module, output)
    elif isinstance(module, NORMS):
        found.norm_outputs += output[0].numel()
    elif isinstance(module, ISqrtCov):
        found.root_products += module.width**3


def layer_macs(layer: nn.Module, output: Tensor) -> int:
    """Return the multiply-adds of one image in *layer*, from the shape of its output."""
    outputs = output[0].numel()
    if isinstance(layer, nn.Linear):
        return outputs * layer.in_features
    weight = layer.get_parameter("weight")
    return outputs * weight[0].numel()
