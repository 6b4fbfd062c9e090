"""The settings of the training loop in a recipe; larger parts have their own files. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sopdeploy.config import Count, FractionBelowOne, NonNegative, Positive, StrictModel
from sopdeploy.data.augment import Augmentation, ColorConfig
from sopdeploy.models.registry import CatalogModel
from sopdeploy.training.averages import EmaConfig, SwaConfig
from sopdeploy.training.optimizers import OptimizerConfig
from sopdeploy.training.schedules import Schedule


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
    swa: SwaConfig | None = None
    teacher: TeacherConfig | None = None
    validation: ValidationConfig = ValidationConfig()
    save: SaveConfig = SaveConfig()

    @pydantic.model_validator(mode="after")
    def _check_average(self) -> "LoopSettings":
        if self.swa is not None and self.ema is not None:
            raise ValueError("swa: the weights have one average; set ema=null or swa=null")
        if self.swa is not None and self.swa.epochs > self.epochs:
            raise ValueError(f"swa.epochs: the run has only {self.epochs} epochs; give no more")
        return self
