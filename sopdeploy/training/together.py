"""Several processes that compute one step: each a part of the batch, all the same weights.

The step is that of one process with the whole batch: gradients are summed and each process' loss counts by
its samples. What couples samples is summed where it couples them (`batch_norm = "global"`, balance loss).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sopdeploy.blocks.rows import Rows
from sopdeploy.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sopdeploy.training.gradients import summed


class Together:
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
