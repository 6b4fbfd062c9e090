"""The learning rate as a function of the time in epochs: nothing to save, nothing to restore."""

import itertools
import math
from typing import Annotated, Literal

import pydantic

from sopdeploy.config import StrictModel


class Milestones(StrictModel):
    """Times `gamma` at each milestone (in whole epochs), after a linear warm-up from 0.

    Milestones count from the start of the run, warm-up included.
    """

    kind: Literal["milestones"]
    milestones: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = ()
    gamma: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.1
    warmup_epochs: Annotated[float, pydantic.Field(ge=0)] = 0.0

    @pydantic.field_validator("milestones")
    @classmethod
    def _ascending(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
            raise ValueError("milestones must grow")
        return milestones

    def factor(self, time: float, epochs: int) -> float:
        """Return what the recipe's learning rate is multiplied by, *time* epochs into the run."""
        del epochs
        decayed = self.gamma ** sum(time >= milestone for milestone in self.milestones)
        return decayed * min(1.0, time / self.warmup_epochs) if self.warmup_epochs else decayed

    def landmarks(self, epochs: int) -> tuple[float, ...]:
        """Return the times in epochs at which the rate turns."""
        return (0.0, self.warmup_epochs, *(float(m) for m in self.milestones if m < epochs))


class Falling(StrictModel):
    """What cosine and polynomial share: a warm-up from 0, then down from 1 to `floor` at the run's end."""

    warmup_epochs: Annotated[float, pydantic.Field(ge=0)] = 0.0
    floor: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0

    def factor(self, time: float, epochs: int) -> float:
        """Return what the recipe's learning rate is multiplied by, *time* epochs into the run."""
        if time < self.warmup_epochs:
            return time / self.warmup_epochs
        left = epochs - self.warmup_epochs
        done = min(1.0, (time - self.warmup_epochs) / left) if left > 0 else 1.0
        return self.floor + (1 - self.floor) * self.fall(done)

    def landmarks(self, epochs: int) -> tuple[float, ...]:
        """Return the start, the end of the warm-up, the middle of the way down and the end."""
        return (0.0, self.warmup_epochs, (self.warmup_epochs + epochs) / 2, float(epochs))

    def fall(self, _done: float, /) -> float:
        """Return the way down from 1 to 0 after a share of it."""
        raise TypeError(f"{type(self).__name__} must say how it falls")


class Cosine(Falling):
    """Down as half a cosine. Source: Loshchilov and Hutter, "SGDR" (ICLR 2017), without restarts."""

    kind: Literal["cosine"]

    def fall(self, done: float, /) -> float:
        """Return half a cosine."""
        return between(1.0, 0.0, done)


class Polynomial(Falling):
    """Down as (1 - done) to the `power`; 1 is a straight line."""

    kind: Literal["polynomial"]
    power: Annotated[float, pydantic.Field(gt=0)] = 1.0

    def fall(self, done: float, /) -> float:
        """Return the power of what is left."""
        return math.pow(1 - done, self.power)


class OneCycle(StrictModel):
    """Up from 1/25 to 1 in the first `rise` of the run, down to nearly 0 in the rest, both as a cosine.

    Source: Smith, "Super-Convergence" (2018), with PyTorch's defaults.
    """

    kind: Literal["one-cycle"]
    rise: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.3

    def factor(self, time: float, epochs: int) -> float:
        """Return what the recipe's learning rate is multiplied by, *time* epochs into the run."""
        first, last = 1 / 25, 1 / 25 / 1e4
        done = time / epochs
        if done < self.rise:
            return between(first, 1.0, done / self.rise)
        return between(1.0, last, (done - self.rise) / (1 - self.rise))

    def landmarks(self, epochs: int) -> tuple[float, ...]:
        """Return the start, the peak and the end."""
        return (0.0, self.rise * epochs, float(epochs))


Schedule = Annotated[Milestones | Cosine | Polynomial | OneCycle, pydantic.Field(discriminator="kind")]


def between(start: float, end: float, done: float) -> float:
    """Return the value on half a cosine from *start* to *end* after the share *done* of it."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
