"""One run in memory: the network, its optimizer and how far it is; a checkpoint is its picture on disk.

Order, augmentation, dropout and learning rate are functions of (seed, epoch, step), so that weights,
momentum and position are all that a resumed run needs to go on bit for bit.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

import sopdeploy
from sopdeploy.checkpoint import Checkpoint, build_classifier
from sopdeploy.data.base import Pictures
from sopdeploy.errors import CheckpointError, ConfigError, DataError, TrainingError
from sopdeploy.evaluate import Figures
from sopdeploy.frozen import Frozen, first_problem
from sopdeploy.losses import Loss
from sopdeploy.models.base import Classifier
from sopdeploy.models.catalog import create_model
from sopdeploy.normalise import Normalise
from sopdeploy.recipe import Recipe, validate
from sopdeploy.seeds import seed_of
from sopdeploy.training.history import EpochRow, best_row
from sopdeploy.training.parallel import choose_device

MAY_CHANGE = {"summary", "workers", "threads", "device", "data.path"}  # when a run is resumed


class Position(Frozen):
    """How far a run is: whole epochs, steps of the next one, and what has been counted on the way.

    `sums` are the parts of the loss, added up over the `seen` pictures of the epoch under way.
    """

    epoch: int = 0
    step: int = 0
    seen: int = 0
    sums: dict[str, float] = pydantic.Field(default_factory=dict)
    seconds: float = 0.0
    history: tuple[EpochRow, ...] = ()


@dataclass(slots=True)
class Run:
    """A run under way."""

    recipe: Recipe
    labels: tuple[str, ...]
    train_count: int
    model: Classifier
    optimizer: torch.optim.SGD
    normalise: Normalise
    device: torch.device
    at: Position = field(default_factory=Position)

    def after_step(self, loss: Loss, count: int, seconds: float) -> None:
        """Move one step on."""
        at = self.at
        parts = {"loss": loss.total, **loss.parts}
        sums = {name: at.sums.get(name, 0.0) + float(part) * count for name, part in parts.items()}
        self.at = at.model_copy(
            update={
                "step": at.step + 1,
                "seen": at.seen + count,
                "sums": sums,
                "seconds": at.seconds + seconds,
            }
        )

    def after_epoch(self, figures: Figures, seconds: float) -> EpochRow:
        """Move to the start of the next epoch; return what this one gave."""
        at = self.at
        row = EpochRow(
            epoch=at.epoch + 1,
            lr=self.optimizer.param_groups[0]["lr"],
            losses={name: total / at.seen for name, total in at.sums.items()},
            figures=figures,
            seconds=at.seconds + seconds,
        )
        self.at = Position(epoch=at.epoch + 1, seconds=row.seconds, history=(*at.history, row))
        return row

    def is_best(self) -> bool:
        """Say whether the last finished epoch is the best so far."""
        return best_row(self.at.history).epoch == self.at.epoch

    def checkpoint(self, *, resumable: bool) -> Checkpoint:
        """Return the run as it is written; raises `TrainingError` where a weight is no longer finite."""
        weights = self.model.state_dict()
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"epoch {self.at.epoch}: {name} is no longer finite; lower optimizer.lr "
                    "or set optimizer.clip_norm"
                )
        return Checkpoint(
            model=self.recipe.model.name,
            config=self.recipe.model.full_config(),
            weights=weights,
            labels=self.labels,
            preprocess=self.recipe.preprocess,
            training=self.record(),
            resume=self.resume_record() if resumable else None,
        )

    def record(self) -> dict[str, Any]:
        """Return how the weights came about, for whoever reads the checkpoint later."""
        history = self.at.history
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.recipe.seed,
            "epoch": self.at.epoch,
            "step": self.at.step,
            "figures": history[-1].figures.model_dump() if history else None,
            "versions": {
                "sopdeploy": sopdeploy.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }

    def resume_record(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights."""
        return {
            "position": self.at.model_dump(mode="json"),
            "optimizer": self.optimizer.state_dict(),
            "train_count": self.train_count,
        }


def start_run(recipe: Recipe, pictures: Pictures) -> Run:
    """Return a run with fresh weights, at its start."""
    torch.manual_seed(seed_of(recipe.seed, "weights"))
    model = create_model(recipe.model.name, num_classes=len(pictures.labels), **recipe.model.config)
    return assemble(recipe, pictures, model)


def resume_run(recipe: Recipe, pictures: Pictures, checkpoint: Checkpoint, where: Path) -> Run:
    """Return the run of *checkpoint*, read from *where*, at the step where it was saved.

    Raises `ConfigError` where the recipe, `DataError` where the data is another one than when it began.
    """
    must_be_same_recipe(recipe, checkpoint, where)
    if checkpoint.labels != pictures.labels:
        raise DataError(
            f"{where}: the run has the classes {', '.join(checkpoint.labels)}; give the same data"
        )
    resume = checkpoint.resume
    if resume is None:
        raise CheckpointError(f"{where}: holds no state to go on from; begin a new run in another folder")
    if resume.get("train_count") != len(pictures):
        raise DataError(
            f"{where}: the run began with {resume.get('train_count')} training pictures, there are "
            f"{len(pictures)} now; give the same data or begin a new run"
        )
    run = assemble(recipe, pictures, build_classifier(checkpoint, where))
    try:
        run.optimizer.load_state_dict(resume["optimizer"])
        run.at = Position.model_validate(resume["position"])
    except pydantic.ValidationError as problem:
        raise CheckpointError(f"{where}: {first_problem(problem)}; begin a new run") from problem
    except (KeyError, ValueError, TypeError) as problem:
        raise CheckpointError(f"{where}: its state to go on from is damaged; begin a new run") from problem
    return run


def must_be_same_recipe(recipe: Recipe, checkpoint: Checkpoint, where: Path) -> None:
    """Raise `ConfigError` naming the first key in which *recipe* differs from the run's."""
    began = dict(flat(recorded_recipe(checkpoint, where).model_dump(mode="json")))
    now = dict(flat(recipe.model_dump(mode="json")))
    for key in sorted((began.keys() | now.keys()) - MAY_CHANGE):
        if now.get(key) != began.get(key):
            raise ConfigError(
                f"{where}: the run began with {key} = {began.get(key)}, now it is {now.get(key)}; "
                "go on with the same recipe or begin a new run in another folder"
            )


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of *table* and of the tables in it under dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def recorded_recipe(checkpoint: Checkpoint, where: Path) -> Recipe:
    """Return the recipe that *checkpoint* was trained with."""
    return validate(checkpoint.training.get("recipe", {}), str(where))


def assemble(recipe: Recipe, pictures: Pictures, model: Classifier) -> Run:
    """Put *model*, its optimizer and its normalisation where the recipe wants them."""
    device = choose_device(recipe.device)
    model = model.to(device).train()
    sgd = recipe.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=sgd.lr,
        momentum=sgd.momentum,
        nesterov=sgd.nesterov,
        weight_decay=sgd.weight_decay,
    )
    normalise = Normalise(recipe.preprocess).to(device)
    return Run(recipe, pictures.labels, len(pictures), model, optimizer, normalise, device)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    """Return the gradients of the parameters that have one."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
