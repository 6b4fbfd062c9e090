"""The score of a classifier on held-out images or those of a cross-validation, with its interval.

Letters: N images, K classes.
"""

import numpy as np

from sopdeploy.bundle.decision import Activation
from sopdeploy.evaluation.metrics import Rate, effective_count, wilson
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.training.few_shot.targets import MIN_FOLDS, Array, Indices, count_groups

# Errors fall with the number of objects to the power of 0.7 to 1.7.
LEARNING = 1.5


def estimate_score(
    classes_NK: Array,
    activation: Activation,
    logits_NK: Array,
    seed: int,
    groups_N: Indices,
    folds: int = 0,
) -> Rate | MeanPrecision:
    """Compute top-1 with Wilson's interval or, with several classes per image, mAP with a bootstrap interval.

    *classes_NK* are above 0 for the classes of an image. Images of different groups,
    *groups_N*, are independent. *folds* is the number of folds of a cross-validation, or 0 for
    held-out images; *seed* is for the bootstrap.

    The heads of a cross-validation share most of their training images, so the interval of top-1
    is widened: Nadeau and Bengio, "Inference for the Generalization Error" (2003), section 3. If
    a class has fewer groups than `MIN_FOLDS`, a head that lacks one of them errs more than
    the network, which is fitted to all. The upper end allows for this.
    """
    if activation == "sigmoid":
        return MeanPrecision.of(classes_NK > 0, logits_NK, seed, groups_N)

    right = logits_NK.argmax(axis=1) == classes_NK.argmax(axis=1)
    # The variance of a mean of J folds is s (1 / J + r), not s / J, where r = 1 / (J - 1) is
    # the ratio of test images to training images of a fold. So the factor is 1 + r J.
    variance_factor = 1 + folds / (folds - 1) if folds > 0 else 1.0
    units = effective_count(groups_N) / variance_factor
    rate = Rate.of(int(right.sum()), len(right), units)

    # In a class of G groups, the network is expected to make ((G - 1) / G)^LEARNING of the errors
    # of the heads.
    highest_share = rate.share
    if folds > 0:
        num_groups_K = count_groups(classes_NK, groups_N)
        few_K = (num_groups_K > 1) & (num_groups_K < MIN_FOLDS)
        factor_K = np.where(few_K, (1 - 1 / np.maximum(num_groups_K, 2)) ** LEARNING, 1.0)
        remaining_errors = float((classes_NK @ factor_K).sum() / max(1.0, classes_NK.sum()))
        highest_share = 1 - (1 - rate.share) * remaining_errors
    high = max(rate.high, wilson(units * highest_share, units).high)
    return rate.model_copy(update={"high": high})
