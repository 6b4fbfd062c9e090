"""Where a run computes, behind a few calls, so that the loop knows nothing of devices and processes.

The loop asks for a network that computes (`setup`), a gradient (`backward`), a sum over processes
(`all_reduce`), and a checkpoint written once and read everywhere (`save`, `load`). `Alone` is one process on
one device.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import ProcessGroup, SingleProcessGroup
from sopdeploy.layers.distributed import Rows


class Parallel(ProcessGroup, Protocol):
    """The processes of a run. A step's loss is the sum over all of them of what each one computed."""

    device: torch.device
    rows: Rows

    def setup(self, model: nn.Module) -> nn.Module:
        """Return what to call in training: *model*, already on the device, wrapped where that is needed.

        Called again after the network has lost its branches. Checkpoints are of *model*, not of a wrapper.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of *loss* to the parameters' `grad`; sum over processes on a step's *last* piece.

        *loss* is this piece's part of the step's: the mean over its samples times their share of the step.
        """

    def sums(self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the sum of each of *tensors*, shaped as *likes*, over the processes.

        One that is missing counts as 0, and stays missing where no process has it.
        """

    def share(self, samples: Sequence[int]) -> list[int]:
        """Return which of *samples* this process computes."""

    def begin(self, total: int) -> None:
        """Say that the next forward is of this process' share of *total* samples."""

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write *checkpoint* once, all or nothing."""

    def load(self, path: Path) -> Checkpoint:
        """Return the checkpoint at *path*, the same in every process."""


class SingleProcess(SingleProcessGroup):
    """One process on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows = Rows()

    def setup(self, model: nn.Module) -> nn.Module:
        """Return *model* as it is."""
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of *loss* to the parameters' `grad`."""
        del last
        loss.backward()  # type: ignore[no-untyped-call]

    def sums(self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor | None]:
        """Return *tensors*."""
        del likes
        return list(tensors)

    def share(self, samples: Sequence[int]) -> list[int]:
        """Return all *samples*."""
        return list(samples)

    def begin(self, total: int) -> None:
        """Compute all of them."""
        self.rows.total = total

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write *checkpoint*."""
        write_checkpoint(path, checkpoint)

    def load(self, path: Path) -> Checkpoint:
        """Return the checkpoint at *path*."""
        return read_checkpoint(path)


def choose_device(wish: str) -> torch.device:
    """Return where to compute; raises `ConfigError` for a CUDA device that is not there."""
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise ConfigError("device: no CUDA device on this machine; set device=auto or device=cpu")
    return torch.device("cuda" if available and wish != "cpu" else "cpu")
