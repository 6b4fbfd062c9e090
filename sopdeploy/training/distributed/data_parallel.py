"""Several processes that compute one step: each a part of the batch, all the same weights.

The step is that of one process with the whole batch: gradients are summed and each process' loss counts by
its samples. What couples samples is summed where it couples them (`batch_norm = "global"`, balance loss).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sopdeploy.layers.distributed import Rows

BUCKET_BYTES = 64 * 2**20  # few enough calls, little enough memory beside the gradients


@torch.no_grad()
def summed(tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the sums over all processes; those of *tensors* that are there are changed in place.

    *likes* have the shapes. `None` counts as 0 where another process has a tensor, and stays where no
    process has one: an optimizer's weight decay tells the two apart.
    """
    if not likes:
        return []
    there = torch.tensor([tensor is not None for tensor in tensors], dtype=torch.int32)
    there = there.to(likes[0].device)
    dist.all_reduce(there)
    sums = [
        (torch.zeros_like(like) if tensor is None else tensor) if count else None
        for tensor, like, count in zip(tensors, likes, there.tolist(), strict=True)
    ]
    for bucket in buckets([tensor for tensor in sums if tensor is not None]):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    return sums


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield *tensors* in their order, those of one type together up to the size of a bucket."""
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


class DataParallel:
    """One of the processes that `joined_processes` joined, on its own device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.rows = Rows()
        self.parameters: list[nn.Parameter] = []

    def setup(self, model: nn.Module) -> nn.Module:
        """Return *model* as it is; its gradients are summed from now on."""
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of *loss* to the parameters' `grad`; summed over processes on the *last*."""
        loss.backward()  # type: ignore[no-untyped-call]
        if last:
            gradients = self.sums([parameter.grad for parameter in self.parameters], self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

    def sums(self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the sum of each of *tensors* over the processes; they may be missing here or everywhere."""
        return summed(tensors, likes)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of *values* over the processes, where *values* are."""
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def share(self, samples: Sequence[int]) -> list[int]:
        """Return this process' part of *samples*, a run of neighbours; the parts differ by one at most."""
        first, end = (len(samples) * rank // self.world for rank in (self.rank, self.rank + 1))
        return list(samples[first:end])

    def begin(self, total: int) -> None:
        """Say that the next forward is of this process' share of *total* samples."""
        self.rows.start, self.rows.total = total * self.rank // self.world, total

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write *checkpoint*, in the first process."""
        if self.rank == 0:
            write_checkpoint(path, checkpoint)

    def load(self, path: Path) -> Checkpoint:
        """Return the checkpoint at *path*, which every process reads for itself."""
        return read_checkpoint(path)
