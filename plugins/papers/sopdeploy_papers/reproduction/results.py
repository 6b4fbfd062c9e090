"""What is measured and stored for a row: results of finished runs, and mean errors over seeds."""

from collections.abc import Sequence
from statistics import mean

from sopdeploy.base.config import FieldValues, StrictModel
from sopdeploy.evaluation.metrics import wilson
from sopdeploy.evaluation.prediction import (
    AllHeads,
    HeldOutMetrics,
    as_evaluated,
    held_out_metrics,
    score_images,
)
from sopdeploy.evaluation.statistics import student
from sopdeploy.training.diagnostics import EpochRow, median_throughput
from sopdeploy.training.distributed import select_device
from sopdeploy.training.division import open_division
from sopdeploy.training.records.checkpoints import read_resumed
from sopdeploy.training.settings.recipe import LoopRecipe, Recipe
from sopdeploy.training.train import TrainingResult
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint


class SeedResult(StrictModel):
    """One finished run.

    `recipe` is the complete recipe and `network` the complete config of its network. `heads`
    holds the metrics of all heads if there are several. `usage` counts, for a gated network,
    the training images that each component received in the last epoch.
    """

    seed: int
    recipe: FieldValues
    network: FieldValues
    history: tuple[EpochRow, ...]
    train_count: int
    held_out_count: int
    heads: dict[str, HeldOutMetrics]
    usage: tuple[int, ...]
    machine: dict[str, str | float]


class MeanError(StrictModel):
    """A mean over seeds with its 95 % interval: Student's t over seeds, Wilson's over images for one seed."""

    mean: float
    low: float
    high: float


def measure_run(recipe: Recipe, trained: TrainingResult) -> SeedResult:
    """Collect the results of a finished run for the table and the charts."""
    checkpoint = read_checkpoint(trained.last)
    history = read_resumed(checkpoint, trained.last).position.history
    model = build_classifier(checkpoint, trained.last)

    # If there are several heads, they are evaluated on all held-out images.
    heads: dict[str, HeldOutMetrics] = {}
    if len(model.loss_weights()) > 1:
        images = open_division(recipe, checkpoint, trained.last).data.held_out
        network = AllHeads(model.to(select_device(recipe.device)))
        mirror = isinstance(recipe, LoopRecipe) and recipe.validation.mirror
        evaluated = as_evaluated(network, mirror=mirror)
        logits = score_images(evaluated, checkpoint.preprocess, images, workers=recipe.workers)
        for name, head_logits in network.split(logits).items():
            heads[name] = held_out_metrics(images.labels, head_logits, images.targets)

    return SeedResult(
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json"),
        network=checkpoint.config,
        history=history,
        train_count=trained.train_count,
        held_out_count=trained.held_out_count,
        heads=heads,
        usage=history[-1].component_counts,
        machine=checkpoint.training.get("machine", {}),
    )


def mean_error(runs: Sequence[SeedResult], name: str) -> MeanError | None:
    """Compute the mean error *name*, "top1" or "top5", of *runs* after the last epoch, in percent."""
    errors = [1 - getattr(run.history[-1].metrics, name) for run in runs]
    if not errors:
        return None

    center = mean(errors)
    num_images = runs[0].held_out_count  # the same number in every run
    low, high = (
        student(errors) if len(errors) > 1 else wilson(round(center * num_images), num_images)
    )
    return MeanError(mean=100 * center, low=100 * max(0.0, low), high=100 * min(1.0, high))


def measured_facts(
    runs: Sequence[SeedResult], baseline: Sequence[SeedResult]
) -> dict[str, float]:
    """Compute the printed facts that runs measure: speed, and increments over the runs *baseline*."""
    facts = {
        "training, images per second": mean(median_throughput(run.history) for run in runs)
    }
    for name, fact in {"top1": "top-1 increment", "top5": "top-5 increment"}.items():
        error = mean_error(runs, name)
        reference = mean_error(baseline, name)
        if error is not None and reference is not None:
            facts[fact] = reference.mean - error.mean

    return facts
