"""Dry run: resolved values, learning rates, memory, and two steps on the data."""

import time
from typing import Any

import torch
from torch import Tensor

from sopdeploy.config import StrictModel
from sopdeploy.data.batches import Batch, load_batches
from sopdeploy.data.sources import open_data
from sopdeploy.models.describe import describe
from sopdeploy.models.stats import Counts
from sopdeploy.training.distributed.batch_sharding import MicroBatch, shard_step
from sopdeploy.training.distributed.strategy import Strategy, select_device
from sopdeploy.training.loop import epoch_data
from sopdeploy.training.precision import named_tensors
from sopdeploy.training.procedure import select_split
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Run, create_run
from sopdeploy.training.step.gradient import memory_advice, train_step

RATES = 9  # evenly spaced times, from the start of the run to its end


class Memory(StrictModel):
    """Memory in MiB; `activations` is what one micro-batch saves for the backward pass."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        """The sum, without the framework's own memory, workspaces and fragmentation."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


class DryRun(StrictModel):
    """The result of a dry run.

    `rates` are pairs (epoch, learning rate) at `RATES` times of the run.
    `step_seconds` and `loss` belong to the second step. All figures describe the training loop; with
    `few_shot`, the few-shot procedure replaces it for these images.
    """

    recipe: dict[str, Any]
    device: str
    train_count: int
    held_out_count: int
    classes: int
    steps: int
    rates: tuple[tuple[float, float], ...]
    training: Counts
    shipped: Counts
    memory: Memory
    step_seconds: float
    load_seconds: float
    loss: float
    few_shot: bool = False


def dry_run(recipe: Recipe) -> DryRun:
    """Resolve *recipe* and run two steps of it on its data, without writing anything."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    data = open_data(recipe.data)
    run = create_run(recipe, data.train, Strategy(select_device(recipe.device)))
    recipe = run.recipe
    dataset, batches = epoch_data(recipe, data.train, 0)
    since = time.monotonic()
    batch = next(iter(load_batches(dataset, batches[:1], 0, run.strategy.device)))
    load_seconds = time.monotonic() - since
    with memory_advice(run):
        activations = activation_bytes(
            run, batch, shard_step(batches[0], recipe, run.strategy).micro_batches[0]
        )
    train_step(run, batch, batches[0], len(batches))
    since = time.monotonic()
    loss = float(train_step(run, batch, batches[0], len(batches)).loss.total)  # synchronizes with the device
    step_seconds = time.monotonic() - since
    described = {
        side: describe(recipe.model.name, image_size=side, num_classes=len(run.labels), **recipe.model.config)
        for side in {recipe.preprocess.crop, recipe.training_crop}
    }
    times = [recipe.epochs * number / (RATES - 1) for number in range(RATES)]
    resolved = recipe.model_dump(mode="json")
    resolved["model"]["config"] = recipe.model.full_config()
    return DryRun(
        recipe=resolved,
        device=str(run.strategy.device),
        train_count=len(data.train),
        held_out_count=len(data.held_out),
        classes=len(run.labels),
        steps=len(batches),
        rates=tuple(
            (time, recipe.optimizer.lr * recipe.schedule.factor(time, recipe.epochs)) for time in times
        ),
        training=described[recipe.training_crop].training,
        shipped=described[recipe.preprocess.crop].shipped,
        memory=measure_memory(run, activations),
        step_seconds=step_seconds,
        load_seconds=load_seconds,
        loss=loss,
        few_shot=select_split(recipe, data)[1],
    )


def measure_memory(run: Run, activations: int) -> Memory:
    """Measure the memory of *run* after a step; *activations* are the bytes of the saved activations."""
    tensors = {
        "weights": list(run.trained().state_dict().values()),
        "gradients": list(run.trained().parameters()),
        "optimizer": [tensor for _, tensor in named_tensors(run.optimizer.state_dict()["state"], "")],
        "average": list(run.ema.model.state_dict().values()) if run.ema is not None else [],
    }
    sizes = {name: sum(tensor.nbytes for tensor in group) / 2**20 for name, group in tensors.items()}
    return Memory(**sizes, activations=activations / 2**20)


def activation_bytes(run: Run, batch: Batch, micro_batch: MicroBatch) -> int:
    """Measure the bytes that the forward pass of *micro_batch* of *batch* saves, without the weights."""
    saved: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in run.model.state_dict().values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = batch[0][micro_batch.first : micro_batch.end]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), run.precision.autocast():
        output = run.model(run.normalize(images))
    del output
    return sum(size for pointer, size in saved.items() if pointer not in weights)
