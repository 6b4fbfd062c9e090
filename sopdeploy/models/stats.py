"""Count learnable parameters and multiply-adds of one image, layer by layer.

Conventions: parameters are all learnable tensors (including batch norm's affine, excluding running
statistics); MACs are the multiply-adds of convolutions and linear layers for one image, without bias. A
module that computes less than its layers show (a mixture evaluates K of N components) implements
`CountsItself`.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.layers.isqrt_cov import ISqrtCov

PROBE_BATCH = 2  # a batch of one would hide dependence on the batch
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@runtime_checkable
class CountsItself(Protocol):
    """A module that computes its own multiply-adds."""

    def macs(self, features: torch.Size) -> int:
        """Return the multiply-adds of one image of an input of this shape."""


class Counts(StrictModel):
    """Learnable parameters, and multiply-adds of one image."""

    parameters: int
    macs: int


@dataclass
class Tally:
    """Counts by the dotted names of tensors and modules, and quantities that some papers add.

    `norm_outputs` is the number of values that batch norms compute for one image, `root_products` the sum of
    d^3 over all covariance roots.
    """

    parameters: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    norm_outputs: int = 0
    root_products: int = 0

    def total(self) -> Counts:
        """Sum the counts of the whole network."""
        return Counts(parameters=self.parameters.total(), macs=self.macs.total())

    def by_part(self, split: Collection[str]) -> dict[str, Counts]:
        """Sum the counts of each child; children named in *split* are divided into their own children."""

        def part(name: str) -> str:
            first, second, *_ = [*name.split("."), ""]
            return f"{first}.{second}" if first in split else first

        return {
            found: Counts(
                parameters=sum(n for name, n in self.parameters.items() if part(name) == found),
                macs=sum(n for name, n in self.macs.items() if part(name) == found),
            )
            for found in dict.fromkeys(map(part, self.parameters))
        }


def count(network: nn.Module, image_size: int) -> Counts:
    """Count the parameters and multiply-adds of *network*, which is on `meta`, in its current mode."""
    return tally(network, image_size).total()


def tally(network: nn.Module, image_size: int) -> Tally:
    """Count *network*, which is on `meta`, in its current mode, by the names of its parts."""
    found = Tally(parameters=Counter({name: p.numel() for name, p in network.named_parameters()}))

    def hook(name: str) -> Any:
        return lambda module, inputs, output: _add(found, name, module, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    norms = [part for part in network.modules() if isinstance(part, NORMS) and part.training]
    for norm in norms:
        norm.training = False  # same shapes; batch statistics on `meta` take most of the time
    with torch.no_grad():
        network(torch.empty(PROBE_BATCH, 3, image_size, image_size, device="meta"))
    for norm in norms:
        norm.training = True
    for handle in handles:
        handle.remove()
    return found


def _add(found: Tally, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Add to *found* the operations of *module* for one image."""
    if isinstance(module, CountsItself):
        found.macs[name] += module.macs(inputs[0].shape)
    elif isinstance(module, nn.Linear):
        found.macs[name] += output[0].numel() * module.in_features
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        found.macs[name] += output[0].numel() * module.weight[0].numel()
    elif isinstance(module, NORMS):
        found.norm_outputs += output[0].numel()
    elif isinstance(module, ISqrtCov):
        found.root_products += module.width**3
