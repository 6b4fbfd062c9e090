"""Rebuild a run from its checkpoint, and check that recipe and data are those it started with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic

from sopdeploy.checkpoint import Checkpoint, build_classifier, is_state_dict
from sopdeploy.config import first_problem
from sopdeploy.data.base import LabeledImages
from sopdeploy.errors import CheckpointError, DataError, shorten
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.procedure import read_record
from sopdeploy.training.recipe import Recipe, check_same_recipe
from sopdeploy.training.run import Position, Run, create_run
from sopdeploy.training.start_weights import InitialModel, StartReport, complete_preprocess


def resume_run(
    recipe: Recipe, images: LabeledImages, strategy: Strategy, checkpoint: Checkpoint, source: Path
) -> Run:
    """Rebuild the run of *checkpoint*, read from *source*.

    Raises `ConfigError` if the recipe changed, `DataError` if the data changed, and `CheckpointError` if the
    checkpoint has no valid state to resume from.
    """
    recipe = complete_preprocess(recipe, checkpoint.preprocess)
    check_same_recipe(recipe, checkpoint.training.get("recipe", {}), source)
    if checkpoint.labels != images.labels:
        raise DataError(
            f"{source}: the run started with the classes {shorten(checkpoint.labels)}; give the same data"
        )
    state = checkpoint.resume
    if state is None:
        raise CheckpointError(f"{source}: has no state to resume from; start a new run in another folder")
    if state.get("train_count") != len(images):
        raise DataError(
            f"{source}: the run started with {state.get('train_count')} training images, now there are "
            f"{len(images)}; give the same data or start a new run"
        )
    raw: Any = state.get("weights")
    damaged = f"{source}: its state to resume from is damaged; start a new run"
    if not is_state_dict(raw):
        raise CheckpointError(damaged)
    model = build_classifier(replace(checkpoint, weights=raw), source)
    try:
        start = checkpoint.training.get("start")
        initial = InitialModel(model, recipe, None if start is None else StartReport.model_validate(start))
        run = create_run(recipe, images, strategy, initial)
        run.name, run.config = checkpoint.model, checkpoint.config
        run.precision.load_state_dict(state["precision"])
        if run.ema is not None:
            run.ema.load_state_dict(state["average"])
        if run.teacher is not None and run.teacher.learns:
            run.teacher.model.load_state_dict(state["teacher"])
        run.position = Position.model_validate(state["position"])
        run.few_shot = read_record(checkpoint.training)
        if run.few_shot is None:
            run.optimizer.load_state_dict(state["optimizer"])
        else:
            run.out_of_fold, run.image_groups = state.get("out_of_fold"), state.get("groups")
            run.decision = checkpoint.decision
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{source}: {first_problem(error)}; start a new run") from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(damaged) from error
    return run
