"""Where and how a run computes; the training loop uses only this interface.

`SingleProcess` is one process on one device, `DataParallel` (in `data_parallel`) one of several processes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.layers.distributed import ShardRng


class Strategy:
    """The processes of a run; the base class is one process on one device.

    The loss of a step is the sum of the losses that the processes compute. `shard_rng` makes layers draw
    random numbers for the whole batch and use those of this process.
    """

    rank = 0
    world = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shard_rng = ShardRng()

    def setup(self, model: nn.Module) -> nn.Module:
        """Prepare *model*, already on the device, and return the module to call in training.

        Called again after the branches are removed. Checkpoints contain *model*, not the wrapper.
        """
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of *loss* to `grad`; with *last*, sum it over processes.

        *loss* is the mean over the samples of a micro-batch, times their fraction of the step.
        """
        del last
        loss.backward()  # type: ignore[no-untyped-call]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum *values* over the processes; the sum is on the device of *values*."""
        return values

    def all_reduce_list(
        self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the sums of *tensors*, with the shapes of *likes*, over the processes.

        None counts as 0, and the sum is None if all processes pass None.
        """
        del likes
        return list(tensors)

    def shard(self, samples: Sequence[int]) -> list[int]:
        """Select this process' part of *samples*; the sizes differ by at most one."""
        first, end = (len(samples) * rank // self.world for rank in (self.rank, self.rank + 1))
        return list(samples[first:end])

    def begin_forward(self, total: int) -> None:
        """Announce a forward pass with this process' shard of *total* samples."""
        self.shard_rng.start, self.shard_rng.total = total * self.rank // self.world, total

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write *checkpoint* atomically, in the first process only."""
        if self.rank == 0:
            write_checkpoint(path, checkpoint)


class SingleProcess(Strategy):
    """One process on one device."""


def select_device(name: str) -> torch.device:
    """Select the device for `auto`, `cpu` or `cuda`; raise `ConfigError` without CUDA."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device: no CUDA device on this machine; set device=auto or device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
