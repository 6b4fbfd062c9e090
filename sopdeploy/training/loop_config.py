"""The keys of a recipe that only the training loop reads."""

from typing import Annotated, ClassVar, Literal

import pydantic

from sopdeploy.config import Count, FractionBelowOne, NonNegative, StrictModel
from sopdeploy.data.augment import Augmentation, ColorJitter, Mixup, RandAugment
from sopdeploy.training.ema import EmaConfig
from sopdeploy.training.epoch_choice import LoopResult
from sopdeploy.training.optimizers import OptimizerConfig
from sopdeploy.training.procedure_config import ProcedureConfig
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
    many micro-batches. `batch_norm` computes statistics per process ("local"), over the whole micro-batch
    ("global"), or uses the running statistics ("frozen"). `sampler` "balanced" draws all classes equally
    often.
    """

    epochs: Count
    batch_size: Annotated[int, pydantic.Field(ge=2)]
    accumulate: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    batch_norm: Literal["local", "global", "frozen"] = "local"
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    augment: Augmentation
    color: ColorJitter = ColorJitter()
    rand_augment: RandAugment = RandAugment()
    mix: Mixup = Mixup()
    optimizer: OptimizerConfig
    schedule: Schedule
    loss: LossConfig = LossConfig()
    ema: EmaConfig | None = None
    teacher: TeacherConfig | None = None
    save: SaveConfig = SaveConfig()


LOOP_KEYS = (*LoopSettings.model_fields, "start.learn", "start.head_factor", "model.remove_branches_at")


class LoopConfig(ProcedureConfig):
    """Train all weights for several epochs; the settings are `LoopSettings`."""

    implementation: ClassVar[str] = "sopdeploy.training.loop:TrainingLoop"
    result: ClassVar[type[LoopResult]] = LoopResult
    kind: Literal["loop"] = "loop"
