"""The state of a run in memory, and its conversion to a checkpoint and back.

Sample order, augmentation, dropout and learning rate are functions of (seed, epoch, step). Weights, optimizer
state and position are therefore enough to resume a run bit for bit.
"""

import copy
import operator
import platform
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.data.base import LabeledImages
from sopdeploy.decision import Activation, Decision
from sopdeploy.environment import machine
from sopdeploy.errors import ConfigError, DataError, TrainingError, first_line, is_out_of_memory
from sopdeploy.evaluation.multi_label import DEFAULT_THRESHOLD, MultiLabelMetrics
from sopdeploy.evaluation.prediction import HeldOutMetrics
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier
from sopdeploy.plugins import makers
from sopdeploy.project import Origin
from sopdeploy.training.diagnostics import Diagnostics, EpochRow, Throughput
from sopdeploy.training.distributed.batch_sharding import replace_batch_norms
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.ema import ExponentialMovingAverage
from sopdeploy.training.fine_tuning import parameter_groups, set_train_mode
from sopdeploy.training.precision import MixedPrecision
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.results import AnyProcedureResult
from sopdeploy.training.start_weights import InitialModel, StartReport, create_initial_model
from sopdeploy.training.step.losses import Loss, Teacher
from sopdeploy.version import __version__


class Position(StrictModel, frozen=False):
    """The progress of a run, as checkpoints contain it; steps change it in place.

    `step` is the number of finished steps in the current epoch and `seen` the number of their images. Over
    these images, `sums` adds up the parts of the loss and `gradient` the gradient norms; `component_counts`
    counts the images that each component of a gated network received. `train_seconds` is the time of these
    steps, `data_seconds` the part of it spent waiting for data, and `seconds` the time of the whole run.
    """

    epoch: int = 0
    step: int = 0
    seen: int = 0
    sums: dict[str, float] = pydantic.Field(default_factory=dict)
    gradient: float = 0.0
    component_counts: tuple[int, ...] = ()
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    seconds: float = 0.0
    history: tuple[EpochRow, ...] = ()


