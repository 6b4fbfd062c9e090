"""The average of the weights that is evaluated and exported in place of the weights that learn.

Source: Polyak and Juditsky (1992); the decay is warmed up as in TensorFlow's
`ExponentialMovingAverage`.
"""

import copy
from collections.abc import Mapping
from typing import Any

from sopdeploy.base.environment import import_optional
from sopdeploy.errors import MissingPackageError
from sopdeploy.models.base import Classifier


class ExponentialMovingAverage:
    """timm's copy of *model* whose floating-point tensors are moving averages over all steps.

    `count` is the number of updates; with 0, the weights that learn are exported.
    """

    def __init__(self, decay: float, model: Classifier) -> None:
        utils = import_optional("timm.utils", "timm", ".[train]", MissingPackageError)
        self.count = 0

        # In update n, the decay is at most (1 + n) / (10 + n): timm's 1 - 1 / (1 + step / gamma),
        # where `update_after_step` makes the step n + 1.
        self.ema = utils.ModelEmaV3(
            model,
            decay=decay,
            use_warmup=True,
            warmup_gamma=9,
            warmup_power=1.0,
            update_after_step=-2,
        ).requires_grad_(False)

    @property
    def model(self) -> Classifier:
        """The copy with the averages."""
        averaged: Classifier = self.ema.module
        return averaged

    def update(self, model: Classifier) -> None:
        """Update the averages with *model* after a step."""
        self.count += 1
        self.ema.update(model, step=self.count)

    def narrow(self, model: Classifier) -> None:
        """Keep the averages of *model* alone, which has some of the tensors of the network before."""
        averages = self.model.state_dict()
        self.ema.module = copy.deepcopy(model).requires_grad_(False)
        self.model.load_state_dict({name: averages[name] for name in model.state_dict()})

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their update count."""
        return {"count": self.count, "weights": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore *state*; raises the same errors as `torch.nn.Module.load_state_dict`."""
        self.model.load_state_dict(state["weights"])
        self.count = int(state["count"])
