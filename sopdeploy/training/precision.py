"""In what precision a step computes: autocast, and the scale that keeps float16 gradients from vanishing.

Second-order parts leave autocast by themselves (`sopdeploy.pooling.precision`); weights, their mean and the
optimizer's state stay in float32.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
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
