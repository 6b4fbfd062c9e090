"""Averages of the weights, which are evaluated and exported in place of the weights that learn.

An average is a class here with its settings, which are a table of the recipe. Imports torch only to compute.

Sources: Polyak and Juditsky (1992), whose decay is warmed up as in TensorFlow's `ExponentialMovingAverage`;
Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (UAI 2018).
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from sopdeploy.config import Count, StrictModel

if TYPE_CHECKING:
    from torch import Tensor

    from sopdeploy.models.base import Classifier


class Average:
    """A copy of *model* whose floating-point tensors are averages; subclasses update it.

    torch's `AveragedModel` would start from the weights after the first step, and read its number of updates
    from the device in every step, which waits for the GPU. `count` is the number of updates, which the weight
    of the next one depends on. With 0, the weights that learn are exported.
    """

    def __init__(self, model: "Classifier") -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.count = 0

    def after_step(self, model: "Classifier") -> None:
        """Update the average with *model* after a step."""

    def after_epoch(self, model: "Classifier", left: int, images: Callable[[], Iterable["Tensor"]]) -> None:
        """Update the average with *model* after an epoch, of which *left* more follow.

        *images* returns the normalized training images of the epoch, in batches. A run that is stopped before
        it has evaluated the epoch calls this again.
        """

    def update(self, model: "Classifier", weight: float) -> None:
        """Move the averages to the weights of *model* by the fraction *weight*; copy integer buffers."""
        import torch  # noqa: PLC0415 # slow, and recipes are read without it

        self.count += 1
        averages, values = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in averages.items() if tensor.is_floating_point()]
        with torch.no_grad():
            for name in averages.keys() - set(floating):
                averages[name].copy_(values[name])
            torch._foreach_lerp_(
                [averages[name] for name in floating], [values[name] for name in floating], weight
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their update count."""
        return {"count": self.count, "weights": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore *state*; raises the same errors as `torch.nn.Module.load_state_dict`."""
        self.model.load_state_dict(state["weights"])
        self.count = int(state["count"])


class EmaConfig(StrictModel):
    """The decay of the averaged weights that are exported; in update n, at most (1 + n) / (10 + n)."""

    decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.999

    def create(self, model: "Classifier") -> Average:
        """Create the average of *model*."""
        return ExponentialMovingAverage(self, model)


class ExponentialMovingAverage(Average):
    """The exponential moving average over all steps."""

    def __init__(self, config: EmaConfig, model: "Classifier") -> None:
        super().__init__(model)
        self.config = config

    def after_step(self, model: "Classifier") -> None:
        """Update the average; the decay is smaller in the first updates."""
        count = self.count + 1
        self.update(model, 1 - min(self.config.decay, (1 + count) / (10 + count)))


class SwaConfig(StrictModel):
    """The number of epochs at the end of the run whose weights are averaged (SWA).

    As the statistics of batch norms are not those of averaged weights, a pass over the training images
    computes them anew.
    """

    epochs: Count

    def create(self, model: "Classifier") -> Average:
        """Create the average of *model*."""
        return LastEpochsAverage(self, model)


class LastEpochsAverage(Average):
    """The mean of the weights after each of the last epochs."""

    def __init__(self, config: SwaConfig, model: "Classifier") -> None:
        super().__init__(model)
        self.config = config

    def after_epoch(self, model: "Classifier", left: int, images: Callable[[], Iterable["Tensor"]]) -> None:
        """Add the weights of one of the last epochs once, and compute the statistics of batch norms."""
        number = self.config.epochs - left  # of the epoch among the last ones, from 1
        if number < 1:
            return
        if self.count < number:
            self.update(model, 1 / number)
        compute_statistics(self.model, model, images())


def compute_statistics(average: "Classifier", learning: "Classifier", images: Iterable["Tensor"]) -> None:
    """Compute the statistics of those batch norms of *average* that learn in *learning*, on *images*."""
    import torch  # noqa: PLC0415 # slow, and recipes are read without it
    from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC0415 # the same

    pairs = list(zip(average.modules(), learning.modules(), strict=True))
    norms = [one for one, other in pairs if isinstance(one, _BatchNorm) and other.training]
    momenta = [norm.momentum for norm in norms]
    for one, other in pairs:
        one.training = other.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for batch in images if norms else ():
            average(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