@dataclass
class Run:
    """A run in progress; `network` is `model` or its compiled form, `groups` are the optimizer's parameters.

    `name` is the catalog name of `model`. A procedure that has ended sets its `result` and `decision`, and in
    `state` the tensors that `last.pt` contains for it. `image_hashes` and `origin` are those of a checkpoint.
    """

    recipe: Recipe
    labels: tuple[str, ...]
    activation: Activation
    train_count: int
    strategy: Strategy
    name: str
    normalize: Normalize
    precision: MixedPrecision
    model: Classifier
    network: nn.Module
    groups: list[dict[str, Any]]
    ema: ExponentialMovingAverage | None = None
    teacher: Teacher | None = None
    start: StartReport | None = None
    position: Position = field(default_factory=Position)
    result: AnyProcedureResult | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    decision: Decision | None = None
    image_hashes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    origin: Origin | None = None

    @cached_property
    def optimizer(self) -> Optimizer:
        """The optimizer; it is created when a procedure needs it, because this imports torch's compiler."""
        return self.recipe.optimizer.create(self.groups)

    @property
    def exported(self) -> Classifier:
        """The model with the weights that are evaluated and exported: their average, if there is one."""
        model: Classifier = self.model if self.ema is None else self.ema.model
        return model

    def trained(self) -> nn.Module:
        """Return the module that learns: the model, together with its teacher if both are trained jointly."""
        if self.teacher is None or not self.teacher.learns:
            return self.model
        return nn.ModuleDict({"model": self.model, "teacher": self.teacher.model})

    def after_step(
        self, loss: Loss, gradient_norm: float, count: int, *, seconds: float, waited: float
    ) -> None:
        """Add a step of *count* images to the position; it took *seconds*, *waited* of them for data."""
        position = self.position
        for name, part in {"loss": loss.total, **loss.parts}.items():
            position.sums[name] = position.sums.get(name, 0.0) + float(part) * count
        if loss.component_counts is not None:
            before = position.component_counts or (0,) * len(loss.component_counts)
            position.component_counts = tuple(map(operator.add, before, loss.component_counts.tolist()))
        position.step += 1
        position.seen += count
        position.gradient += gradient_norm * count
        position.train_seconds += seconds
        position.data_seconds += waited
        position.seconds += seconds

    def after_epoch(self, metrics: HeldOutMetrics, diagnostics: Diagnostics, seconds: float) -> None:
        """Record the metrics of an epoch, whose evaluation took *seconds*."""
        done = self.position
        train_seconds = max(done.train_seconds, 1e-9)
        row = EpochRow(
            epoch=done.epoch + 1,
            lr=self.optimizer.param_groups[0]["lr"],
            losses={name: total / done.seen for name, total in done.sums.items()},
            metrics=metrics,
            gradient=done.gradient / done.seen,
            component_counts=done.component_counts,
            speed=Throughput(
                images_per_second=done.seen / train_seconds,
                data_fraction=min(1.0, done.data_seconds / train_seconds),
            ),
            diagnostics=diagnostics,
            seconds=done.seconds + seconds,
        )
        self.position = Position(epoch=row.epoch, seconds=row.seconds, history=(*done.history, row))

    def synchronize_buffers(self) -> None:
        """Average the running statistics of local batch norms over processes.

        The running statistics are linear in those of the batches, so averaging once gives the same result
        as averaging in every step.
        """
        if self.strategy.world == 1 or self.recipe.batch_norm != "local":
            return
        for model in [self.trained(), *([self.ema.model] if self.ema else [])]:
            for buffer in filter(torch.is_floating_point, model.buffers()):
                buffer.copy_(self.strategy.all_reduce(buffer) / self.strategy.world)

    def replace_model(self, name: str, model: Classifier) -> None:
        """Replace the model by *model*, named *name*; parts that both have keep their optimizer state.

        The averages of such parts are kept, too.
        """
        states = {}
        if "optimizer" in self.__dict__:
            states = {
                part: self.optimizer.state[parameter]
                for part, parameter in self.trained().named_parameters()
                if parameter in self.optimizer.state
            }
            del self.optimizer
        self.name = name
        self.model, self.network, self.groups = _prepare(self.recipe, model, self.strategy, self.teacher)
        for part, parameter in self.trained().named_parameters():
            if part in states:
                self.optimizer.state[parameter] = states[part]
        if self.ema is not None:
            averages = self.ema.model.state_dict()
            self.ema.model = copy.deepcopy(self.model).requires_grad_(False)
            self.ema.model.load_state_dict({part: averages[part] for part in self.model.state_dict()})

    def start_epoch(self) -> None:
        """Replace the model if this epoch trains another one (`model.remove_branches_at`)."""
        model = self.recipe.model.network_of(self.position.epoch, self.model)
        if model is not self.model:
            self.replace_model(self.name, model)

    def checkpoint(self, *, resumable: bool) -> Checkpoint:
        """Build a checkpoint; raise `TrainingError` if it would contain a NaN or infinity."""
        self.synchronize_buffers()
        raw = self.model.state_dict()
        average = self.ema.state_dict() if self.ema is not None else None
        resume = None
        if resumable:
            resume = {
                "position": self.position.model_dump(mode="json"),
                "optimizer": self.optimizer.state_dict() if "optimizer" in self.__dict__ else {},
                "train_count": self.train_count,
                "precision": self.precision.state_dict(),
                "weights": raw,
                "average": average,
                "procedure": self.state,
            }
            if self.teacher is not None and self.teacher.learns:
                resume["teacher"] = self.teacher.model.state_dict()
        saved = tree_leaves({"weights": raw, "average": average, "resume": resume})
        if not all(bool(value.isfinite().all()) for value in saved if isinstance(value, Tensor)):
            raise TrainingError(
                "weights or optimizer state are not finite; nothing was saved, lower optimizer.lr or set "
                "optimizer.clip_norm"
            )
        return Checkpoint(
            model=self.name,
            config=self.model.config.model_dump(mode="json"),
            weights=average["weights"] if average else raw,
            labels=self.labels,
            preprocess=self.recipe.preprocess,
            training=self._training_record(),
            resume=resume,
            decision=self.decision or self._multi_label_decision(),
            image_hashes=self.image_hashes,
            project=self.recipe.project or "",
            origin=self.origin,
        )

    def _multi_label_decision(self) -> Decision | None:
        """Build the decision of a multi-label network, with the thresholds of the last finished epoch."""
        if self.activation == "softmax":
            return None
        metrics = self.position.history[-1].metrics if self.position.history else None
        fitted = metrics.thresholds if isinstance(metrics, MultiLabelMetrics) else None
        return Decision(activation="sigmoid", thresholds=fitted or (DEFAULT_THRESHOLD,) * len(self.labels))

    def _training_record(self) -> dict[str, Any]:
        """Describe how the weights were trained."""
        history, device = self.position.history, self.strategy.device
        plugins = makers([*self.model.modules(), self.recipe.data])
        start = {} if self.start is None else {"start": self.start.model_dump(mode="json")}
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            **start,
            "seed": self.recipe.seed,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "weights": "raw" if self.ema is None else "average",
            "metrics": history[-1].metrics.model_dump() if history else None,
            **({} if self.result is None else {"procedure": self.result.model_dump(mode="json")}),
            "versions": {
                "sopdeploy": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            **({"plugins": plugins} if plugins else {}),
            "machine": {
                **{name: fact for name, fact in machine().items() if name != "load"},
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "processes": self.strategy.world,
            },
        }


