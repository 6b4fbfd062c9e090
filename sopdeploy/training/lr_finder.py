"""Which learning rate a recipe bears: train while the rate grows, and look where the loss falls fastest.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks" (WACV 2017), section 3.3.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sopdeploy.config import StrictModel
from sopdeploy.data.base import LabeledImages
from sopdeploy.data.batches import load_batches
from sopdeploy.data.sources import open_data
from sopdeploy.errors import TrainingError
from sopdeploy.training.distributed.strategy import SingleProcess, choose_device
from sopdeploy.training.loop import epoch_batches, epoch_view, train_step
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Position, Run, start_run

LOWEST, HIGHEST = 1e-6, 10.0
MEMORY = 0.9  # of the running mean that smooths the loss
HOPELESS = 4.0  # times the lowest smoothed loss: the run has diverged


class LearningRateResult(StrictModel):
    """`suggestion` is the rate at the steepest fall; `rates` and the smoothed `losses` are what was seen."""

    suggestion: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Rising:
    """A schedule that takes the rate from LOWEST to HIGHEST in `duration` epochs, evenly in its logarithm."""

    lr: float
    duration: float

    def factor(self, time: float, _epochs: int) -> float:
        """Return what the recipe's learning rate is multiplied by."""
        return LOWEST * math.pow(HIGHEST / LOWEST, time / self.duration) / self.lr


def find_learning_rate(recipe: Recipe, steps: int = 100) -> LearningRateResult:
    """Return the rate to try for *recipe* after at most *steps* steps, which are forgotten.

    Raises `TrainingError` where the loss fell nowhere.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    data = open_data(recipe.data)
    batches = epoch_batches(recipe, data.train, 0)
    rising = Rising(recipe.optimizer.lr, steps / len(batches))
    swept = recipe.model_copy(update={"schedule": rising, "ema": None})
    run = start_run(swept, data.train, SingleProcess(choose_device(recipe.device)))
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    for loss in itertools.islice(losses_of(run, data.train), steps):
        mean = MEMORY * mean + (1 - MEMORY) * loss
        losses.append(mean / (1 - MEMORY ** (len(losses) + 1)))
        rates.append(run.optimizer.param_groups[0]["lr"])
        if losses[-1] > HOPELESS * min(losses):
            break
    return LearningRateResult(suggestion=steepest(rates, losses), rates=tuple(rates), losses=tuple(losses))


def losses_of(run: Run, pictures: LabeledImages) -> Iterator[float]:
    """Yield the loss of one step after the other, until one is not finite."""
    recipe = run.recipe
    while True:
        epoch = run.at.epoch
        batches = epoch_batches(recipe, pictures, epoch)
        view = epoch_view(recipe, pictures, epoch)
        for batch in load_batches(view, batches, recipe.workers, run.parallel.device):
            samples = batches[run.at.step]
            try:
                result = train_step(run, batch, samples, len(batches))
            except TrainingError:
                return
            run.after_step(result, len(samples), 0.0, 0.0)
            yield float(result.loss.total)
        run.at = Position(epoch=epoch + 1)


def steepest(rates: list[float], losses: list[float]) -> float:
    """Return the rate at which the loss falls fastest on the way to its lowest.

    A fall is measured over a tenth of the steps, and the first tenth is left out: the running mean is of a
    few batches there, and what it loses is noise. Raises `TrainingError` where the loss only rises.
    """
    span, skipped = max(1, len(losses) // 10), len(losses) // 10
    seen = losses[skipped:]
    lowest = skipped + seen.index(min(seen)) if seen else 0
    falls = {start: losses[start] - losses[start + span] for start in range(skipped, lowest + 1 - span)}
    if not falls or max(falls.values()) <= 0:
        raise TrainingError("the loss fell at no learning rate; look at the data and the preprocessing")
    return rates[max(falls, key=falls.__getitem__) + (span + 1) // 2]
