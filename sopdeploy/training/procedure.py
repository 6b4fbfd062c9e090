"""The recipe table `[procedure]`: how to train; and the keys that only the training loop reads."""

from typing import Annotated, Literal

import pydantic

from sopdeploy.config import Count, FractionBelowOne, NonNegative, StrictModel
from sopdeploy.data.augment import Augmentation, ColorConfig
from sopdeploy.training.ema import EmaConfig
from sopdeploy.training.optimizers import OptimizerConfig
from sopdeploy.training.schedule import Schedule
from sopdeploy.training.step.losses import TeacherConfig


class LossConfig(StrictModel):
    """Loss settings that do not depend on the model."""

    label_smoothing: FractionBelowOne = 0.0


class SaveConfig(StrictModel):
    """Minutes after which `last.pt` is also written within an epoch; 0 for only at its end."""

    every_minutes: NonNegative = 15.0


class LoopSettings(StrictModel):
    """The settings of the training loop; they are keys of the recipe itself, not of a table.

    `batch_size` is the number of samples of a step, over all processes; `accumulate` splits a step into that
    many micro-batches. Each process computes the statistics of batch norm for its own part of a micro-batch.
    """

    epochs: Count
    batch_size: Annotated[int, pydantic.Field(ge=2)]
    accumulate: Count = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: Augmentation
    color: ColorConfig = ColorConfig()
    optimizer: OptimizerConfig
    schedule: Schedule
    loss: LossConfig = LossConfig()
    ema: EmaConfig | None = None
    teacher: TeacherConfig | None = None
    save: SaveConfig = SaveConfig()


LOOP_KEYS = (*LoopSettings.model_fields, "start.learn", "start.head_factor", "model.remove_branches_at")


class LoopConfig(StrictModel):
    """Train all weights for several epochs; the settings are `LoopSettings`."""

    kind: Literal["loop"] = "loop"


class FewShotConfig(StrictModel):
    """Training for few images: a linear classifier on features of a frozen network.

    Attributes:
        folds: Folds of the cross-validation, at most the number of different images of the smallest class.
        group_copies: Whether near-duplicates share a fold; exact duplicates and given groups always do.
        head: What the classifier reads: the network's own vector, and the roots of the covariances of its
            last two feature maps; or the vector alone.
    """

    kind: Literal["few_shot"] = "few_shot"
    folds: Annotated[int, pydantic.Field(ge=2, le=20)] = 10
    group_copies: bool = True
    head: Literal["gap+isqrt", "gap"] = "gap+isqrt"


class AutoConfig(StrictModel):
    """Select `few_shot` for up to `FEW_IMAGES` training images, otherwise `loop`; see `select_procedure`."""

    kind: Literal["auto"] = "auto"


PROCEDURES = (AutoConfig, LoopConfig, FewShotConfig)
AnyProcedureConfig = Annotated[AutoConfig | LoopConfig | FewShotConfig, pydantic.Field(discriminator="kind")]
