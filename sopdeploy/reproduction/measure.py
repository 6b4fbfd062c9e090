"""Measure a finished run: errors of all heads, condition numbers of covariances, counts of the network."""

from collections.abc import Sequence

import torch

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.data.sources import open_data
from sopdeploy.evaluation.heads import HeadCounter, loss_shares
from sopdeploy.evaluation.prediction import predict_images
from sopdeploy.models.base import Classifier
from sopdeploy.models.describe import describe
from sopdeploy.report.run_data import read_history
from sopdeploy.reproduction.layer_times import milliseconds
from sopdeploy.reproduction.results import HeadError, SeedResult
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.loop import TrainingResult
from sopdeploy.training.recipe import Recipe


def measure_run(recipe: Recipe, trained: TrainingResult, *, timed: bool) -> SeedResult:
    """Measure what the table and the charts show of a finished run; *timed* times its network, too."""
    checkpoint: Checkpoint = read_checkpoint(trained.last)
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
        training=counts.training,
        deployed=counts.shipped,
        heads=_head_errors(model, checkpoint, recipe, history[-1].losses),
        usage=history[-1].component_counts,
        condition=_condition_numbers(history),
        milliseconds=_time_per_image(model, recipe) if timed else None,
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
        head.name: HeadError(top1=1 - head.top1.share, top5=1 - head.top5.share, share=shares[head.name])
        for head in counter.accuracies()
    }


@torch.no_grad()
def _time_per_image(model: Classifier, recipe: Recipe) -> float:
    """Time the deployed network of *model* per image of a batch of the recipe's size, in milliseconds."""
    device, side = select_device(recipe.device), recipe.preprocess.crop
    network = model.inference_model().eval().to(device)
    images = torch.randn(recipe.batch_size, 3, side, side, device=device)
    of_batch = milliseconds(lambda: network(images), device.type, torch.get_num_threads())
    return of_batch / recipe.batch_size


def _condition_numbers(history: Sequence[EpochRow]) -> dict[str, tuple[float, float]]:
    """Compute the condition numbers before and after each matrix square root, from the last spectra.

    Square roots whose smallest eigenvalue is 0 are left out.
    """
    recorded = [row.diagnostics.spectra for row in history if row.diagnostics and row.diagnostics.spectra]
    return {
        name: (spectrum.before[0] / spectrum.before[-1], spectrum.after[0] / spectrum.after[-1])
        for name, spectrum in (recorded[-1].items() if recorded else ())
        if spectrum.before[-1] > 0 and spectrum.after[-1] > 0
    }
