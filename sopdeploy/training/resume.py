"""Resume a run from its checkpoint, with the same recipe and the same data."""

from dataclasses import replace
from pathlib import Path

import pydantic

from sopdeploy.checkpoint import Checkpoint, build_classifier, is_state_dict
from sopdeploy.config import first_problem
from sopdeploy.data.base import LabeledImages
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.recipe import Recipe, flatten, validate_recipe
from sopdeploy.training.run import Position, Run, assemble_run

CHANGEABLE_KEYS = {  # the recipe keys that may change when a run is resumed
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
    recipe: Recipe, images: LabeledImages, strategy: Strategy, checkpoint: Checkpoint, source: Path
) -> Run:
    """Rebuild the run of *checkpoint*, read from *source*.

    Raises `ConfigError` if the recipe changed, `DataError` if the data changed, and `CheckpointError` if the
    checkpoint has no valid state to resume from.
    """
    _check_same_recipe(recipe, checkpoint, source)
    if checkpoint.labels != images.labels:
        raise DataError(
            f"{source}: the run has the classes {', '.join(checkpoint.labels)}; give the same data"
        )
    state = checkpoint.resume
    if state is None:
        raise CheckpointError(f"{source}: has no state to resume from; start a new run in another folder")
    if state.get("train_count") != len(images):
        raise DataError(
            f"{source}: the run started with {state.get('train_count')} training images, now there are "
            f"{len(images)}; give the same data or start a new run"
        )
    raw = state.get("weights", checkpoint.weights)
    damaged = f"{source}: its state to resume from is damaged; start a new run"
    if not is_state_dict(raw):
        raise CheckpointError(damaged)
    model = build_classifier(replace(checkpoint, weights=raw), source)
    run = assemble_run(recipe, images, model, checkpoint.config, strategy)
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        if "precision" in state:
            run.precision.load_state_dict(state["precision"])
        if run.ema is not None:
            run.ema.load_state_dict(state["average"])
        run.position = Position.model_validate(state["position"])
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{source}: {first_problem(error)}; start a new run") from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(damaged) from error
    return run


def _check_same_recipe(recipe: Recipe, checkpoint: Checkpoint, source: Path) -> None:
    before = dict(flatten(recorded_recipe(checkpoint, source).model_dump(mode="json")))
    now = dict(flatten(recipe.model_dump(mode="json")))
    for key in sorted((before.keys() | now.keys()) - CHANGEABLE_KEYS):
        if now.get(key) != before.get(key):
            raise ConfigError(
                f"{source}: the run started with {key} = {before.get(key)}, now it is {now.get(key)}; "
                "resume with the same recipe or start a new run in another folder"
            )


def recorded_recipe(checkpoint: Checkpoint, source: Path) -> Recipe:
    """Return the recipe that *checkpoint*, read from *source*, was trained with."""
    return validate_recipe(checkpoint.training.get("recipe", {}), str(source))
