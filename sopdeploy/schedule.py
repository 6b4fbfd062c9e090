"""The learning rate as a function of the time in epochs: nothing to save, nothing to restore."""

import itertools
import math
from typing import Annotated, Literal

import pydantic

from sopdeploy.frozen import Frozen


class Milestones(Frozen):
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


class OneCycle(Frozen):
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


Schedule = Annotated[Milestones | OneCycle, pydantic.Field(discriminator="kind")]


def between(start: float, end: float, done: float) -> float:
    """Return the value on half a cosine from *start* to *end* after the share *done* of it."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
