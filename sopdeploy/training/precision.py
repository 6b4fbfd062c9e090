"""In what precision a step computes: autocast, and the scale that keeps float16 gradients from vanishing.

Second-order parts leave autocast by themselves (`sopdeploy.layers.covariance`); weights, their mean and the
optimizer's state stay in float32.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sopdeploy.errors import TrainingError

MOST_SKIPS = 20  # the first scale is 2^16: halved twenty times it is far below 1
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The scale is part of the state; `skipped` counts the last steps whose gradient overflowed float16."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
        self.skipped = 0

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, TYPES[self.kind], enabled=self.kind != "fp32")

    def scale(self, loss: Tensor) -> Tensor:
        """Return what to differentiate in place of *loss*."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, so that a norm means something."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, *, finite: bool) -> bool:
        """Do the step and say whether it was done: float16's are left out where a gradient overflowed.

        Raises `TrainingError` after too many of these in a row. Without a scale the caller has checked.
        """
        self.scaler.step(optimizer)
        self.scaler.update()
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= MOST_SKIPS:
            raise TrainingError(
                f"the gradient overflowed float16 in {self.skipped} steps in a row; set precision=bf16 or "
                "fp32, or lower optimizer.lr"
            )
        return finite

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the count of skipped steps."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from *state*."""
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])


SHOWN = 16  # samples that a message names


def first_not_finite_tensor(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first floating-point tensor with such a number, or `None`."""
    return next(
        (name for name, tensor in named if tensor.is_floating_point() and not bool(tensor.isfinite().all())),
        None,
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the parameters that have one."""
    return {
        f"the gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that hold floating-point numbers, such as batch norm's running variance."""
    return {
        f"the buffer {name}": buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()
    }


def tensors_of(nest: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a nest of tables and lists under dotted names."""
    if isinstance(nest, Tensor):
        yield prefix, nest
    elif isinstance(nest, dict):
        for key, value in nest.items():
            yield from tensors_of(value, f"{prefix}.{key}")
    elif isinstance(nest, list | tuple):
        for number, value in enumerate(nest):
            yield from tensors_of(value, f"{prefix}.{number}")


def must_be_finite(state: Any) -> None:
    """Raise `TrainingError` for the first tensor in *state*, a table, that may not be written."""
    for key, value in state.items():
        culprit = first_not_finite_tensor(tensors_of(value, str(key)))
        if culprit is not None:
            raise TrainingError(
                f"{culprit} is no longer finite; nothing was saved, lower optimizer.lr or set "
                "optimizer.clip_norm"
            )


def not_finite(culprit: str, epoch: int, step: int, samples: list[int]) -> TrainingError:
    """Return the error that names the part, the step (from 0) and its samples."""
    shown = ", ".join(map(str, samples[:SHOWN]))
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return TrainingError(
        f"epoch {epoch + 1}, step {step + 1}: {culprit} is not finite; lower optimizer.lr or set "
        f"optimizer.clip_norm (samples {shown}{more})"
    )


def all_finite(values: Iterable[Tensor]) -> Tensor:
    """Return a scalar of type bool, without waiting for the device."""
    return torch.stack([value.isfinite().all() for value in values]).all()
