"""The device and the processes of a run, as an interface for the training loop.

Each process computes a shard of every batch. A step of several processes equals that of one process with the
whole batch: gradients are summed, and the loss of a process is weighted by its number of samples. Layers that
couple samples sum their statistics over the processes themselves (balance loss), or not (batch norm).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import ProcessGroup


class Strategy(ProcessGroup):
    """The processes of a run, each with its own device: those that `join_processes` connected, or only this.

    The loss of a step is the sum of the losses that the processes compute. Gradients are summed after the
    backward pass: `DistributedDataParallel` reduces them during it, among the collectives of the layers, and
    cannot sum second derivatives.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.joined = dist.is_available() and dist.is_initialized()
        if self.joined:
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum *values* over the processes; the sum is on the device of *values*."""
        if not self.joined:
            return values
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def backward(self, loss: Tensor, model: nn.Module, *, last: bool) -> None:
        """Add the gradient of *loss* to `grad` in *model*; with *last*, sum it over processes.

        *loss* is the mean over the samples of a micro-batch, times their fraction of the step.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        if last and self.world > 1:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            sums = self.sum_by_parameter([parameter.grad for parameter in parameters], parameters)
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient

    @torch.no_grad()
    def sum_by_parameter(
        self, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Sum each of *tensors*, which have the shapes of *parameters*, over the processes.

        None counts as 0. The sum is None if all processes pass None: weight decay must skip such parameters.
        """
        if not self.joined or not parameters:
            return list(tensors)
        counts = self.all_reduce(torch.tensor([tensor is not None for tensor in tensors]).int())
        used = [index for index, count in enumerate(counts.tolist()) if count]
        flat = []
        for index in used:
            tensor, parameter = tensors[index], parameters[index]
            flat.append(parameter.new_zeros(parameter.numel()) if tensor is None else tensor.reshape(-1))
        total = torch.cat(flat)
        dist.all_reduce(total)
        sums: list[Tensor | None] = [None] * len(parameters)
        for index, part in zip(used, torch.split(total, [part.numel() for part in flat]), strict=True):
            sums[index] = torch.empty_like(parameters[index]).copy_(part.view_as(parameters[index]))
        return sums

    def shard(self, samples: Sequence[int]) -> list[int]:
        """Select this process' part of *samples*; the sizes differ by at most one."""
        first, end = (len(samples) * rank // self.world for rank in (self.rank, self.rank + 1))
        return list(samples[first:end])

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write *checkpoint* atomically, in the first process only."""
        if self.rank == 0:
            write_checkpoint(path, checkpoint)


def select_device(name: str) -> torch.device:
    """Select the device *name*: `auto`, `cpu` or `cuda`; raise `ConfigError` if there is no CUDA device."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device: no CUDA device on this machine; set device=auto or device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
