"""The results of finished runs: what is measured and stored for each, and mean errors over seeds."""

from collections.abc import Collection, Sequence
from statistics import mean
from typing import Any

import torch

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import Fraction, StrictModel
from sopdeploy.data.sources import open_data
from sopdeploy.evaluation.prediction import HeadCounter, loss_shares, predict_images
from sopdeploy.evaluation.statistics import paired, wilson
from sopdeploy.models.base import Classifier
from sopdeploy.models.describe import describe
from sopdeploy.models.stats import Counts
from sopdeploy.report.run_data import read_history
from sopdeploy.reproduction.layer_times import median_milliseconds
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.train import TrainingResult

HOURS, MILLISECONDS = "training, hours", "inference, ms per image"  # facts of tables


class HeadError(StrictModel):
    """Errors of one head on the held-out images, and its share of the sum of weighted losses.

    A head is `constant` if it gives every image the same logits.
    """

    top1: Fraction
    top5: Fraction
    share: Fraction
    constant: bool = False


class SeedResult(StrictModel):
    """One finished run.

    `recipe` is the complete recipe and `network` the complete config of its network; `training` and
    `deployed` count this network. `heads` holds the errors of all heads if there are several. `usage` counts,
    for a gated network, the training images that each component received in the last epoch. `milliseconds` is
    the time of the deployed network per image, where the paper prints one.
    """

    seed: int
    recipe: dict[str, Any]
    network: dict[str, Any]
    history: tuple[EpochRow, ...]
    train_count: int
    held_out_count: int
    num_classes: int
    training: Counts
    deployed: Counts
    heads: dict[str, HeadError]
    usage: tuple[int, ...]
    milliseconds: float | None = None
    machine: dict[str, Any]


class MeanError(StrictModel):
    """A mean over seeds with its 95 % interval: Student's t over seeds, Wilson's over images for one seed."""

    mean: float
    low: float
    high: float


def measure_run(recipe: Recipe, trained: TrainingResult, *, timed: bool) -> SeedResult:
    """Collect the results of a finished run for the table and the charts; *timed* adds the inference time."""
    checkpoint = read_checkpoint(trained.last)
    history = read_history(checkpoint, trained.last)
    counts = describe(
        checkpoint.model,
        image_size=recipe.preprocess.crop,
        num_classes=len(checkpoint.labels),
        **checkpoint.config,
    )
    model = build_classifier(checkpoint, trained.last)
    return SeedResult(
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json"),
        network=checkpoint.config,
        history=history,
        train_count=trained.train_count,
        held_out_count=trained.held_out_count,
        num_classes=len(checkpoint.labels),
        training=counts.training,
        deployed=counts.shipped,
        heads=_head_errors(model, checkpoint, recipe, history[-1].losses),
        usage=history[-1].component_counts,
        milliseconds=_milliseconds_per_image(model, recipe) if timed else None,
        machine=checkpoint.training.get("machine", {}),
    )


def _head_errors(
    model: Classifier, checkpoint: Checkpoint, recipe: Recipe, losses: dict[str, float]
) -> dict[str, HeadError]:
    """Compute the errors of all heads of *model* on all held-out images; empty for a single head.

    *losses* are the training losses of the last epoch, by head.
    """
    weights = model.loss_weights()
    if len(weights) < 2:
        return {}
    images = open_data(recipe.data).held_out
    counter = HeadCounter(model.to(select_device(recipe.device)), torch.from_numpy(images.targets))
    predict_images(counter.eval(), checkpoint, images, workers=recipe.workers)
    shares = loss_shares(weights, {name: losses[name] for name in counter.right})
    return {
        head.name: HeadError(
            top1=1 - head.top1.share,
            top5=1 - head.top5.share,
            share=shares[head.name],
            constant=head.constant,
        )
        for head in counter.accuracies()
    }


@torch.no_grad()
def _milliseconds_per_image(model: Classifier, recipe: Recipe) -> float:
    """Time the deployed network of *model* on batches of the recipe's size; the median, per image."""
    device, side = select_device(recipe.device), recipe.preprocess.crop
    network = model.inference_model().eval().to(device)
    images = torch.randn(recipe.batch_size, 3, side, side, device=device)
    return median_milliseconds(lambda: network(images), device) / recipe.batch_size


def mean_error(runs: Sequence[SeedResult], name: str) -> MeanError | None:
    """Compute the mean error *name*, "top1" or "top5", of *runs* after the last epoch, in percent."""
    errors = [1 - getattr(run.history[-1].metrics, name) for run in runs]
    if not errors:
        return None
    if len(errors) > 1:
        center, _, (low, high), *_ = paired(errors)
    else:
        center, count = errors[0], runs[0].held_out_count
        low, high = wilson(round(center * count), count)
    return MeanError(mean=100 * center, low=100 * max(0.0, low), high=100 * min(1.0, high))


def measured_facts(
    runs: Sequence[SeedResult], baseline: Sequence[SeedResult], names: Collection[str]
) -> dict[str, float]:
    """Compute the facts *names* that runs measure: times, and increments over the runs *baseline*."""
    facts = {HOURS: mean(run.history[-1].seconds for run in runs) / 3600}
    times = [run.milliseconds for run in runs if run.milliseconds is not None]
    if times:
        facts[MILLISECONDS] = mean(times)
    for name, fact in {"top1": "top-1 increment", "top5": "top-5 increment"}.items():
        error, reference = mean_error(runs, name), mean_error(baseline, name)
        if error is not None and reference is not None:
            facts[fact] = reference.mean - error.mean
    return {name: facts[name] for name in names if name in facts}
