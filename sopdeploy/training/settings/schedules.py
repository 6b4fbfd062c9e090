"""The schedules of the learning rate that a recipe can select: stateless functions of the time in epochs."""

import itertools
import math
from typing import Annotated, Literal

import pydantic

from sopdeploy.base.config import StrictModel

Epochs = Annotated[float, pydantic.Field(ge=0)]


class Milestones(StrictModel):
    """Multiply by `gamma` at each milestone, after a linear warm-up from 0.

    Milestones are whole epochs from the start of the schedule, warm-up included.
    """

    kind: Literal["milestones"]
    milestones: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = ()
    gamma: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.1
    warmup_epochs: Epochs = 0.0

    @pydantic.field_validator("milestones")
    @classmethod
    def _check_ascending(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
            raise ValueError("milestones must be in ascending order")
        return milestones

    def factor(self, time: float, _epochs: int) -> float:
        """Compute the factor on the base learning rate after *time* epochs."""
        num_passed = sum(time >= milestone for milestone in self.milestones)
        warmup = min(1.0, time / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.gamma**num_passed * warmup


class Cosine(StrictModel):
    """A linear warm-up from 0, then half a cosine from 1 to `floor` at the end of the run.

    Source: Loshchilov and Hutter, "SGDR" (ICLR 2017).
    """

    kind: Literal["cosine"]
    warmup_epochs: Epochs = 0.0
    floor: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0

    def factor(self, time: float, epochs: int) -> float:
        """Compute the factor on the base learning rate after *time* of *epochs* epochs."""
        if time < self.warmup_epochs:
            return time / self.warmup_epochs
        # The time after the warm-up; 0 or less if the warm-up is as long as the run.
        remaining = epochs - self.warmup_epochs
        progress = min(1.0, (time - self.warmup_epochs) / remaining) if remaining > 0 else 1.0
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


class OneCycle(StrictModel):
    """Rise from 1/25 to 1 in the fraction `rise` of the run, then fall to 1/250,000, both by half a cosine.

    Source: Smith, "Super-Convergence" (2018), with the defaults of PyTorch's `OneCycleLR`.
    """

    kind: Literal["one-cycle"]
    rise: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.3

    def factor(self, time: float, epochs: int) -> float:
        """Compute the factor on the base learning rate after *time* of *epochs* epochs."""
        # PyTorch's `div_factor` is 25, its `final_div_factor` 1e4
        first = 1 / 25
        last = 1 / 25 / 1e4

        progress = time / epochs
        if progress < self.rise:
            start = first
            end = 1.0
            part = progress / self.rise
        else:
            start = 1.0
            end = last
            part = (progress - self.rise) / (1 - self.rise)

        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


Schedule = Annotated[Milestones | Cosine | OneCycle, pydantic.Field(discriminator="kind")]
