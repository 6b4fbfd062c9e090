"""One run in memory: the network, its optimizer and how far it is; a checkpoint is its picture on disk.

Order, augmentation, dropout and learning rate are functions of (seed, epoch, step), so that weights,
momentum and position are all that a resumed run needs to go on bit for bit.
"""

import platform
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pydantic
import torch
from torch import nn
from torch.optim import Optimizer

import sopdeploy
from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.data.base import LabeledImages
from sopdeploy.environment import machine
from sopdeploy.evaluation.prediction import EvalMetrics
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model
from sopdeploy.seeds import derive_seed
from sopdeploy.training.diagnostics import Sight
from sopdeploy.training.distributed.batch_sharding import share_batches
from sopdeploy.training.distributed.strategy import Parallel
from sopdeploy.training.ema import ExponentialMovingAverage
from sopdeploy.training.fine_tuning import parameter_groups, take_weights
from sopdeploy.training.history import EpochRow, Speed, best_row
from sopdeploy.training.losses import Loss, Teacher
from sopdeploy.training.precision import Precision, float_buffers, must_be_finite
from sopdeploy.training.recipe import Recipe

SHORTEST = 1e-9  # seconds


class StepResult(NamedTuple):
    """What a step gave: its loss, and the norm of its gradient before it is clipped."""

    loss: Loss
    gradient: float


class Position(StrictModel):
    """How far a run is: whole epochs, steps of the next one, and what has been counted on the way.

    `sums` are the parts of the loss and `gradient` its gradient's norm, added up over the `seen` pictures of
    the epoch under way; `learning` are the seconds of its steps, `waiting` those of them without pictures.
    """

    epoch: int = 0
    step: int = 0
    seen: int = 0
    sums: dict[str, float] = pydantic.Field(default_factory=dict)
    gradient: float = 0.0
    learning: float = 0.0
    waiting: float = 0.0
    seconds: float = 0.0
    history: tuple[EpochRow, ...] = ()


@dataclass(slots=True)
class Run:
    """A run under way. `network` computes in training: `model` itself, or what wraps or compiles it."""

    recipe: Recipe
    labels: tuple[str, ...]
    train_count: int
    parallel: Parallel
    normalise: Normalize
    precision: Precision
    config: dict[str, Any]
    model: Classifier
    network: nn.Module
    optimizer: Optimizer
    average: ExponentialMovingAverage | None = None
    teacher: Teacher | None = None
    at: Position = field(default_factory=Position)

    def place(self, model: Classifier, config: dict[str, Any]) -> None:
        """Learn with *model*, the catalog's network of *config*, from here on, with a fresh optimizer."""
        self.config = config
        self.model, self.network, self.optimizer = placed(self.recipe, model, self.parallel)

    def after_step(self, step: StepResult, count: int, seconds: float, waited: float) -> None:
        """Move one step on, which took *seconds*, of which it *waited* for its *count* pictures."""
        at = self.at
        parts = {"loss": step.loss.total, **step.loss.parts}
        sums = {name: at.sums.get(name, 0.0) + float(part) * count for name, part in parts.items()}
        self.at = at.model_copy(
            update={
                "step": at.step + 1,
                "seen": at.seen + count,
                "sums": sums,
                "gradient": at.gradient + step.gradient * count,
                "learning": at.learning + seconds,
                "waiting": at.waiting + waited,
                "seconds": at.seconds + seconds,
            }
        )

    def after_epoch(
        self, raw: EvalMetrics, average: EvalMetrics | None, sight: Sight, seconds: float
    ) -> EpochRow:
        """Move to the start of the next epoch; return what this one gave."""
        at = self.at
        row = EpochRow(
            epoch=at.epoch + 1,
            lr=self.optimizer.param_groups[0]["lr"],
            losses={name: total / at.seen for name, total in at.sums.items()},
            figures=average if average is not None and self.exports() == "average" else raw,
            gradient=at.gradient / at.seen,
            speed=Speed(
                pictures_per_second=at.seen / max(at.learning, SHORTEST),
                waiting=min(1.0, at.waiting / max(at.learning, SHORTEST)),
            ),
            sight=sight,
            raw=raw if average is not None else None,
            average=average,
            seconds=at.seconds + seconds,
        )
        self.at = Position(epoch=at.epoch + 1, seconds=row.seconds, history=(*at.history, row))
        return row

    def settle(self) -> None:
        """Make the networks of all processes the same: batch norms of their own have statistics of their own.

        The mean of running statistics is what they would have become from the mean of the batches', so that
        it does not matter when it is taken.
        """
        if self.parallel.world > 1 and self.recipe.batch_norm == "local":
            for model in [self.model, *([self.average.model] if self.average else [])]:
                for buffer in float_buffers(model).values():
                    buffer.copy_(self.parallel.all_reduce(buffer) / self.parallel.world)

    def is_best(self) -> bool:
        """Say whether the last finished epoch is the best so far."""
        return bool(self.at.history) and best_row(self.at.history).epoch == self.at.epoch

    def exports(self) -> str:
        """Return which weights a checkpoint carries for use: `raw` or `average`."""
        return self.recipe.ema.export if self.recipe.ema is not None else "raw"

    def checkpoint(self, *, resumable: bool) -> Checkpoint:
        """Return the run as it is written; raises `TrainingError` where a number is no longer finite."""
        self.settle()
        raw = self.model.state_dict()
        average = self.average.state_dict() if self.average is not None else None
        weights = average["weights"] if average is not None and self.exports() == "average" else raw
        resume = None
        if resumable:
            resume = {
                "position": self.at.model_dump(mode="json"),
                "optimizer": self.optimizer.state_dict(),
                "train_count": self.train_count,
                "precision": self.precision.state_dict(),
                "weights": raw,
                "average": average,
            }
        must_be_finite({"weights": raw, "average": average, **(resume or {})})
        return Checkpoint(
            model=self.recipe.model.name,
            config=self.config,
            weights=weights,
            labels=self.labels,
            preprocess=self.recipe.preprocess,
            training=self.record(),
            resume=resume,
        )

    def record(self) -> dict[str, Any]:
        """Return how the weights came about, for whoever reads the checkpoint later."""
        history = self.at.history
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.recipe.seed,
            "epoch": self.at.epoch,
            "step": self.at.step,
            "weights": self.exports(),
            "figures": history[-1].figures.model_dump() if history else None,
            "versions": {
                "sopdeploy": sopdeploy.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "machine": {
                **{name: fact for name, fact in machine().items() if name != "load"},
                "device": device_name(self.parallel.device),
                "processes": self.parallel.world,
            },
        }


