"""Measure a finished run: errors of all heads, use of the components of a gate, condition numbers."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sopdeploy.checkpoint import Checkpoint, build_classifier
from sopdeploy.data.augment import AugmentedDataset
from sopdeploy.data.base import PreprocessedDataset, derive_seed
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.sources import open_data
from sopdeploy.evaluation.heads import HeadCounter, loss_shares
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.gmsop import GMSOP
from sopdeploy.reproduction.results import HeadError
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.recipe import Recipe


@torch.no_grad()
def measure_heads(
    checkpoint: Checkpoint, recipe: Recipe, source: Path, losses: dict[str, float]
) -> dict[str, HeadError]:
    """Compute the errors of all heads of *checkpoint* on all held-out images; nothing for a single head.

    *losses* are the training losses of the last epoch, by head.
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


@torch.no_grad()
def count_usage(checkpoint: Checkpoint, recipe: Recipe, source: Path) -> tuple[int, ...]:
    """Count the training images of the last epoch that each component of a gated network receives.

    The images are those of the last epoch and the gate has its noise, as in training; the weights are those
    after the epoch. Other networks have no components.
    """
    device = select_device(recipe.device)
    model = build_classifier(checkpoint, source).to(device)
    if not isinstance(model, GMSOP):
        return ()
    images = open_data(recipe.data).train
    batches = sequential_batches(len(images), recipe.batch_size)
    dataset = AugmentedDataset(
        images, recipe.augment, recipe.preprocess, recipe.seed, recipe.epochs - 1, recipe.distort
    )
    normalize = Normalize(recipe.preprocess).to(device)
    used = torch.zeros(model.config.components, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "usage"))
        for batch, _ in load_batches(dataset, batches, recipe.workers, device):
            _, weights_BN = model.noisy_gate(normalize(batch))
            used += (weights_BN > 0).sum(dim=0).cpu()
    return tuple(used.tolist())


def condition_numbers(history: Sequence[EpochRow]) -> dict[str, tuple[float, float]]:
    """Divide the largest by the smallest eigenvalue, before and after each root, in the last spectra.

    Roots whose smallest eigenvalue is 0 are left out.
    """
    recorded = [row.sight.spectra for row in history if row.sight and row.sight.spectra]
    return {
        name: (spectrum.before[0] / spectrum.before[-1], spectrum.after[0] / spectrum.after[-1])
        for name, spectrum in (recorded[-1].items() if recorded else ())
        if spectrum.before[-1] > 0 and spectrum.after[-1] > 0
    }
