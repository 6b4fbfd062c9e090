"""What turns scores into logits: temperature, excess and margins, estimated by cross-validations.

Letters: N images, n of one fold, K classes, V cross-validations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, stdtrit

from sopdeploy.training.few_shot.discriminant import Discriminant
from sopdeploy.training.few_shot.targets import Array, Indices, Targets

LOG_SCALES = (-10.0, 10.0)  # of scores divided by their deviation
# A class of so many photographs is learned about as well as a class of ten
ENOUGH = 5
# Share of the photographs of larger classes that a class of fewer than `ENOUGH` may take, by
# measurements
TAKEN = 0.01


class OutOfFold(NamedTuple):
    """A cross-validation: the products (N, K) of images and the weights of the head without their fold.

    Attributes:
        products: (N, K).
        heads: The heads without one of the folds.
        folds: The fold (N,) of each image, the index of the head that judges it.
        numbers: (K,) independent photographs of each class in all folds.
        shares: (N,) the weight of each image; those of one group with the same classes count as one.
    """

    products: Array
    heads: list[Discriminant]
    folds: Indices
    numbers: Array
    shares: Array

    def scores(self, excess: float) -> Array:
        """Compute the scores (N, K) of images by the heads without their fold."""
        return self.products + np.stack([head.bias(excess) for head in self.heads])[self.folds]

    def has_class(self) -> NDArray[np.bool_]:
        """Tell (N, K) which classes the head without the fold of an image was fitted to."""
        return np.stack([head.numbers > 0 for head in self.heads])[self.folds]


class Scaling(NamedTuple):
    """What turns the scores of a head into logits.

    `excess` and `margins` correct the biases, then `temperature` divides the scores. A class of
    few photographs must exceed the others by its entry of `margins` (K,), which is 0 for most
    classes.
    """

    temperature: float
    excess: float
    margins: Array | float = 0.0

    @classmethod
    def fit(
        cls, validations: Sequence[OutOfFold], targets: Targets, *, has_margins: bool = False
    ) -> "Scaling":
        """Fit temperature, excess and margins to V cross-validations.

        With "softmax", all classes have equal weights in the loss, and an image whose class is
        absent from the head that predicts it has the weight 0. Images of a group count as one. The
        targets are smoothed by 1 / (n + 2) for n independent images, the rule of succession:
        without errors, the temperature would otherwise be 0. The margins are 0 without
        *has_margins*, and with "sigmoid".
        """
        classes_NK = targets.classes
        shares_N1 = validations[0].shares[:, None]
        log_odds_K = targets.log_odds(validations[0].shares)
        wrong = 1 / (shares_N1.sum() + 2)  # the rule of succession
        excess = estimate_excess(validations, classes_NK > 0)
        scores_VNK = np.stack([one.scores(excess) for one in validations])
        margins: Array | float = 0.0  # not part of the loss: the temperature would be too high

        # Smoothed targets, and the weight of each image in the loss.
        weights_VNK = shares_N1[None]
        if targets.activation == "softmax":
            num_others = max(1, classes_NK.shape[1] - 1)
            smooth_NK = classes_NK * (1 - wrong) + (1 - classes_NK) * wrong / num_others
            present_VNK = np.stack([one.has_class() for one in validations])
            counted_NK = shares_N1 * classes_NK
            of_class_NK = counted_NK / np.maximum(counted_NK.sum(axis=0), 1)
            weights_VNK = (of_class_NK * present_VNK).sum(axis=-1, keepdims=True)
            if has_margins:
                margins = estimate_margins(validations, scores_VNK, targets)
        else:
            smooth_NK = classes_NK * (1 - 2 * wrong) + wrong

        # The temperature, searched in units of the deviation of the scores.
        unit = float(scores_VNK.std()) or 1.0

        def loss(log_scale: float) -> float:
            """Compute the loss by log(unit / temperature)."""
            logits = np.exp(log_scale) / unit * scores_VNK + log_odds_K
            if targets.activation == "softmax":
                return -float((weights_VNK * smooth_NK * log_softmax(logits, axis=-1)).sum())
            return float((weights_VNK * (np.logaddexp(0.0, logits) - smooth_NK * logits)).sum())

        log_scale = minimize_scalar(
            loss, bounds=LOG_SCALES, method="bounded", options={"xatol": 1e-4}
        ).x
        return cls(unit / float(np.exp(log_scale)), excess, margins)


def estimate_excess(validations: Sequence[OutOfFold], is_shown_NK: NDArray[np.bool_]) -> float:
    """Estimate what the noise of one photograph adds to the squared norm of the mean of its class.

    The weights of a class fit the noise of its mean. By these weights, the mean of n photographs
    therefore exceeds held-out images of the class: on average by the result, divided by n. The
    result is the sum of these surpluses, over all heads and held-out images, divided by the sum
    of 1 / n. Images of a group count as one. *is_shown_NK* tells which classes an image shows.

    With one class per image, the surplus is 1 - 1 / K times as large, because the mean of all
    class means, with which a class is compared, has 1 / K of the noise, too. With several classes
    per image, the mean of the images that do not show a class adds a surplus of its own.
    """
    surplus = 0.0
    inverses = 0.0  # the sum of 1 / n
    for validation in validations:
        for fold, head in enumerate(validation.heads):
            in_fold_N = validation.folds == fold
            products_nK = validation.products[in_fold_N]
            shares_n1 = validation.shares[in_fold_N, None]
            shown_nK = shares_n1 * is_shown_NK[in_fold_N]
            not_shown_nK = shares_n1 * ~is_shown_NK[in_fold_N]
            present_K = head.numbers > 0
            is_single_K = np.isinf(head.other_numbers)  # one class per image

            # How far the mean of a class exceeds held-out images that show it.
            of_class_K = present_K * shown_nK.sum(axis=0)
            surplus += (present_K * shown_nK * (head.own - products_nK)).sum()
            in_common_K = is_single_K / max(1, present_K.sum())
            inverses += (of_class_K * (1 - in_common_K) / np.maximum(head.numbers, 1)).sum()

            # How far held-out images that do not show the class exceed the mean of such images.
            without_K = present_K & ~is_single_K
            surplus += (without_K * not_shown_nK * (products_nK - head.others)).sum()
            not_of_class_K = without_K * not_shown_nK.sum(axis=0)
            inverses += (not_of_class_K / np.maximum(head.other_numbers, 1)).sum()
    return max(0.0, float(surplus / inverses)) if inverses else 0.0


def estimate_margins(
    validations: Sequence[OutOfFold], scores_VNK: Array, targets: Targets
) -> Array:
    """Estimate the margins (K,), by which a class of fewer than `ENOUGH` photographs must exceed the others.

    The others are called learned. The score of a class of few photographs is uncertain: without a
    margin, the class would take photographs of learned classes. With it, it takes about the share
    `TAKEN` of them. The margin is the upper end of a prediction interval of the surplus: how far
    the class exceeds the right one in held-out photographs that the learned classes alone get
    right. The fewer such photographs, the wider the interval. The margin is 0 for learned
    classes, with fewer than two such photographs, and if no class is learned.

    Letters: V cross-validations, L learned classes, F the others, P predictions that count.
    """
    is_learned_K = validations[0].numbers >= ENOUGH
    margins_K = np.zeros(len(is_learned_K))
    if is_learned_K.all() or not is_learned_K.any():
        return margins_K

    # Which predictions the learned classes alone get right, and the surplus of the others.
    of_learned_VNL = scores_VNK[..., is_learned_K]
    is_right_VN = np.flatnonzero(is_learned_K)[of_learned_VNL.argmax(axis=2)] == targets.strata
    surplus_VNF = scores_VNK[..., ~is_learned_K] - of_learned_VNL.max(axis=2, keepdims=True)

    # The upper end of the interval of each class. A photograph counts once, though V
    # cross-validations predict it; images of a group count as one.
    shares_VN = np.broadcast_to(validations[0].shares, is_right_VN.shape)
    has_class_VNK = np.stack([one.has_class() for one in validations])
    for position, label in enumerate(np.flatnonzero(~is_learned_K)):
        is_judged_VN = is_right_VN & has_class_VNK[..., label]
        count = float(validations[0].shares[is_judged_VN.any(axis=0)].sum())
        if count > 1 + 1e-6:
            surplus_P = surplus_VNF[..., position][is_judged_VN]
            shares_P = shares_VN[is_judged_VN]
            mean = np.average(surplus_P, weights=shares_P)
            deviation = np.sqrt(np.average(np.square(surplus_P - mean), weights=shares_P))
            quantile = stdtrit(count - 1, 1 - TAKEN) * np.sqrt(1 + 1 / count)
            margins_K[label] = max(0.0, mean + quantile * deviation)
    return margins_K
