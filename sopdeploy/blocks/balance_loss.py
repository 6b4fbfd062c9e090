"""The balance loss: keeps a gate from sending every image to the same few components.

Paper: Wang et al., GM-SOP (NeurIPS 2018), Eq. (4): L = alpha (std(v) / mean(v))^2, where v_i is the sum
of the batch's weights of component i. Letters: B images, N components, K of them kept per image.

The deviation is the unbiased one (over N - 1), as in the released code. When all images weigh the
same K components alike, the loss is alpha N / (N - 1) (N / K - 1), 106.7 for the paper's 16, 8 and
alpha = 100; that is its value on a single image as well, so tiny batches say nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def balance_loss(weights_BN: Tensor, alpha: float) -> Tensor:
    """Return alpha / S times (std / mean)^2 of the summed weights of all S images of the step.

    The sum runs over all ranks where `torch.distributed` is initialised, so that the loss does not
    depend on how a batch is spread. alpha is divided by S because the released trainer sums the
    cross entropy over the batch and then divides every gradient by its size: beside a mean cross
    entropy Eq. (4) weighs alpha / S, 0.39 for the paper's 100 and 256.
    """
    load_N = sum_over_ranks(weights_BN.sum(dim=0))
    images = weights_BN.shape[0] * ranks()
    return alpha / images * (load_N.var(correction=1) / load_N.mean().square())


def ranks() -> int:
    """Return the number of processes that train together; they hold equal batches."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of every rank's *x*; the gradient is summed over the ranks as well.

    Data-parallel training averages gradients over ranks, so the network learns from one such loss.
    """
    if ranks() == 1:
        return x
    summed: Tensor = SumOverRanks.apply(x)
    return summed


class SumOverRanks(torch.autograd.Function):
    """All-reduce that gradients pass."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        """Return the sum over ranks."""
        summed = x.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the sum over ranks of what each wants changed."""
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed
