"""Data-parallel training: every process computes a shard of each batch.

A step equals that of one process with the whole batch: gradients are summed, and the loss of a process has
the weight of its samples. What couples samples (`batch_norm = "global"`, balance loss) is summed in the
layers.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sopdeploy.training.distributed.strategy import Strategy

BUCKET_BYTES = 64 * 2**20  # limits the memory used in addition to the gradients


class DataParallel(Strategy):
    """One of the processes that `join_processes` connected, on its own device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.parameters: list[nn.Parameter] = []

    def setup(self, model: nn.Module) -> nn.Module:  # noqa: D102
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: D102
        loss.backward()  # type: ignore[no-untyped-call]
        if last:
            gradients = [parameter.grad for parameter in self.parameters]
            sums = self.all_reduce_list(gradients, self.parameters)
            for parameter, gradient in zip(self.parameters, sums, strict=True):
                parameter.grad = gradient

    def all_reduce(self, values: Tensor) -> Tensor:  # noqa: D102
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    @torch.no_grad()
    def all_reduce_list(
        self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the sum of each of *tensors* over the processes; change them in place.

        None counts as 0. The sum is None if all processes pass None: weight decay must skip such parameters.
        """
        if not likes:
            return []
        counts = torch.tensor([tensor is not None for tensor in tensors], dtype=torch.int32)
        counts = counts.to(likes[0].device)
        dist.all_reduce(counts)
        sums = [
            (torch.zeros_like(like) if tensor is None else tensor) if count else None
            for tensor, like, count in zip(tensors, likes, counts.tolist(), strict=True)
        ]
        for bucket in _buckets([tensor for tensor in sums if tensor is not None]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        return sums


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive *tensors* of one dtype, up to BUCKET_BYTES at a time."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