def device_name(device: torch.device) -> str:
    """Return what computes: `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def start_run(recipe: Recipe, pictures: LabeledImages, parallel: Parallel) -> Run:
    """Return a run with fresh weights, at its start."""
    model = fresh_model(recipe, len(pictures.labels))
    return assemble(recipe, pictures, model, recipe.model.full_config(), parallel)


def fresh_model(recipe: Recipe, classes: int) -> Classifier:
    """Return the network that *recipe* begins with by itself."""
    torch.manual_seed(derive_seed(recipe.seed, "weights"))
    model = create_model(recipe.model.name, num_classes=classes, **recipe.model.config)
    if recipe.start is not None:
        take_weights(recipe.start, model)
    return model


def assemble(
    recipe: Recipe, pictures: LabeledImages, model: Classifier, config: dict[str, Any], parallel: Parallel
) -> Run:
    """Put *model*, its optimizer and its normalisation where the recipe wants them."""
    model, network, optimizer = placed(recipe, model, parallel)
    teacher = None
    if recipe.teacher is not None:
        teacher = Teacher(recipe.teacher, pictures.labels, recipe.preprocess, parallel.device)
    return Run(
        recipe=recipe,
        labels=pictures.labels,
        train_count=len(pictures),
        parallel=parallel,
        normalise=Normalize(recipe.preprocess).to(parallel.device),
        precision=Precision(recipe.precision, parallel.device),
        config=config,
        model=model,
        network=network,
        optimizer=optimizer,
        average=ExponentialMovingAverage(recipe.ema, model) if recipe.ema is not None else None,
        teacher=teacher,
    )


def placed(recipe: Recipe, model: Classifier, parallel: Parallel) -> tuple[Classifier, nn.Module, Optimizer]:
    """Return *model* on its device, what computes it in training, and its optimizer."""
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    model = model.to(parallel.device, memory_format=layout).train()  # type: ignore[call-overload]
    share_batches(model, recipe.batch_norm, parallel.world, parallel.rows)
    network = parallel.setup(model)
    if recipe.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    return model, network, recipe.optimizer.make(parameter_groups(model, recipe.start))
