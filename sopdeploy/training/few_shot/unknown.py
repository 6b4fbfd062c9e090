"""Images of unknown classes: heads that were fitted without one class at a time.

For each class, the head is fitted to the images of the other classes on cached features, and its logits are
computed for the images of the left-out fold: images of the other classes count as known, images of the class
as unknown. Unlike a head whose logit is masked, this head has never seen the class.

The logits of a linear classifier grow with the distance of an image from the mean of the training images,
also for images that resemble none of them. `distance_weight` therefore subtracts a multiple of this distance
from all logits, as ViM does with the norm of a residual (Wang et al., CVPR 2022, section 4). Probabilities do
not change; the energy falls for remote images. SCALE (arXiv 2310.00227) was worse than the plain energy here
(docs/benchmarks/few_photos.md).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import Score, known_score
from sopdeploy.evaluation.decision_fit import SCORES
from sopdeploy.evaluation.statistics import auroc
from sopdeploy.training.few_shot.classifier import Array, Indices, Problem

MAX_CLASSES = 10  # each needs one fit per fold
WEIGHTS = (0.0, 0.25, 0.5, 1.0)  # of the distance, in standard deviations of the energy


class Recognition(NamedTuple):
    """The AUROC of each score, averaged over left-out classes, with the chosen `weight` of the distance."""

    areas: dict[Score, float]
    weight: float


def recognize_unknown(
    problem: Problem, folds_N: Indices, strength: float, *, with_distance: bool
) -> Recognition:
    """Leave out up to `MAX_CLASSES` evenly spaced classes, one at a time, and choose the weight.

    *strength* is C. Nothing is found for fewer than three classes, because one logit would remain, and for
    several classes per image.
    """
    shown = np.flatnonzero(problem.targets.classes.any(axis=0))
    if problem.targets.activation == "sigmoid" or len(shown) < 3:
        return Recognition({}, 0.0)
    distances, of_weight, probable, units = problem.distances(), [], [], []
    for left_out in shown[np.linspace(0, len(shown) - 1, min(len(shown), MAX_CLASSES)).astype(int)]:
        unknown = problem.targets.classes[:, left_out] > 0
        logits = _out_of_fold(problem.without(left_out), ~unknown, folds_N, strength)
        energy = known_score(logits, "energy")
        unit = float(energy[~unknown].std() / max(float(distances[~unknown].std()), 1e-12))
        units.append(unit)
        values = [energy - weight * unit * distances for weight in WEIGHTS]
        of_weight.append([auroc(one[~unknown], one[unknown]) for one in values])
        most = known_score(logits, "max_probability")
        probable.append(auroc(most[~unknown], most[unknown]))
    means = np.mean(of_weight, axis=0)
    best = int(means.argmax()) if with_distance else 0
    areas = dict(zip(SCORES, (float(np.mean(probable)), float(means[best])), strict=True))
    return Recognition(
        areas, WEIGHTS[best] * float(np.mean(units)) if areas["energy"] >= areas["max_probability"] else 0.0
    )


def _out_of_fold(problem: Problem, fitted: NDArray[np.bool_], folds_N: Indices, strength: float) -> Array:
    """Fit to the images *fitted* (N,) outside of each fold; return the logits (N, K) of all images."""
    logits = np.zeros(problem.targets.classes.shape)
    for fold in range(int(folds_N.max()) + 1):
        tested = folds_N == fold
        if (fitted & ~tested).any():
            logits[tested] = problem.fit(np.flatnonzero(fitted & ~tested), strength).logits(
                problem.reduced[tested]
            )
    return logits
