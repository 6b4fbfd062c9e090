"""Batch norms that take an ordinary one's place in training: over all processes, or with fixed statistics.

torch's SyncBatchNorm refuses a CPU and needs a process group even where there is one process. Here the
mean and then the squared deviations from it are summed over ranks, so that nothing cancels, and autograd
passes both sums. In eval mode all of them are the ordinary one.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.errors import ConfigError
from sopdeploy.layers.covariance import at_least_float32, without_autocast


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


class Replacement(_BatchNorm):
    """Has the parameters, buffers and children of the batch norm that it takes the place of.

    timm's batch norms hold a dropout and an activation, which come after the norm in this order.
    """

    after: ClassVar[frozenset[str]] = frozenset({"drop", "act"})
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        children = dict(norm.named_children())
        if norm.running_mean is None or children.keys() - self.after:
            raise ConfigError(f"batch_norm: {type(norm).__name__} has no global or frozen kind; use local")
        self.affine, self.track_running_stats = norm.affine, True
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in children.items():
            self.add_module(name, child)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...) *x* normalised, then what comes after the norm."""
        y = self.normalised(x)
        for child in self.children():
            y = child(y)
        return y

    def normalised(self, x: Tensor) -> Tensor:
        """Return *x* normalised by the running statistics."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class FrozenBatchNorm(Replacement):
    """The running statistics as they are, in training too; weight and bias learn."""


class GlobalBatchNorm(Replacement):
    """The statistics of the batch on all ranks together; running variance over n - 1 of all of them."""

    def normalised(self, x: Tensor) -> Tensor:
        """Return *x* normalised by the whole batch in train mode, else by the running statistics."""
        if not self.training:
            return super().normalised(x)
        with without_autocast(x):
            wide = at_least_float32(x)
            others = [axis for axis in range(x.dim()) if axis != 1]
            shape = [1, -1] + [1] * (x.dim() - 2)
            samples = wide.new_full((1,), x.shape[0])
            summed = sum_over_ranks(torch.cat([wide.sum(others), samples]))
            count = summed[-1].detach() * x.shape[2:].numel()
            mean_C = summed[:-1] / count
            centred = wide - mean_C.view(shape)
            variance_C = sum_over_ranks(centred.square().sum(others)) / count
            self.follow(mean_C.detach(), (variance_C * count / (count - 1)).detach())
            y = centred * (variance_C + self.eps).rsqrt().view(shape)
            if self.affine:
                y = y * self.weight.view(shape) + self.bias.view(shape)
            return y.to(x.dtype)

    @torch.no_grad()
    def follow(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        self.num_batches_tracked.add_(1)
        pace = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), pace)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), pace)


class Rows:
    """Which rows of a step's batch are computed here: from `start`, of `total`; `None` is all of them.

    One object is shared by everything in a network that draws, and set before each forward.
    """

    start: int = 0
    total: int | None = None

    def draw(self, like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """Return numbers for the rows of *like*, of its shape, dtype and device; *fill* draws in place."""
        total = len(like) if self.total is None else self.total
        return fill(like.new_empty((total, *like.shape[1:])))[self.start : self.start + len(like)]


class RowsDropout(nn.Dropout):
    """Dropout whose mask is drawn for the whole batch."""

    def __init__(self, p: float, rows: Rows) -> None:
        super().__init__(p)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Return *x* with a share p of its numbers 0 and the others larger, in train mode."""
        if not self.training or self.p == 0:
            return x
        kept = self.rows.draw(x.detach(), lambda mask: mask.bernoulli_(1 - self.p))
        return x * kept.div_(1 - self.p)
