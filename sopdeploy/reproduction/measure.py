"""Measure a finished run: errors of all heads, and condition numbers of covariances."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sopdeploy.checkpoint import Checkpoint, build_classifier
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.sources import open_data
from sopdeploy.evaluation.heads import HeadCounter, loss_shares
from sopdeploy.layers.normalize import Normalize
from sopdeploy.reproduction.results import HeadError
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.recipe import Recipe


@torch.no_grad()
def measure_heads(
    checkpoint: Checkpoint, recipe: Recipe, source: Path, losses: dict[str, float]
) -> dict[str, HeadError]:
    """Compute the errors of all heads of *checkpoint* on all held-out images; empty for a single head.

    *losses* are the training losses of the last epoch, by head. *source* is the file of *checkpoint*, which
    error messages name.
    """
    device = select_device(recipe.device)
    model = build_classifier(checkpoint, source).to(device)
    weights = model.loss_weights()
    if len(weights) < 2:
        return {}
    images = open_data(recipe.data).held_out
    batches = sequential_batches(len(images), recipe.batch_size)
    dataset = PreprocessedDataset(images, recipe.preprocess)
    normalize = Normalize(recipe.preprocess).to(device)
    counter = HeadCounter(model, torch.from_numpy(images.targets))
    for batch, _ in load_batches(dataset, batches, recipe.workers, device):
        counter(normalize(batch))
    shares = loss_shares(weights, {name: losses[name] for name in counter.right})
    return {
        head.name: HeadError(top1=1 - head.top1.share, top5=1 - head.top5.share, share=shares[head.name])
        for head in counter.accuracies()
    }


def condition_numbers(history: Sequence[EpochRow]) -> dict[str, tuple[float, float]]:
    """Compute the condition numbers before and after each matrix square root, from the last spectra.

    Square roots whose smallest eigenvalue is 0 are left out.
    """
    recorded = [row.diagnostics.spectra for row in history if row.diagnostics and row.diagnostics.spectra]
    return {
        name: (spectrum.before[0] / spectrum.before[-1], spectrum.after[0] / spectrum.after[-1])
        for name, spectrum in (recorded[-1].items() if recorded else ())
        if spectrum.before[-1] > 0 and spectrum.after[-1] > 0
    }
