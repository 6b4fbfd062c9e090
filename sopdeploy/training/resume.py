"""Going on with a run: the same recipe, the same data, and everything that the checkpoint kept."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic

from sopdeploy.checkpoint import Checkpoint, build_classifier, is_state_dict
from sopdeploy.config import StrictModel, first_problem
from sopdeploy.data.base import LabeledImages, Split
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.training.distributed.strategy import Parallel
from sopdeploy.training.history import best_row
from sopdeploy.training.recipe import Recipe, validate
from sopdeploy.training.run import Position, Run, assemble
from sopdeploy.training.run_folder import RunFolder

MAY_CHANGE = {  # when a run is resumed
    "summary",
    "workers",
    "threads",
    "device",
    "data.cache",
    "data.path",
    "start.weights",
    "save.every_steps",
    "save.every_minutes",
    "save.keep_every",
}


def resume_run(
    recipe: Recipe, pictures: LabeledImages, parallel: Parallel, checkpoint: Checkpoint, where: Path
) -> Run:
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
    raw = resume.get("weights", checkpoint.weights)
    if not is_state_dict(raw):
        raise CheckpointError(f"{where}: its state to go on from is damaged; begin a new run")
    model = build_classifier(replace(checkpoint, weights=raw), where)
    run = assemble(recipe, pictures, model, checkpoint.config, parallel)
    try:
        run.optimizer.load_state_dict(resume["optimizer"])
        if "precision" in resume:
            run.precision.load_state_dict(resume["precision"])
        if run.average is not None:
            run.average.load_state_dict(resume["average"])
        run.at = Position.model_validate(resume["position"])
    except pydantic.ValidationError as problem:
        raise CheckpointError(f"{where}: {first_problem(problem)}; begin a new run") from problem
    except (KeyError, ValueError, TypeError, RuntimeError) as problem:
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


class TrainingResult(StrictModel):
    """What a finished run gave; shares are of the held-out pictures, `seconds` those of all its parts.

    `skipped` names the pictures that were left out because they cannot be read.
    """

    out: Path
    best: Path
    last: Path
    history: Path
    model: str
    classes: int
    train_count: int
    held_out_count: int
    skipped: tuple[str, ...]
    epochs: int
    best_epoch: int
    best_top1: float
    best_top5: float
    last_top1: float
    seconds: float


def summarise(run: Run, folder: RunFolder, data: Split) -> TrainingResult:
    """Return what the run gave."""
    history = run.at.history
    best = best_row(history)
    return TrainingResult(
        out=folder.path,
        best=folder.best,
        last=folder.last,
        history=folder.history,
        model=run.recipe.model.name,
        classes=len(run.labels),
        train_count=run.train_count,
        held_out_count=len(data.held_out),
        skipped=data.skipped,
        epochs=run.at.epoch,
        best_epoch=best.epoch,
        best_top1=best.figures.top1,
        best_top5=best.figures.top5,
        last_top1=history[-1].figures.top1,
        seconds=run.at.seconds,
    )
