"""Sums over the processes that train one network together, through which gradients pass.

The gradient of a sum over ranks is again a sum over ranks: each rank's number is part of what every rank
computes from the sum. With a plain `all_reduce` the value is right and the gradient too small.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of every rank's *x*; the gradient is summed over the ranks as well.

    Every rank must ask for the same sums in the same order.
    """
    if ranks() == 1:
        return x
    summed: Tensor = SumOverRanks.apply(x)
    return summed


class SumOverRanks(torch.autograd.Function):
    """All-reduce that gradients pass, of any order."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        """Return the sum over ranks."""
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the sum over ranks of what each wants changed."""
        return sum_over_ranks(gradients[0])
