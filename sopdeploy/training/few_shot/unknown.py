"""Images of unknown classes: heads that were fitted without one class at a time.

For each class, the head is fitted to the images of the other classes on cached features, and its logits are
computed for the images of the left-out fold: images of the other classes count as known, images of the class
as unknown. Unlike a head whose logit is masked, this head has never seen the class. The features are those of
the frozen backbone.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import Score, known_score
from sopdeploy.evaluation.decision_fit import SCORES
from sopdeploy.evaluation.statistics import auroc
from sopdeploy.training.few_shot.head import Array, HeadProblem

MAX_CLASSES = 10  # each needs one fit per fold


class LeftOut(NamedTuple):
    """Logits (K, C - 1) of known images and (U, C - 1) of a class without which the head was fitted."""

    known: Array
    unknown: Array


def leave_classes_out(problem: HeadProblem, folds_N: NDArray[np.intp], l2: float) -> tuple[LeftOut, ...]:
    """Fit heads without one class and compute their logits, in turn for up to `MAX_CLASSES` classes.

    *l2* is the regularization. The classes are evenly spaced. The result is empty for fewer than three
    classes, because one logit would remain, and for several classes per image.
    """
    classes = np.flatnonzero(problem.targets.any(axis=0))
    if problem.activation == "sigmoid" or len(classes) < 3:
        return ()
    images, found = np.arange(len(folds_N)), []
    for left_out in classes[np.linspace(0, len(classes) - 1, min(len(classes), MAX_CLASSES)).astype(int)]:
        of_class = problem.targets[:, left_out] > 0
        others = replace(problem, targets=np.delete(problem.targets, left_out, axis=1))
        known, unknown, parameters = [], [], None
        for fold in range(int(folds_N.max()) + 1):
            parameters = others.fit(images[~of_class & (folds_N != fold)], l2, parameters)
            tested = folds_N == fold
            known.append(others.logits(parameters, images[~of_class & tested]))
            unknown.append(others.logits(parameters, images[of_class & tested]))
        found.append(LeftOut(np.concatenate(known), np.concatenate(unknown)))
    return tuple(found)


def left_out_areas(left_out: tuple[LeftOut, ...], temperature: float) -> dict[Score, float]:
    """Compute the AUROC of each score for detecting the left-out class, averaged over the classes."""
    areas: dict[Score, float] = {}
    for score in SCORES if left_out else ():
        values = [
            auroc(known_score(one.known / temperature, score), known_score(one.unknown / temperature, score))
            for one in left_out
        ]
        areas[score] = float(np.mean(values))
    return areas
