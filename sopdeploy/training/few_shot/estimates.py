"""Choice among candidates by their out-of-fold losses, and the score of the choice.

A candidate replaces the first one of its network if its mean loss is smaller by `STANDARD_ERRORS` standard
errors of the paired difference over groups of copies; among networks, the smallest loss wins. For the
estimate, the choice of network, head and C for a fold is repeated with the losses of the other folds only, so
that the images of a fold have no part in the choice that is scored on them (Varma and Simon, BMC
Bioinformatics 2006).

Letters: N images, K classes, G values of C.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sopdeploy.data.near import effective_count
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.training.few_shot.classifier import Array, Indices, Targets

STANDARD_ERRORS = 2.0


class Choice(NamedTuple):
    """The indices of a network, of one of its candidates, and of C in the grid; and the mean loss."""

    network: int
    candidate: int
    strength: int
    loss: float


def choose(losses: Sequence[Sequence[Array]], images: Indices, groups_N: Indices) -> Choice:
    """Choose among the candidates of all networks by the losses (G, N) of each on *images* of *groups_N*."""
    units = effective_count(groups_N[images])
    choices = [_choose_head(network, of_network, images, units) for network, of_network in enumerate(losses)]
    return min(choices, key=lambda choice: choice.loss)


def _choose_head(network: int, losses: Sequence[Array], images: Indices, units: float) -> Choice:
    """Choose a candidate of one network; each is represented by its C with the smallest mean loss."""
    strengths = [int(losses_GN[:, images].mean(axis=1).argmin()) for losses_GN in losses]
    losses_by_candidate = [
        losses_GN[strength, images] for losses_GN, strength in zip(losses, strengths, strict=True)
    ]
    default, best = losses_by_candidate[0], 0
    for candidate, loss_N in enumerate(losses_by_candidate):
        gain_N = default - loss_N
        error = gain_N.std(ddof=1) / np.sqrt(units) if len(gain_N) > 1 else 0.0
        clear = gain_N.mean() > STANDARD_ERRORS * error
        if clear and loss_N.mean() < losses_by_candidate[best].mean():
            best = candidate
    return Choice(network, best, strengths[best], float(losses_by_candidate[best].mean()))


def compose(
    losses: Sequence[Sequence[Array]], logits: Sequence[Sequence[Array]], folds_N: Indices, groups_N: Indices
) -> Array:
    """Choose a candidate for each fold by its losses on the other folds; join their logits to (N, K).

    *losses* are (G, N) and *logits* are (G, N, K), both by network and candidate.
    """
    composed = np.zeros(logits[0][0].shape[1:])
    for fold in range(int(folds_N.max()) + 1):
        tested = folds_N == fold
        choice = choose(losses, np.flatnonzero(~tested), groups_N)
        chosen_GNK = logits[choice.network][choice.candidate]
        composed[tested] = chosen_GNK[choice.strength, tested]
    return composed


def estimate(
    targets: Targets, logits_NK: Array, seed: int, groups_N: Indices, folds: int = 0
) -> Rate | MeanPrecision:
    """Compute top-1 with Wilson's interval, or mAP with a bootstrap interval; *groups_N* are the units.

    The heads of different folds share most of their training images. With *folds*, the variance of top-1 is
    therefore that of Nadeau and Bengio, "Inference for the Generalization Error" (2003), section 3.
    """
    if targets.activation == "softmax":
        right = logits_NK.argmax(axis=1) == targets.classes.argmax(axis=1)
        variance_factor = 1 + folds / (folds - 1) if folds else 1.0
        return Rate.of(int(right.sum()), len(right), effective_count(groups_N) / variance_factor)
    return MeanPrecision.of(targets.classes > 0, logits_NK, seed, groups_N)