def create_run(
    recipe: Recipe,
    images: LabeledImages,
    strategy: Strategy,
    initial: InitialModel | None = None,
) -> Run:
    """Create a run that trains *initial*, by default the model of *recipe* with its initial weights.

    Raises `ConfigError` for settings that need one class per image, if images have several, and for a size
    of the images that the network cannot compute; `DataError` for a single image.
    """
    if len(images) < 2:
        raise DataError("there is only one training image; add another, a step needs two")
    activation: Activation = "sigmoid" if images.targets.ndim == 2 else "softmax"
    if activation == "sigmoid" and recipe.sampler == "balanced":
        raise ConfigError('sampler: "balanced" needs one class per image; use sampler = "shuffled"')
    if activation == "sigmoid" and recipe.teacher is not None:
        raise ConfigError("teacher: distillation needs one class per image; remove the table")
    if initial is None:
        initial = create_initial_model(recipe, images.labels, strategy)
    model, recipe, start = initial
    teacher = None
    if recipe.teacher is not None:
        teacher = Teacher(
            recipe.teacher, images.labels, recipe.preprocess, recipe.loss.label_smoothing, recipe.seed
        )
    model, network, groups = _prepare(recipe, model, strategy, teacher)
    return Run(
        recipe=recipe,
        labels=images.labels,
        activation=activation,
        train_count=len(images),
        strategy=strategy,
        name=recipe.model.name,
        normalize=Normalize(recipe.preprocess).to(strategy.device),
        precision=MixedPrecision(recipe.precision, strategy.device),
        model=model,
        network=network,
        groups=groups,
        ema=ExponentialMovingAverage(recipe.ema, model) if recipe.ema is not None else None,
        teacher=teacher,
        start=start,
    )


@torch.no_grad()
def _check_image_sizes(recipe: Recipe, model: Classifier, device: torch.device) -> None:
    """Run *model* on one black image of each size of *recipe*; raise `ConfigError` if it cannot."""
    model.eval()
    for side in {recipe.preprocess.crop, recipe.training_crop}:
        try:
            model(torch.zeros(1, 3, side, side, device=device))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"preprocess.crop: {recipe.model.name} cannot compute images of {side} pixels "
                f"({first_line(error)}); choose another size"
            ) from error


def _prepare(
    recipe: Recipe, model: Classifier, strategy: Strategy, teacher: Teacher | None
) -> tuple[Classifier, nn.Module, list[dict[str, Any]]]:
    """Move *model* and *teacher* to the device; return the model, the module to call, and what it learns."""
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    model = model.to(strategy.device, memory_format=layout)  # type: ignore[call-overload]
    replace_batch_norms(model, recipe.batch_norm, strategy.world)
    _check_image_sizes(recipe, model, strategy.device)
    set_train_mode(model, recipe.start)
    groups = parameter_groups(model, recipe.start)
    if teacher is not None:
        teacher.model.to(strategy.device, memory_format=layout)  # type: ignore[call-overload]
        if teacher.learns:
            replace_batch_norms(teacher.model, recipe.batch_norm, strategy.world)
            groups.append({"params": list(teacher.model.parameters())})
    network: Any = torch.compile(model) if recipe.compile else model
    return model, network, groups
