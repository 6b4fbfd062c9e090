"""The settings of the training loop in a recipe: optimizer, schedule, loss, average and teacher.

A recipe without `optimizer.kind` uses SGD. Weight decay applies to every parameter, as in the papers.
`clip_norm` limits the norm of the whole gradient; 0 disables clipping. Schedules are stateless functions of
the time in epochs. Does not import torch.
"""

import itertools
import math
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sopdeploy.config import Count, FractionBelowOne, NonNegative, Positive, PositiveRate, StrictModel
from sopdeploy.data.augment import Augmentation, ColorConfig
from sopdeploy.models.registry import CatalogModel

Betas = tuple[FractionBelowOne, FractionBelowOne]
Epochs = Annotated[float, pydantic.Field(ge=0)]


class OptimizerSettings(StrictModel):
    """Common settings; subclasses add the other arguments of their optimizer."""

    lr: PositiveRate
    weight_decay: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.0
    clip_norm: NonNegative = 0.0


class Sgd(OptimizerSettings):
    """Stochastic gradient descent with momentum; weight decay is part of the gradient."""

    kind: Literal["sgd"] = "sgd"
    momentum: FractionBelowOne = 0.9
    nesterov: bool = False

    @pydantic.model_validator(mode="after")
    def _check_nesterov(self) -> "Sgd":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter (ICLR 2019)."""

    kind: Literal["adamw"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.01


class RAdam(OptimizerSettings):
    """Rectified Adam with decoupled weight decay. Source: Liu et al. (ICLR 2020)."""

    kind: Literal["radam"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8


class RMSProp(OptimizerSettings):
    """RMSProp with momentum; weight decay is part of the gradient.

    With `tensorflow`, `eps` is added inside of the root and the mean of the squares starts at 1, as in
    EfficientNet's code. With an `eps` of 1e-3, small gradients then have up to 32 times shorter steps.
    """

    kind: Literal["rmsprop"]
    alpha: FractionBelowOne = 0.9
    momentum: FractionBelowOne = 0.9
    eps: Positive = 1e-3
    tensorflow: bool = False


class AdaHessianConfig(OptimizerSettings):
    """AdaHessian, with the defaults of its paper."""

    kind: Literal["adahessian"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-4
    power: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0


OptimizerConfig = Annotated[
    Sgd | AdamW | RAdam | RMSProp | AdaHessianConfig,
    pydantic.Field(discriminator="kind"),
    pydantic.BeforeValidator(lambda value: {"kind": "sgd", **value} if isinstance(value, dict) else value),
]


class Milestones(StrictModel):
    """Multiply by `gamma` at each milestone, after a linear warm-up from 0.

    Milestones are whole epochs from the start of the run, warm-up included.
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
        remaining = epochs - self.warmup_epochs  # 0 or less if the warm-up is as long as the run
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
        first, last = 1 / 25, 1 / 25 / 1e4  # PyTorch's `div_factor` is 25, its `final_div_factor` 1e4
        progress = time / epochs
        if progress < self.rise:
            start, end, part = first, 1.0, progress / self.rise
        else:
            start, end, part = 1.0, last, (progress - self.rise) / (1 - self.rise)
        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


Schedule = Annotated[Milestones | Cosine | OneCycle, pydantic.Field(discriminator="kind")]


class EmaConfig(StrictModel):
    """The decay of the averaged weights that are exported; in update n, at most (1 + n) / (10 + n)."""

    decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.999


class TeacherConfig(StrictModel):
    """The teacher of knowledge distillation.

    `weights` is the checkpoint of a trained teacher, which does not change. Without it, the network `model`
    starts from random weights and is trained jointly: its own loss is added, and the student follows the
    outputs of each step. `share` is the weight of the divergence from the teacher's outputs in the loss of
    the student, 1 - share that of the student's own loss. `temperature` softens both outputs, and its square
    scales the divergence.
    """

    weights: Path | None = None
    model: CatalogModel | None = None
    share: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    temperature: Positive = 1.0


class LossConfig(StrictModel):
    """Loss settings that do not depend on the model."""

    label_smoothing: FractionBelowOne = 0.0


class ValidationConfig(StrictModel):
    """How epochs are evaluated; with `mirror`, by the mean logits of an image and its mirror image."""

    mirror: bool = False


class SaveConfig(StrictModel):
    """Minutes after which `last.pt` is also written within an epoch; 0 for only at its end."""

    every_minutes: NonNegative = 15.0


class LoopSettings(StrictModel):
    """The settings of the training loop; they are keys of the recipe itself, not of a table.

    `batch_size` is the number of samples of a step, over all processes. Each process computes the statistics
    of batch norm for its own part of it.
    """

    epochs: Count
    batch_size: Annotated[int, pydantic.Field(ge=2)]
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: Augmentation
    color: ColorConfig = ColorConfig()
    optimizer: OptimizerConfig
    schedule: Schedule
    loss: LossConfig = LossConfig()
    ema: EmaConfig | None = None
    teacher: TeacherConfig | None = None
    validation: ValidationConfig = ValidationConfig()
    save: SaveConfig = SaveConfig()
