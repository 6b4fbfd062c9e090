"""The average of the weights that is evaluated and exported in place of the weights that learn.

Source: Polyak and Juditsky (1992); the decay is warmed up as in TensorFlow's
`ExponentialMovingAverage`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from sopdeploy.models.base import Classifier


class ExponentialMovingAverage:
    """A copy of *model* whose floating-point tensors are exponential moving averages over all steps.

    torch's `AveragedModel` would start from the weights after the first step, and read its
    number of updates from the device in every step, which waits for the GPU. `count` is the
    number of updates; with 0, the weights that learn are exported.
    """

    def __init__(self, decay: float, model: Classifier) -> None:
        self.decay = decay
        self.count = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Classifier) -> None:
        """Update the averages with *model* after a step, with a smaller decay in the first ones."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))

        averages = self.model.state_dict()
        values = model.state_dict()
        floating = [name for name, tensor in averages.items() if tensor.is_floating_point()]
        for name in averages.keys() - set(floating):
            averages[name].copy_(values[name])

        torch._foreach_lerp_(
            [averages[name] for name in floating],
            [values[name] for name in floating],
            1 - decay,
        )

    def narrow(self, model: Classifier) -> None:
        """Keep the averages of *model* alone, which has some of the tensors of the network before."""
        averages = self.model.state_dict()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.load_state_dict({name: averages[name] for name in model.state_dict()})

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their update count."""
        return {"count": self.count, "weights": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore *state*; raises the same errors as `torch.nn.Module.load_state_dict`."""
        self.model.load_state_dict(state["weights"])
        self.count = int(state["count"])
