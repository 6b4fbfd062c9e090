"""Choice of the regularization by out-of-fold losses, and the score of the choice.

For the estimate, the choice of C for a fold is repeated with the losses of the other folds only, so that the
images of a fold have no part in the choice that is scored on them (Varma and Simon, BMC Bioinformatics 2006).

Letters: N images, K classes, G values of C.
"""

import numpy as np

from sopdeploy.data.near import effective_count
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.training.few_shot.classifier import Array, Indices, Targets


def compose(losses_GN: Array, logits_GNK: Array, folds_N: Indices) -> Array:
    """Choose C for each fold by the losses on the other folds; join the logits of the choices to (N, K)."""
    composed_NK = np.zeros(logits_GNK.shape[1:])
    for fold in range(int(folds_N.max()) + 1):
        tested = folds_N == fold
        strength = losses_GN[:, ~tested].mean(axis=1).argmin()
        composed_NK[tested] = logits_GNK[strength, tested]
    return composed_NK


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
