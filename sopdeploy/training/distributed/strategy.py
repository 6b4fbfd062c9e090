"""The devices and processes of a run, as an interface for the training loop.

`SingleProcess` is one process on one device, `DataParallel` one of several processes, each of which computes
a shard of every batch. A data-parallel step equals that of one process with the whole batch: gradients are
summed, and the loss of a process is weighted by its number of samples. Layers that couple samples
(`batch_norm = "global"`, balance loss) sum their statistics over the processes themselves.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import ProcessGroup
from sopdeploy.layers.distributed import ShardRng

BUCKET_BYTES = 64 * 2**20  # limits the memory used in addition to the gradients


class Strategy(ProcessGroup):
    """The processes of a run; the base class is one process on one device.

    The loss of a step is the sum of the losses that the processes compute. `shard_rng` makes layers draw
    random numbers for the whole batch and use those of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shard_rng = ShardRng()

    def backward(self, loss: Tensor, model: nn.Module, *, last: bool) -> None:
        """Add the gradient of *loss* to `grad` in *model*; with *last*, sum it over processes.

        *loss* is the mean over the samples of a micro-batch, times their fraction of the step.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        if last and self.world > 1:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            sums = self.all_reduce_list([parameter.grad for parameter in parameters], parameters)
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient

    def all_reduce_list(
        self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the sums of *tensors*, with the shapes of *likes*, over the processes.

        None counts as 0. The sum is None if all processes pass None: weight decay must skip such parameters.
        """
        del likes
        return list(tensors)

    def shard(self, samples: Sequence[int]) -> list[int]:
        """Select this process' part of *samples*; the sizes differ by at most one."""
        first, end = (len(samples) * rank // self.world for rank in (self.rank, self.rank + 1))
        return list(samples[first:end])

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write *checkpoint* atomically, in the first process only."""
        if self.rank == 0:
            write_checkpoint(path, checkpoint)


class SingleProcess(Strategy):
    """One process on one device."""


class DataParallel(Strategy):
    """One of the processes that `join_processes` connected, on its own device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, values: Tensor) -> Tensor:  # noqa: D102
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    @torch.no_grad()
    def all_reduce_list(  # noqa: D102
        self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]
    ) -> list[Tensor | None]:
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


def select_device(name: str) -> torch.device:
    """Select the device for `auto`, `cpu` or `cuda`; raise `ConfigError` without CUDA."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device: no CUDA device on this machine; set device=auto or device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
