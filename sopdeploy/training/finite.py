"""Which number of a run is infinite or not a number any more; asked only where one is."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.errors import TrainingError

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
