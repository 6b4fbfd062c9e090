"""Images of unknown classes: heads that were fitted without one class at a time.

For each class, the head is fitted to the images of the other classes, and its logits are computed for the
images of the left-out fold: images of the other classes count as known, images of the class as unknown.
Unlike a head whose logit is masked, this head has never seen the class.

The logits of a linear classifier grow with the distance from the mean of the training images, also for images
that resemble none of them. A multiple of this distance is therefore subtracted from all logits, as ViM does
with the norm of a residual (Wang et al., CVPR 2022, section 4): the energy falls, probabilities stay.
"""

from dataclasses import replace

import numpy as np

from sopdeploy.decision import Score, known_score
from sopdeploy.training.few_shot.classifier import Indices, Problem

_MAX_CLASSES, _MAX_FOLDS = 10, 5  # one fit for each class and fold
_WEIGHTS = (0.0, 0.25, 0.5, 1.0)  # of the distance, in standard deviations of the energy


def recognize_unknown(
    problem: Problem, folds_N: Indices, strength: float, *, with_distance: bool
) -> tuple[dict[Score, float], float]:
    """Leave out up to `_MAX_CLASSES` classes, one at a time, and choose the weight of the distance.

    *strength* is C. Returns the AUROC of each score, averaged over left-out classes, and the weight. They are
    empty and 0 for fewer than three classes, because one logit would remain, and for several classes per
    image. The weight is 0, too, if the probability separates unknown images better than the energy.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  # part of an extra

    classes = problem.targets.classes
    present = np.flatnonzero(classes.any(axis=0))
    if problem.targets.activation == "sigmoid" or len(present) < 3:
        return {}, 0.0
    evenly_spaced = np.linspace(0, len(present) - 1, min(len(present), _MAX_CLASSES)).astype(int)
    folds_N = folds_N % _MAX_FOLDS
    energy_aurocs, probability_aurocs, units = [], [], []
    for left_out in present[evenly_spaced]:
        known = classes[:, left_out] == 0
        other_classes = np.delete(classes, left_out, axis=1)
        without_class = replace(problem, targets=replace(problem.targets, classes=other_classes))
        (logits,) = without_class.cross_validate(folds_N, [strength], known)
        distances, energy = problem.distances(folds_N, known), known_score(logits, "energy")
        unit = float(energy[known].std() / max(float(distances[known].std()), 1e-12))
        scores = [energy - weight * unit * distances for weight in _WEIGHTS]
        units.append(unit)
        energy_aurocs.append([float(roc_auc_score(known, score)) for score in scores])
        probability_aurocs.append(float(roc_auc_score(known, known_score(logits, "max_probability"))))
    mean_by_weight = np.mean(energy_aurocs, axis=0)
    best = int(mean_by_weight.argmax()) if with_distance else 0
    energy_auroc, probability_auroc = float(mean_by_weight[best]), float(np.mean(probability_aurocs))
    aurocs: dict[Score, float] = {"energy": energy_auroc, "max_probability": probability_auroc}
    if energy_auroc < probability_auroc:
        return aurocs, 0.0
    return aurocs, _WEIGHTS[best] * float(np.mean(units))
