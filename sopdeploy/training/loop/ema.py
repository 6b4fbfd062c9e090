"""Exponential moving average (EMA) of the weights.

Source: Polyak and Juditsky (1992); the warm-up of the decay is TensorFlow's (`ExponentialMovingAverage`).
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sopdeploy.models.base import Classifier
from sopdeploy.training.loop_settings import EmaConfig


class ExponentialMovingAverage:
    """A copy of a model whose floating-point tensors are running averages.

    torch's `AveragedModel` would start from the weights after the first step, and read its number of updates
    from the device in every step, which waits for the GPU. Integer buffers are copied. `count` is the number
    of updates. It is part of the state because the decay depends on it.
    """

    def __init__(self, config: EmaConfig, model: Classifier) -> None:
        self.config = config
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the averages with the weights of *model*."""
        self.count += 1
        decay = min(self.config.decay, (1 + self.count) / (10 + self.count))  # smaller in the first updates
        averages, values = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in averages.items() if tensor.is_floating_point()]
        for name in averages.keys() - set(floating):
            averages[name].copy_(values[name])
        torch._foreach_lerp_(
            [averages[name] for name in floating], [values[name] for name in floating], 1 - decay
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their update count."""
        return {"count": self.count, "weights": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore *state*; raises the same errors as `torch.nn.Module.load_state_dict`."""
        self.model.load_state_dict(state["weights"])
        self.count = int(state["count"])
