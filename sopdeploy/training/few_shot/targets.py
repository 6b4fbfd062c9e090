"""Targets of images, and the folds in which they are predicted.

Letters: N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from sopdeploy.bundle.decision import Activation
from sopdeploy.data.photos.copies import number_classes
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import DataError

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
MIN_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of N images: `classes` (N, K) in [0, 1], and `strata` (N,) for the folds."""

    classes: Array
    strata: NDArray[np.int64]
    activation: Activation

    @classmethod
    def of(cls, images: LabeledImages) -> "Targets":
        """Build the targets from class indices (N,) or, with several classes per image, (N, K).

        With several classes per image, the stratum of an image is its rarest class, or -1
        without a class.
        """
        targets = images.targets.astype(np.int64)
        if images.is_multi_label:
            is_shown_NK = targets > 0
            # The number of images of each class that an image shows; infinite for the other
            # classes.
            counts_NK = np.where(is_shown_NK, targets.sum(axis=0), np.inf)
            rarest_N = np.where(is_shown_NK.any(axis=1), counts_NK.argmin(axis=1), -1)
            return cls(is_shown_NK.astype(np.float64), rarest_N, activation="sigmoid")
        return cls(np.eye(len(images.labels))[targets], targets, activation="softmax")

    def losses(self, logits: Array) -> Array:
        """Compute the loss (N,) of logits (N, K); with "sigmoid", it is the mean over classes."""
        if self.activation == "sigmoid":
            return (np.logaddexp(0.0, logits) - self.classes * logits).mean(axis=1)
        return -(self.classes * log_softmax(logits, axis=1)).sum(axis=1)

    def log_odds(self, shares_N: Array) -> Array:
        """Compute the log-odds (K,) of each class; with "softmax", a discriminant needs none: zeros.

        *shares_N* are the weights of the images (`share_groups`).
        """
        if self.activation == "softmax":
            return np.zeros(self.classes.shape[1])
        counts_K = shares_N @ self.classes
        return np.log(counts_K + 0.5) - np.log(shares_N.sum() - counts_K + 0.5)

    def folds(self, keys: Sequence[str], at_most: int, seed: int) -> Indices:
        """Assign each image to a fold (N,).

        Images with equal *keys* are a group, and a group stays in one fold. The folds have equal
        shares of each stratum if some stratum has a group for every fold, otherwise equal sizes.
        The number of folds is the smallest of these:

        - *at_most*,
        - the number of groups,
        - the number of groups of any stratum that has `MIN_FOLDS` or more. With more folds, some
          heads would lack images of the class and be biased against it.

        Empty folds are left out. Raises `DataError` if all keys are equal.
        """
        _, groups_N = np.unique(keys, return_inverse=True)  # each key as a number from 0
        num_groups = int(groups_N.max()) + 1
        if num_groups == 1:
            raise DataError(
                "all training images are one group, such as a clip or copies of "
                "one photo; cross-validation needs different images"
            )

        # How many groups each stratum has: each pair of both counts once.
        groups_of_strata = np.unique(np.stack([self.strata, groups_N]), axis=1)
        _, stratum_sizes = np.unique(groups_of_strata[0], return_counts=True)
        num_folds = min(
            at_most, num_groups, *stratum_sizes[stratum_sizes >= MIN_FOLDS].tolist()
        )
        # Without a stratum that has a group for every fold, all images count as one stratum.
        strata = self.strata if stratum_sizes.max() >= num_folds else np.zeros_like(self.strata)
        folds_N = spread_groups(groups_N, strata, num_folds, seed)
        return np.unique(folds_N, return_inverse=True)[1]  # renumbered, without empty folds


def spread_groups(
    groups_N: Indices, strata_N: NDArray[np.int64], num_folds: int, seed: int
) -> Indices:
    """Assign each group of images to one of *num_folds* folds (N,), so that each has its share of all strata.

    This is the algorithm of scikit-learn's `StratifiedGroupKFold`, whose import takes two
    seconds: groups in random order, the most uneven ones first, each into the fold that spreads
    the strata best. Letters: G groups, S strata, F folds.
    """
    num_groups = int(groups_N.max()) + 1
    _, stratum_index_N, sizes_S = np.unique(strata_N, return_inverse=True, return_counts=True)
    images_GS = np.zeros((num_groups, len(sizes_S)))  # number by group and stratum
    np.add.at(images_GS, (groups_N, stratum_index_N), 1)

    # NumPy's seeds are below 2**32.
    shuffled_G = np.random.RandomState(seed % 2**32).permutation(num_groups)

    fold_G = np.zeros(num_groups, np.intp)
    images_FS = np.zeros((num_folds, len(sizes_S)))  # number by fold and stratum, so far
    for group in shuffled_G[np.argsort(-images_GS[shuffled_G].std(axis=1), kind="stable")]:
        # In attempts_FFS[f], the group is added to the fold f of `images_FS`.
        attempts_FFS = images_FS + np.eye(num_folds)[:, :, None] * images_GS[group]
        unevenness = (attempts_FFS / sizes_S).std(axis=1).mean(axis=1).tolist()

        # The fold that becomes least uneven; of folds that become as even, by the tolerances of
        # `numpy.isclose`, the smallest.
        sizes = images_FS.sum(axis=1).tolist()
        best = 0
        for fold in range(1, num_folds):
            difference = unevenness[fold] - unevenness[best]
            is_as_even = abs(difference) <= 1e-8 + 1e-5 * unevenness[best]
            if difference < 0 or (is_as_even and sizes[fold] < sizes[best]):
                best = fold

        fold_G[group] = best
        images_FS[best] += images_GS[group]

    return fold_G[groups_N]


def count_groups(classes_NK: Array, groups_N: Indices) -> Indices:
    """Count the groups (K,) that have images of each class."""
    images, labels = np.nonzero(classes_NK)
    pairs = np.unique(np.stack([labels, groups_N[images]]), axis=1)
    return np.bincount(pairs[0], minlength=classes_NK.shape[1])


def divide_groups(classes_NK: Array, groups_N: Indices) -> Indices:
    """Divide groups of images by their classes: those of a group with the same classes have one number (N,)."""
    shown_N = number_classes(np.packbits(classes_NK > 0, axis=1))
    return number_classes(np.column_stack([groups_N, shown_N]))


def share_groups(classes_NK: Array, groups_N: Indices) -> Array:
    """Weigh images (N,): those of a group with the same classes have equal weights, whose sum is 1."""
    shares_N = np.ones(len(groups_N))
    _, group_N, sizes_G = np.unique(groups_N, return_inverse=True, return_counts=True)
    grouped = np.flatnonzero(sizes_G[group_N] > 1)
    if len(grouped):
        parts_n = divide_groups(classes_NK[grouped], groups_N[grouped])
        shares_N[grouped] = 1 / np.bincount(parts_n)[parts_n]
    return shares_N
