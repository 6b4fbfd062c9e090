"""The proposal of the few-shot procedure: its time and that of the training loop on this machine."""

import os
import time
from typing import NamedTuple

import numpy as np
import torch

from sopdeploy.data.base import LabeledImages, PreprocessedDataset, Split
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import create_model, entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.few_shot.candidates import BATCHES, TAPS, WIDTH
from sopdeploy.training.few_shot.classifier import MAX_RANK
from sopdeploy.training.procedure import Proposal
from sopdeploy.training.recipe import Recipe

_FEW_IMAGES = 1000  # up to them nothing is measured: the procedure takes a minute on a CPU
_TIMED_BATCHES = 4  # after one that is not timed
_FIT_PASSES = 10_000  # over the inputs, in the fits of all heads; measured with ten classes
_STEP_COST = 3  # forward and backward, in forward passes


class PredictedCost(NamedTuple):
    """Seconds of the few-shot procedure and of the training loop, and bytes of memory of the procedure."""

    few_shot: float
    loop: float
    memory: int


def propose(recipe: Recipe, data: Split, max_minutes: float) -> Proposal:
    """Decide by the predicted time and memory whether the procedure trains on *data*, and say why."""
    images = data.train
    try:
        entry(head_name(recipe.model.name))
    except ConfigError:
        return Proposal(False)
    if len(images) <= _FEW_IMAGES:
        return Proposal(True, f"few-shot procedure: there are at most {_FEW_IMAGES:,} images")
    if torch.distributed.is_initialized():
        return Proposal(False, "training loop: the few-shot procedure needs one process")
    try:
        predicted = predict_cost(recipe, images)
    except DataError as error:
        raise unreadable_images_error(error, data.train, data.held_out) from None
    few_shot, loop = describe_time(predicted.few_shot), describe_time(predicted.loop)
    half_of_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if predicted.few_shot > 60 * max_minutes:
        problem = f"would take {few_shot}, more than procedure.max_minutes = {max_minutes:g}"
    elif predicted.memory > half_of_memory:
        problem = f"would need {predicted.memory / 1e9:.0f} GB, more than half of the memory"
    else:
        other = f"the training loop would take {loop}; procedure.kind=loop selects it"
        return Proposal(True, f"few-shot procedure, {few_shot} in total: {other}")
    other = f"the few-shot procedure {problem}; procedure.kind=few_shot selects it"
    return Proposal(False, f"training loop, {loop} in total: {other}")


@torch.no_grad()
def predict_cost(recipe: Recipe, images: LabeledImages) -> PredictedCost:
    """Measure the network with random weights and the fit of a head on some *images*, and extrapolate."""
    device, side = select_device(recipe.device), entry(recipe.model.name).image_size
    model = create_model(recipe.model.name, num_classes=len(images.labels), **recipe.model.config)
    model = model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rules = recipe.preprocess
    if "crop" not in rules.model_fields_set:
        rules = Preprocess(resize=side * 8 // 7, crop=side)
    dataset, normalize = PreprocessedDataset(images, rules), Normalize(rules).to(device)
    size = BATCHES[device.type]
    chosen = np.linspace(0, len(images) - 1, (_TIMED_BATCHES + 1) * size).astype(int)
    for start in range(0, len(chosen), size):
        if start == size:
            since = time.monotonic()
        pixels = np.stack([dataset[index][0] for index in chosen[start : start + size]])
        float(model(normalize(torch.from_numpy(pixels).to(device))).sum())
    image_seconds = (time.monotonic() - since) / (_TIMED_BATCHES * size)
    rank, count = min(MAX_RANK, len(images)), len(images)
    inputs, weight = np.ones((count // 10, rank)), np.ones((rank, len(images.labels)))
    since = time.monotonic()
    inputs.T @ (inputs @ weight)
    heads = 10 * _FIT_PASSES * (time.monotonic() - since)
    length = model.num_features() + TAPS * WIDTH * (WIDTH + 1) // 2
    return PredictedCost(
        few_shot=count * image_seconds + heads,
        loop=recipe.epochs * count * _STEP_COST * image_seconds,
        memory=count * (4 * length + 3 * 8 * MAX_RANK),
    )


def describe_time(seconds: float) -> str:
    """Describe *seconds* in minutes or hours."""
    return (
        f"about {seconds / 3600:.1f} hours" if seconds > 5400 else f"about {max(1, round(seconds / 60))} min"
    )
