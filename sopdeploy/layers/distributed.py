"""Batch norms for training on several processes, and sums over them.

torch's SyncBatchNorm does not run on CPUs and needs a process group even for one process. Here the mean and
then the squared deviations from it are summed over ranks, which avoids cancellation, and autograd
differentiates both sums. In eval mode all batch norms here equal the ordinary one.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.errors import ConfigError
from sopdeploy.layers.covariance import at_least_float32, without_autocast


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum *x* over all ranks; the gradient is summed over the ranks as well.

    Every rank must call this in the same order.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    summed: Tensor = _SumOverRanks.apply(x)
    return summed


class _SumOverRanks(torch.autograd.Function):
    """All-reduce that is differentiable any number of times."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


class Replacement(_BatchNorm):
    """Base class of batch norms that replace another one, with its parameters, buffers and children.

    timm's batch norms have the children `drop` and `act`, a dropout and an activation, which run after the
    norm in this order.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        children = dict(norm.named_children())
        if norm.running_mean is None or children.keys() - {"drop", "act"}:
            raise ConfigError(
                f"batch_norm: {type(norm).__name__} cannot be made global or frozen; use batch_norm=local"
            )
        self.affine, self.track_running_stats = norm.affine, True
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in children.items():
            self.add_module(name, child)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...) *x*, then apply the children."""
        y = self.normalized(x)
        for child in self.children():
            y = child(y)
        return y

    def normalized(self, x: Tensor) -> Tensor:
        """Normalize *x* by the running statistics."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class FrozenBatchNorm(Replacement):
    """Batch norm that uses the running statistics in training too; weight and bias are trained."""


class GlobalBatchNorm(Replacement):
    """Batch norm over the batch of all ranks; the running variance divides by n - 1 for this whole batch."""

    def normalized(self, x: Tensor) -> Tensor:
        """Normalize *x* by the statistics of all ranks in train mode, else by the running statistics."""
        if not self.training:
            return super().normalized(x)
        with without_autocast(x):
            x_float = at_least_float32(x)
            summed_axes = [axis for axis in range(x.dim()) if axis != 1]
            shape = [1, -1] + [1] * (x.dim() - 2)
            samples = x_float.new_full((1,), x.shape[0])
            summed = sum_over_ranks(torch.cat([x_float.sum(summed_axes), samples]))
            count = summed[-1].detach() * x.shape[2:].numel()
            mean_C = summed[:-1] / count
            centered = x_float - mean_C.view(shape)
            variance_C = sum_over_ranks(centered.square().sum(summed_axes)) / count
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), momentum)
                unbiased_C = variance_C * count / (count - 1)
                self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), momentum)
            y = centered * (variance_C + self.eps).rsqrt().view(shape)
            if self.affine:
                y = y * self.weight.view(shape) + self.bias.view(shape)
            return y.to(x.dtype)
