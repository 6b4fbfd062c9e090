"""Count learnable parameters and multiply-adds of one image, layer by layer.

Conventions: parameters are all learnable tensors (including batch norm's affine, excluding running
statistics); MACs are the multiply-adds of convolutions and linear layers for one image, without bias. A
mixture counts the K of its N components that it evaluates per image.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Components

PROBE_BATCH = 2  # with one image, counts per batch and per image would be equal
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


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

        def sum_by_part(counts: Counter[str]) -> Counter[str]:
            sums: Counter[str] = Counter()
            for name, number in counts.items():
                path = name.split(".")
                sums[".".join(path[:2] if path[0] in split else path[:1])] += number
            return sums

        parameters, macs = sum_by_part(self.parameters), sum_by_part(self.macs)
        return {part: Counts(parameters=n, macs=macs[part]) for part, n in parameters.items()}


def tally(network: nn.Module, image_size: int) -> Tally:
    """Count parameters and multiply-adds of *network*, on `meta` or the CPU, in its current mode."""
    counts = Tally(parameters=Counter({name: p.numel() for name, p in network.named_parameters()}))
    handles = [
        part.register_forward_hook(partial(_add, counts, name)) for name, part in network.named_modules()
    ]
    norms: list[Any] = [
        part for part in network.modules() if isinstance(part, NORMS) and "forward" not in vars(part)
    ]
    for norm in norms:
        norm.forward = _unchanged  # shapes are enough; the values take most of the time, also on `meta`
    device = next(iter(network.parameters()), torch.empty(0, device="meta")).device
    try:
        with torch.no_grad():
            network(torch.zeros(PROBE_BATCH, 3, image_size, image_size, device=device))
    finally:
        for norm in norms:
            del norm.forward
        for handle in handles:
            handle.remove()
    return counts


def _unchanged(values: Tensor) -> Tensor:
    return values.view_as(values)  # a new tensor, because hooks of callers identify modules by their output


def _add(counts: Tally, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Add to *counts* the operations of *module* for one image."""
    if isinstance(module, Components):
        counts.macs[name] += module.macs(inputs[0].shape)
    elif isinstance(module, nn.Linear):
        counts.macs[name] += output[0].numel() * module.in_features
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        counts.macs[name] += output[0].numel() * module.weight[0].numel()
    elif isinstance(module, NORMS):
        counts.norm_outputs += output[0].numel()
    elif isinstance(module, ISqrtCov):
        counts.root_products += module.width**3
