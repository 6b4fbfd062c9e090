"""Mixed precision: autocast and gradient scaling.

Second-order layers disable autocast themselves (`sopdeploy.layers.covariance`). Weights, their average and
the optimizer's state stay in float32.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer

from sopdeploy.errors import TrainingError

MAX_SKIPPED_STEPS = 20  # in a row; the first scale is 2^16, so 20 halvings end far below 1


class MixedPrecision:
    """Autocast and gradient scaling of a run.

    `skipped` counts the most recent consecutive steps that were skipped because a gradient overflowed
    float16. It is part of the state, like the scale.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
        self.skipped = 0

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context of a forward pass."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.kind]
        return torch.autocast(self.device.type, dtype, enabled=self.kind != "fp32")

    def step(self, optimizer: Optimizer, *, finite: bool) -> bool:
        """Run the optimizer step if the gradient is *finite*; return whether it ran.

        The gradients must be unscaled. Raises `TrainingError` after too many skipped steps in a row.
        """
        self.scaler.step(optimizer)
        self.scaler.update()
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"the gradient overflowed float16 in {self.skipped} steps in a row; set precision=bf16 or "
                "fp32, or lower optimizer.lr"
            )
        return finite

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the number of skipped steps."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore *state*; the scale of another precision is ignored."""
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])
