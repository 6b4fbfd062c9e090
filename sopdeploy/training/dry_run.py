"""Dry run: resolved values, counts, and two steps on the data."""

import time
from typing import Any

import torch

from sopdeploy.config import StrictModel
from sopdeploy.data.batches import load_batches
from sopdeploy.data.sources import open_data
from sopdeploy.models.describe import describe
from sopdeploy.models.stats import Counts
from sopdeploy.training.distributed.strategy import Strategy, select_device
from sopdeploy.training.loop import epoch_data
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import LoopRun
from sopdeploy.training.start_weights import create_initial_model
from sopdeploy.training.step.gradient import train_step
from sopdeploy.training.train import select_procedure


class DryRun(StrictModel):
    """The result of a dry run.

    `step_seconds` and `loss` belong to the second step. All figures describe the training loop, which trains
    on these images only if `procedure` is "loop".
    """

    recipe: dict[str, Any]
    device: str
    train_count: int
    held_out_count: int
    num_classes: int
    num_steps: int
    training: Counts
    shipped: Counts
    step_seconds: float
    loss: float
    procedure: str


def dry_run(recipe: Recipe) -> DryRun:
    """Resolve *recipe* and run two steps of it on its data, without writing anything."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    selected = select_procedure(recipe, open_data(recipe.data))
    data = selected.data
    strategy = Strategy(select_device(recipe.device))
    initial = create_initial_model(recipe, data.train.labels, strategy)
    run = LoopRun.create(data.train, strategy, initial)
    recipe = run.recipe
    dataset, batches = epoch_data(recipe, data.train, 0)
    batch = next(iter(load_batches(dataset, batches[:1], 0, run.strategy.device)))
    train_step(run, batch, batches[0], len(batches))
    since = time.monotonic()
    loss, _ = train_step(run, batch, batches[0], len(batches))
    loss_value = float(loss.total)  # waits for the device
    step_seconds = time.monotonic() - since
    described = {
        side: describe(recipe.model.name, image_size=side, num_classes=len(run.labels), **recipe.model.config)
        for side in {recipe.preprocess.crop, recipe.training_crop}
    }
    resolved = recipe.model_dump(mode="json")
    resolved["model"]["config"] = recipe.model.full_config()
    return DryRun(
        recipe=resolved,
        device=str(run.strategy.device),
        train_count=len(data.train),
        held_out_count=len(data.held_out),
        num_classes=len(run.labels),
        num_steps=len(batches),
        training=described[recipe.training_crop].training,
        shipped=described[recipe.preprocess.crop].shipped,
        step_seconds=step_seconds,
        loss=loss_value,
        procedure=selected.recipe.procedure.kind,
    )
