"""The mean of the weights over the last steps (EMA), beside the weights that learn.

Source: Polyak and Juditsky (1992); the growing decay is that of TensorFlow's `ExponentialMovingAverage`.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.config import StrictModel


class EmaChoice(StrictModel):
    """`decay` is reached from below: after n updates it is at most (1 + n) / (10 + n) with `warmup`.

    `export` says which weights `best.pt` carries, and by which the best epoch is chosen.
    """

    decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.999
    warmup: bool = True
    export: Literal["average", "raw"] = "average"


class ExponentialMovingAverage:
    """A copy of a network that follows it: floating-point tensors, batch norm's included, are averaged.

    Integer buffers are copied. `count` is the number of updates; it belongs to the state, since the decay
    depends on it.
    """

    def __init__(self, choice: EmaChoice, model: nn.Module) -> None:
        self.choice = choice
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights of *model* into the mean."""
        self.count += 1
        decay = self.choice.decay
        if self.choice.warmup:
            decay = min(decay, (1 + self.count) / (10 + self.count))
        mine, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        for name in mine.keys() - set(floating):
            mine[name].copy_(theirs[name])
        means, values = [mine[name] for name in floating], [theirs[name] for name in floating]
        torch._foreach_lerp_(means, values, 1 - decay)

    def keep_only(self, model: nn.Module) -> None:
        """Become as small as *model*, a network that has lost some of its parts."""
        kept = copy.deepcopy(model).requires_grad_(False)
        mine = self.model.state_dict()
        kept.load_state_dict({name: mine[name] for name in kept.state_dict()})
        self.model = kept

    def state_dict(self) -> dict[str, Any]:
        """Return the means and their count."""
        return {"count": self.count, "weights": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from *state*; raises what `load_state_dict` of a network raises."""
        weights: dict[str, Tensor] = state["weights"]
        self.model.load_state_dict(weights)
        self.count = int(state["count"])
