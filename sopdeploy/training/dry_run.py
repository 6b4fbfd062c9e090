"""A run without the run: what the recipe resolves to, what it costs in memory, and two real steps of it."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sopdeploy.config import StrictModel
from sopdeploy.data.base import LabeledImages
from sopdeploy.data.batches import Batch, load_batches
from sopdeploy.data.sources import open_data
from sopdeploy.models.describe import describe
from sopdeploy.models.stats import Counts
from sopdeploy.training.distributed.strategy import SingleProcess, choose_device
from sopdeploy.training.loop import epoch_batches, epoch_view, train_step
from sopdeploy.training.precision import tensors_of
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Run, start_run

MEBIBYTE = 2**20


class Memory(StrictModel):
    """MiB: what stays through the run, and what one piece of a step keeps for its backward."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        """Return the sum; a framework's own memory, workspaces and fragmentation come on top."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


class DryRun(StrictModel):
    """`rates` are (epoch, learning rate) where the schedule turns; `step_seconds` is that of the second step.

    `loss` is that of the second step too.
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


def dry_run(recipe: Recipe) -> DryRun:
    """Return what *recipe* would do, after two steps of it on the real data; nothing is written."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    data = open_data(recipe.data)
    run = start_run(recipe, data.train, SingleProcess(choose_device(recipe.device)))
    batches = epoch_batches(recipe, data.train, 0)
    since = time.monotonic()
    batch = first_batch(run, data.train, batches)
    loaded = time.monotonic() - since
    activations = activation_bytes(run, batch)
    train_step(run, batch, batches[0], len(batches))
    since = time.monotonic()
    loss = float(train_step(run, batch, batches[0], len(batches)).loss.total)  # waits for the device
    seconds = time.monotonic() - since
    name, side = recipe.model.name, recipe.preprocess.crop
    described = describe(name, image_size=side, num_classes=len(run.labels), **recipe.model.config)
    return DryRun(
        recipe=resolved(recipe),
        device=str(run.parallel.device),
        train_count=len(data.train),
        held_out_count=len(data.held_out),
        classes=len(run.labels),
        steps=len(batches),
        rates=rates(recipe),
        training=described.training,
        shipped=described.shipped,
        memory=memory_of(run, activations),
        step_seconds=seconds,
        load_seconds=loaded,
        loss=loss,
    )


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return every value of *recipe*, the switches of its network included."""
    values = recipe.model_dump(mode="json")
    values["model"]["config"] = recipe.model.full_config()
    return values


def first_batch(run: Run, pictures: LabeledImages, batches: list[list[int]]) -> Batch:
    """Return the samples of the first step, read in this process."""
    view = epoch_view(run.recipe, pictures, 0)
    return next(iter(load_batches(view, batches[:1], 0, run.parallel.device)))


def rates(recipe: Recipe) -> tuple[tuple[float, float], ...]:
    """Return (epoch, learning rate) at each turn of the schedule."""
    times = sorted({time for time in recipe.schedule.landmarks(recipe.epochs) if time <= recipe.epochs})
    return tuple((time, recipe.optimizer.lr * recipe.schedule.factor(time, recipe.epochs)) for time in times)


def memory_of(run: Run, activations: int) -> Memory:
    """Return what the run holds after a step."""
    weights = mebibytes(run.model.state_dict().values())
    state = (tensor for _, tensor in tensors_of(run.optimizer.state_dict()["state"], ""))
    return Memory(
        weights=weights,
        gradients=mebibytes(run.model.parameters()),
        optimizer=mebibytes(state),
        average=weights if run.average is not None else 0.0,
        activations=activations / MEBIBYTE,
    )


def mebibytes(tensors: Iterable[Tensor]) -> float:
    """Return the size of *tensors*."""
    return sum(tensor.nbytes for tensor in tensors) / MEBIBYTE


def activation_bytes(run: Run, batch: Batch) -> int:
    """Return what the forward of one piece keeps for its backward, beside the weights."""
    kept: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in run.model.state_dict().values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    piece = batch[0].tensor_split(run.recipe.accumulate)[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), run.precision.autocast():
        output = run.model(run.normalise(piece))
    del output
    return sum(size for pointer, size in kept.items() if pointer not in weights)
