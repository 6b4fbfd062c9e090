"""What there is to see in a network after an epoch, beside its losses: for the report, never for training.

Seen on a few held-out pictures, always the same ones, in eval mode and without a random draw, so that a run
that is watched ends with the same weights as one that is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sopdeploy.config import Fraction, StrictModel
from sopdeploy.data.base import Dataset
from sopdeploy.data.batches import load_batches
from sopdeploy.layers.covariance import centered_and_scaled, covariance
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.gate import SparseGate
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier

PICTURES = 512  # that heads and gates are measured on
IN_SPECTRA = 16  # of these, whose covariances are looked at
SPECTRA = 5  # epochs of a run whose spectra are kept
PLACES = 48  # eigenvalues of a spectrum that are kept, closer together at its head


class HeadFigures(StrictModel):
    """One head: the share of pictures it gets right, and its mean loss."""

    top1: Fraction
    loss: float


class GateFigures(StrictModel):
    """A gate: the share of pictures that chose each component, and the components' mean weights.

    `imbalance` is (std / mean)^2 of the weights, Eq. (4) of GM-SOP without its factor.
    """

    chosen: tuple[Fraction, ...]
    weights: tuple[float, ...]
    imbalance: float


class Spectrum(StrictModel):
    """Eigenvalues of a covariance and of its root, means over pictures, by falling size.

    `places` counts from 1 and says which eigenvalues these are.
    """

    places: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


class Sight(StrictModel):
    """What was seen on `pictures` pictures; `spectra` are empty in the epochs that keep none."""

    pictures: int
    heads: dict[str, HeadFigures]
    gates: dict[str, GateFigures]
    spectra: dict[str, Spectrum]


def spectrum_epochs(epochs: int) -> set[int]:
    """Return the epochs, counted from 1, whose spectra are kept: the first, the last and some between."""
    return {round(1 + step * (epochs - 1) / (SPECTRA - 1)) for step in range(SPECTRA)}


@torch.no_grad()
def look(
    model: Classifier, held_out: Dataset, normalise: Normalize, batch_size: int, *, spectra: bool
) -> Sight:
    """Return what there is to see of *model*, which gets its mode back."""
    count = min(PICTURES, len(held_out))
    places = [index * len(held_out) // count for index in range(count)]
    batches = [places[start : start + batch_size] for start in range(0, count, batch_size)]
    device = next(model.parameters()).device
    sums: dict[str, list[float]] = {}
    weights: dict[str, list[Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), watched(model, SparseGate) as gates:  # a loader draws a seed
            for images, labels in load_batches(held_out, batches, 0, device):
                for name, logits in model.heads(normalise(images)).items():
                    add_head(sums.setdefault(name, [0.0, 0.0]), logits.float(), labels)
                for name, (_, output) in gates.items():
                    weights.setdefault(name, []).append(output.float().cpu())
        seen = spectra_of(model, held_out, normalise, places[:: -(-count // IN_SPECTRA)]) if spectra else {}
    finally:
        model.train(was_training)
    return Sight(
        pictures=count,
        heads={
            name: HeadFigures(top1=right / count, loss=loss / count) for name, (right, loss) in sums.items()
        },
        gates={name: gate_figures(torch.cat(found)) for name, found in weights.items()},
        spectra=seen,
    )


def add_head(sums: list[float], logits: Tensor, labels: Tensor) -> None:
    """Add the hits and the loss of a batch to *sums*."""
    sums[0] += int((logits.argmax(dim=1) == labels).sum())
    sums[1] += float(cross_entropy(logits, labels, reduction="sum"))


def gate_figures(weights_BN: Tensor) -> GateFigures:
    """Return the figures of a gate that gave *weights_BN*."""
    load_N = weights_BN.double().mean(dim=0)
    imbalance = load_N.var(correction=1) / load_N.mean().square()
    return GateFigures(
        chosen=tuple((weights_BN > 0).double().mean(dim=0).tolist()),
        weights=tuple(load_N.tolist()),
        imbalance=float(imbalance),
    )


def spectra_of(
    model: Classifier, held_out: Dataset, normalise: Normalize, places: list[int]
) -> dict[str, Spectrum]:
    """Return the spectra of every covariance root that *model* computes, by the root's name."""
    images = torch.from_numpy(np.stack([held_out[place][0] for place in places]))
    with watched(model, ISqrtCov) as roots:
        model.heads(normalise(images.to(next(model.parameters()).device)))
    return {name: spectrum(root, *roots[name]) for name, root in named(model, ISqrtCov) if name in roots}


def spectrum(root: Any, features_BdHW: Tensor, vector: Tensor) -> Spectrum:
    """Return the spectra before and after *root*, which made *vector* of *features_BdHW*."""
    before_Bdd = covariance(centered_and_scaled(features_BdHW.double()))
    width = before_Bdd.shape[1]
    upper_Bdd = vector.new_zeros(len(vector), width * width, dtype=torch.float64)
    upper_Bdd = upper_Bdd.index_copy(1, root.triangle, vector.double()).view(-1, width, width)
    after_Bdd = upper_Bdd + upper_Bdd.transpose(1, 2) - torch.diag_embed(upper_Bdd.diagonal(dim1=1, dim2=2))
    kept = sorted({round(width ** (step / (PLACES - 1))) for step in range(PLACES)})
    return Spectrum(places=tuple(kept), before=falling(before_Bdd, kept), after=falling(after_Bdd, kept))


def falling(matrix_Bdd: Tensor, places: list[int]) -> tuple[float, ...]:
    """Return the mean eigenvalues of symmetric matrices at *places*; rounding below 0 is 0."""
    mean_d = torch.linalg.eigvalsh(matrix_Bdd.cpu()).flip(1).mean(dim=0).clamp_min(0.0)
    return tuple(float(mean_d[place - 1]) for place in places)


def named(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return the modules of *kind* in *model* with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


@contextmanager
def watched(model: nn.Module, kind: type[nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Give the last input and output of each module of *kind*, by name, as *model* computes."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _module, inputs, output: found.__setitem__(name, (inputs[0], output))

    handles = [module.register_forward_hook(keep(name)) for name, module in named(model, kind)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
