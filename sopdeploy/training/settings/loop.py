"""The settings of the training loop in a recipe; schedules and augmentation have their own files.

A recipe without `optimizer.kind` uses SGD. Weight decay applies to every parameter, as in the
papers. `clip_norm` limits the norm of the whole gradient; 0 disables clipping. Imports no
torch.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from sopdeploy.base.config import (
    Count,
    FractionBelowOne,
    NonNegative,
    Positive,
    PositiveRate,
    StrictModel,
    with_registered,
)
from sopdeploy.base.plugins import OPTIMIZERS
from sopdeploy.data.augment import Augmentations
from sopdeploy.models.registry import CatalogModel
from sopdeploy.training.settings.schedules import Schedule

Betas = tuple[FractionBelowOne, FractionBelowOne]


class OptimizerSettings(StrictModel):
    """Common settings; subclasses add the other arguments of their optimizer.

    One with `needs_whole_step` cannot add up the gradients of parts of a step, and is not used
    in fp16 or on a compiled network.
    """

    needs_whole_step: ClassVar[bool] = False
    lr: PositiveRate
    weight_decay: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.0
    clip_norm: NonNegative = 0.0
    kind: str


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

    With `tensorflow`, `eps` is added inside of the root and the mean of the squares starts at
    1, as in EfficientNet's code. With an `eps` of 1e-3, small gradients then have up to 32
    times shorter steps.
    """

    kind: Literal["rmsprop"]
    alpha: FractionBelowOne = 0.9
    momentum: FractionBelowOne = 0.9
    eps: Positive = 1e-3
    tensorflow: bool = False


class RegisteredOptimizer(OptimizerSettings, ABC):
    """The settings of an optimizer that a plug-in registers in `OPTIMIZERS`."""

    @abstractmethod
    def create(self, parameters: Any) -> Any:
        """Create the `torch.optim.Optimizer` for *parameters*, an iterable of them or of their groups."""


OptimizerConfig = Annotated[
    Sgd | AdamW | RAdam | RMSProp,
    pydantic.Field(discriminator="kind"),
    with_registered(OPTIMIZERS, RegisteredOptimizer),
    pydantic.SerializeAsAny(),
    pydantic.BeforeValidator(
        lambda value: {"kind": "sgd", **value} if isinstance(value, dict) else value
    ),
]


class TeacherConfig(StrictModel):
    """The teacher of knowledge distillation.

    `weights` is the checkpoint of a trained teacher, which does not change. Without it, the
    network `model` starts from random weights and is trained jointly, which needs
    `plugins/papers`: its own loss is added, and the student follows the outputs of each step.
    `share` is the weight of the divergence from the teacher's outputs in the loss of the student,
    and 1 - share the weight of the student's own loss. `temperature` softens both outputs, and
    its square scales the divergence.
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


class EmaConfig(StrictModel):
    """The decay of the averaged weights that are exported; in update n, at most (1 + n) / (10 + n)."""

    decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.999


class SaveConfig(StrictModel):
    """Minutes after which `last.pt` is also written within an epoch; 0 for only at its end."""

    every_minutes: NonNegative = 15.0


class StepSettings(StrictModel):
    """How a step computes its gradient; these settings are keys of the recipe itself.

    `batch_size` is the number of samples of a step, over all processes. A process divides its part
    into `grad_accum_steps` batches, one after the other, whose gradients are added up. It computes
    the statistics of batch norm for each of them. `precision` is the type of autocast; fp16 scales the
    loss by torch's `GradScaler`. With `compile`, torch compiles the network for training.
    """

    batch_size: Annotated[int, pydantic.Field(ge=2)]
    grad_accum_steps: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    loss: LossConfig = LossConfig()


class StartWeights(StrictModel):
    """The weights to start from.

    They are a checkpoint, a weight file that `sopdeploy import` reads, "imagenet" for the
    published weights of the backbone, or "none" for random ones (see `start_weights`).
    """

    weights: Literal["imagenet", "none"] | Path | None = None


class StartConfig(StartWeights):
    """The weights to start from, and which parameters are trained.

    `learn` names what is trained:

    - "all": everything,
    - "branches": the training-only parts, such as branches; batch norms elsewhere keep their
      statistics,
    - "classifier": the same parts, and the classifier,
    - "last_stages": the second half of the stages and what follows it; batch norms keep their
      statistics, except in training-only parts.

    With `keep_statistics` = "loaded", "last_stages" also updates the statistics of batch norms that
    the weights to start from do not have, such as in a new pooling. `new_classifier` = "zero" sets new
    classifiers to 0, also in branches, so that the first gradients of random weights do not
    change what was loaded (Kolesnikov et al., "Big Transfer", ECCV 2020).

    `head_factor` multiplies the learning rate of the classifier, `new_factor` the rate of other
    layers that the weights to start from do not have.

    `classifier_epochs` of the run are a first phase that trains what "classifier" trains, at
    the constant rate `classifier_lr`, by default the product of `optimizer.lr` and
    `head_factor`. The schedule begins after it.
    """

    learn: Literal["all", "branches", "classifier", "last_stages"] = "all"
    keep_statistics: Literal["all", "loaded"] = "all"
    new_classifier: Literal["random", "zero"] = "random"
    head_factor: PositiveRate = 1.0
    new_factor: PositiveRate = 1.0
    classifier_epochs: pydantic.NonNegativeInt = 0
    classifier_lr: PositiveRate | None = None

    @pydantic.model_validator(mode="after")
    def _check_classifier_lr(self) -> "StartConfig":
        if self.classifier_lr is not None and not self.classifier_epochs:
            raise ValueError("not used if classifier_epochs is 0; omit classifier_lr")
        return self


class UpdateSettings(StrictModel):
    """What learns in each epoch and how fast: the optimizer, its learning rates and the phases of a run."""

    epochs: Count
    optimizer: OptimizerConfig
    schedule: Schedule
    start: StartConfig | None = None

    @property
    def first_phase(self) -> int:
        """The number of epochs, from the first one, in which the classifier alone learns."""
        return 0 if self.start is None else self.start.classifier_epochs

    def start_of(self, epoch: int) -> StartConfig | None:
        """Return `start` with what learns in *epoch*, from 0."""
        if self.start is None or epoch >= self.first_phase:
            return self.start
        return self.start.model_copy(update={"learn": "classifier"})

    def learning_rate(self, time: float, factor: float = 1.0) -> float:
        """Compute the learning rate after *time* epochs of a group of parameters with this *factor*.

        In the first phase, only the classifier learns, with the constant rate of `StartConfig`.
        """
        if self.start is not None and time < self.first_phase:
            rate = self.start.classifier_lr
            return self.optimizer.lr * self.start.head_factor if rate is None else rate

        second_phase = self.epochs - self.first_phase
        return (
            self.optimizer.lr
            * self.schedule.factor(time - self.first_phase, second_phase)
            * factor
        )

    @property
    def frozen_backbone(self) -> bool:
        """Whether only the branches learn."""
        return self.start is not None and self.start.learn == "branches"


class LoopSettings(Augmentations, StepSettings, UpdateSettings):
    """The settings of the training loop and of its components."""

    ema: EmaConfig | None = None
    teacher: TeacherConfig | None = None
    validation: ValidationConfig = ValidationConfig()
    save: SaveConfig = SaveConfig()
