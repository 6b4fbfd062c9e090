"""Learning rate range test: train with an increasing rate.

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
from sopdeploy.training.distributed.strategy import Strategy, select_device
from sopdeploy.training.loop import epoch_data
from sopdeploy.training.procedure import select_split
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Position, Run, create_run
from sopdeploy.training.step.gradient import train_step

MIN_RATE, MAX_RATE = 1e-6, 10.0
SMOOTHING = 0.9  # decay of the running mean of the loss
DIVERGED = 4.0  # times the lowest smoothed loss


class LearningRateResult(StrictModel):
    """The rate at which the loss falls fastest, `suggestion`, and the smoothed `losses` at all `rates`.

    With `few_shot`, the few-shot procedure, which does not use this rate, replaces the training loop.
    """

    suggestion: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    few_shot: bool = False


@dataclass(frozen=True)
class ExponentialRange:
    """A schedule that grows from MIN_RATE to MAX_RATE in `duration` epochs."""

    lr: float
    duration: float

    def factor(self, time: float, _epochs: int) -> float:
        """Compute the factor on the base learning rate after *time* epochs."""
        return MIN_RATE * math.pow(MAX_RATE / MIN_RATE, time / self.duration) / self.lr


def find_learning_rate(recipe: Recipe, steps: int = 100) -> LearningRateResult:
    """Suggest a learning rate for *recipe* after at most *steps* steps.

    Raises `TrainingError` if the loss decreases at no rate.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    data = open_data(recipe.data)
    _, batches = epoch_data(recipe, data.train, 0)
    schedule = ExponentialRange(recipe.optimizer.lr, steps / len(batches))
    recipe = recipe.model_copy(update={"schedule": schedule, "ema": None})
    run = create_run(recipe, data.train, Strategy(select_device(recipe.device)))
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    for loss in itertools.islice(_step_losses(run, data.train), steps):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        losses.append(mean / (1 - SMOOTHING ** (len(losses) + 1)))
        rates.append(run.optimizer.param_groups[0]["lr"])
        if losses[-1] > DIVERGED * min(losses):
            break
    suggestion = steepest_descent(rates, losses)
    few_shot = select_split(recipe, data)[1]
    return LearningRateResult(
        suggestion=suggestion, rates=tuple(rates), losses=tuple(losses), few_shot=few_shot
    )


def _step_losses(run: Run, images: LabeledImages) -> Iterator[float]:
    """Train and yield the loss of each step, until one is not finite."""
    while True:
        epoch = run.position.epoch
        dataset, batches = epoch_data(run.recipe, images, epoch)
        for batch in load_batches(dataset, batches, run.recipe.workers, run.strategy.device):
            samples = batches[run.position.step]
            try:
                result = train_step(run, batch, samples, len(batches))
            except TrainingError:
                return
            run.after_step(result, len(samples), 0.0, 0.0)
            yield float(result.loss.total)
        run.position = Position(epoch=epoch + 1)


def steepest_descent(rates: list[float], losses: list[float]) -> float:
    """Return the rate at which the loss decreases fastest before its minimum.

    A decrease is measured over a tenth of the steps. The first tenth is ignored, because there the running
    mean covers few batches. Raises `TrainingError` if the loss never decreases.
    """
    span, ignored = max(1, len(losses) // 10), len(losses) // 10
    considered = losses[ignored:]
    lowest = ignored + considered.index(min(considered)) if considered else 0
    falls = {start: losses[start] - losses[start + span] for start in range(ignored, lowest + 1 - span)}
    if not falls or max(falls.values()) <= 0:
        raise TrainingError(
            "the loss does not decrease at any learning rate; check the data and the preprocessing"
        )
    return rates[max(falls, key=falls.__getitem__) + (span + 1) // 2]
