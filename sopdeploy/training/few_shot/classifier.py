"""Linear discriminants: targets, folds, cross-validation, calibration, and the score.

A head classifies normally distributed classes with a common covariance (Hastie, Tibshirani and
Friedman, "The Elements of Statistical Learning", 2009, section 4.3). There are more features
than images, so the covariance is shrunk towards a multiple of the identity (Friedman,
"Regularized Discriminant Analysis", JASA 1989). The weights lie in the span of the inputs, so
they are computed in an orthonormal basis of this span, with at most as many dimensions as there
are images. Of more than `MAX_RANK` images, a random choice of that many spans the space: memory
and time grow with the images, and not with their product with the features.

Letters: N images, D features, D_0 of the network's own vector, R dimensions of the basis, K
classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, stdtrit

from sopdeploy.decision import Activation
from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import Rate, effective_count, wilson
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.photos.photo import LabeledImages

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
SHRINKAGE = 0.1  # share of the identity in the covariance; 0.03 to 0.2 are as good
COMMON = 1.0  # photographs; 0 to 3 are nearly as good (docs/benchmarks/head.md)
LOG_SCALES = (-10.0, 10.0)  # of scores divided by their deviation
MAX_RANK = 1024
IMPLAUSIBLE = 0.1  # probability of a label
MIN_FOLDS = 5
DIFFUSE = 0.53
# Errors fall with the number of objects to the power of 0.7 to 1.7
# (docs/benchmarks/copied_photos.md).
LEARNING = 1.5
# A class of so many photographs is learned about as well as a class of ten
ENOUGH = 5
# Share of the photographs of larger classes that a class of fewer than `ENOUGH` may take, by the
# measurements in docs/benchmarks/head.md
TAKEN = 0.01
ROWS = 4096  # images whose sums are computed at once


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

    def log_frequencies(self) -> Array:
        """Compute the log-odds (K,) of each class; with "softmax", a discriminant needs none: zeros."""
        if self.activation == "softmax":
            return np.zeros(self.classes.shape[1])
        counts_K = self.classes.sum(axis=0)
        return np.log(counts_K + 0.5) - np.log(len(self.classes) - counts_K + 0.5)

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
                "all training images are one group, such as a clip or copies of one photograph; "
                "cross-validation needs different images"
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

        # The fold that becomes least uneven; of folds that become as even, the smallest.
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


class LinearHead(NamedTuple):
    """`weight` (K, D) and `bias` (K,) of a linear layer."""

    weight: Array
    bias: Array

    def logits(self, inputs: NDArray[np.floating]) -> Array:
        """Compute logits (n, K) of inputs (n, D)."""
        return inputs @ self.weight.T + self.bias


class Discriminant(NamedTuple):
    """A head whose scores have no scale yet, and whose biases are still to be corrected.

    Attributes:
        weight: (K, R), of length 1 on average (root of the mean square), 0 for a class without images.
        own, others: (K,) the score of the mean of the class itself, and of what it is compared with.
        numbers: (K,) independent photographs of each class, which its mean is known by; 0 without images.
        other_numbers: (K,) the same of the images that do not show it; infinite if a class is compared with
            the mean of all class means, whose noise all scores share.
    """

    weight: Array
    own: Array
    others: Array
    numbers: Array
    other_numbers: Array

    def bias(self, excess: float) -> Array:
        """Compute the bias (K,) from the squared norms of the class means, corrected for few photographs.

        The squared norm of the mean of n photographs exceeds that of the true mean by *excess* / n
        on average, so that a class of few photographs would be chosen too rarely. The corrected
        norm of few photographs is uncertain. With one class per image, it is therefore averaged
        with the norm of all classes, which counts as `COMMON` photographs.
        """
        present_K = self.numbers > 0
        counted_K = np.maximum(self.numbers, 1e-12)
        norms_K = (
            self.own
            - self.others
            - excess * (1 / counted_K - 1 / np.maximum(self.other_numbers, 1e-12))
        )
        if np.isinf(self.other_numbers).all():
            shares_K = present_K * counted_K / (counted_K + COMMON)
            common = (shares_K * norms_K).sum() / max(shares_K.sum(), 1e-12)
            norms_K = shares_K * norms_K + (1 - shares_K) * common
        bias_K = -self.others - norms_K / 2
        # The score of a class without images is this bias, and never the largest: with one class
        # per image, the weights of the other classes sum to 0, so the mean of their scores is the
        # mean of their biases, and not below the lowest one.
        bias_K[~present_K] = bias_K[present_K].min(initial=0.0) - np.log1p(self.numbers.sum())
        return bias_K


class Moments(NamedTuple):
    """Sums over inputs with a 1 at the end: `products` (R + 1, R + 1), and `sums` (K, R + 1) by class.

    `squares` (K,) are sums over the groups: of the squared number of images of the class in it.
    """

    products: Array
    sums: Array
    squares: Array

    @classmethod
    def sum(cls, parts: Sequence["Moments"]) -> "Moments":
        """Add the sums over several *parts* of the images, which divide no group."""
        return cls(*(np.sum(sums, axis=0) for sums in zip(*parts, strict=True)))

    def without(self, part: "Moments") -> "Moments":
        """Subtract the sums over a *part* of the images, which divides no group."""
        return Moments(*(whole - one for whole, one in zip(self, part, strict=True)))

    def numbers(self) -> Array:
        """Compute the number (K,) of independent photographs of each class (`effective_count`)."""
        return self.sums[:, -1] ** 2 / np.maximum(self.squares, 1)

    def discriminate(self, activation: Activation) -> Discriminant:
        """Fit a discriminant with a shrunk covariance.

        With "softmax", the covariance is that within the classes, and a class is compared with
        the mean of all class means. With "sigmoid", each class is compared with the images that
        do not show it.
        """
        sums_KR = self.sums[:, :-1]
        counts_K1 = self.sums[:, -1:]
        counts_K = self.sums[:, -1]
        total_R = self.products[-1, :-1]
        count = self.products[-1, -1]
        means_KR = sums_KR / np.maximum(counts_K1, 1)
        mean_R = total_R / max(1, count)
        total_RR = self.products[:-1, :-1] - count * np.outer(mean_R, mean_R)
        if activation == "softmax":
            present = counts_K > 0
            others_KR = np.broadcast_to(
                means_KR.sum(axis=0) / max(1, present.sum()), means_KR.shape
            )
            scatter_RR = self.products[:-1, :-1] - sums_KR.T @ means_KR
        else:
            present = (counts_K > 0) & (counts_K < count)
            others_KR = (total_R - sums_KR) / np.maximum(count - counts_K1, 1)
            scatter_RR = total_RR
        # The shrunk covariance. With one image per class, nothing is known of the scatter within
        # classes, whose trace is then 0.
        trace = max(np.trace(scatter_RR), 1e-6 * np.trace(total_RR)) or 1.0
        shrunk_RR = (1 - SHRINKAGE) * scatter_RR + SHRINKAGE * trace / len(mean_R) * np.eye(
            len(mean_R)
        )
        differences_KR = np.where(present[:, None], means_KR - others_KR, 0)
        weight = count * solve(shrunk_RR, differences_KR.T, assume_a="pos").T
        # Remove the scatter between presence and absence (Sherman, Morrison).
        if activation == "sigmoid":
            shares_K = counts_K * (count - counts_K) / max(1, count) ** 2
            between_K = (1 - SHRINKAGE) * shares_K * (weight * differences_KR).sum(axis=1)
            weight /= np.maximum(1 - between_K, 1e-6)[:, None]
        # Scale the weights: heads of more images have shorter ones, so that the heads of the
        # folds and the head of the network would differ.
        weight /= (
            np.sqrt(np.square(weight).sum(axis=1)[present].mean()) if weight.any() else 1.0
        )
        numbers_K = present * self.numbers()
        other_numbers_K = (
            count - counts_K if activation == "sigmoid" else np.full(len(counts_K), np.inf)
        )
        own_K = (weight * means_KR).sum(axis=1)
        others_K = (weight * others_KR).sum(axis=1)
        return Discriminant(weight, own_K, others_K, numbers_K, other_numbers_K)


class OutOfFold(NamedTuple):
    """A cross-validation: the products (N, K) of images and the weights of the head without their fold.

    Attributes:
        products: (N, K).
        heads: The heads without one of the folds.
        folds: The fold (N,) of each image, the index of the head that judges it.
        numbers: (K,) independent photographs of each class in all folds.
    """

    products: Array
    heads: list[Discriminant]
    folds: Indices
    numbers: Array

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
        absent from the head that predicts it has the weight 0. The targets are smoothed by 1 / (N +
        2), the rule of succession: without errors, the temperature would otherwise be 0. The
        margins are 0 unless *has_margins*.
        """
        classes_NK = targets.classes
        wrong = 1 / (len(targets.classes) + 2)
        excess = estimate_excess(validations, classes_NK > 0)
        scores_VNK = np.stack([one.scores(excess) for one in validations])
        margins: Array | float = 0.0  # not part of the loss: the temperature would be too high

        # Smoothed targets, and the weight of each image in the loss.
        weights_VNK = np.ones((1, 1, 1))
        if targets.activation == "softmax":
            smooth_NK = classes_NK * (1 - wrong) + (1 - classes_NK) * wrong / max(
                1, classes_NK.shape[1] - 1
            )
            present_VNK = np.stack([one.has_class() for one in validations])
            of_class_NK = classes_NK / np.maximum(classes_NK.sum(axis=0), 1)
            weights_VNK = (of_class_NK * present_VNK).sum(axis=-1, keepdims=True)
            if has_margins:
                margins = estimate_margins(validations, scores_VNK, targets)
        else:
            smooth_NK = classes_NK * (1 - 2 * wrong) + wrong
        # The temperature, searched in units of the deviation of the scores.
        unit = float(scores_VNK.std()) or 1.0

        def loss(log_scale: float) -> float:
            """Compute the loss by log(unit / temperature)."""
            logits = np.exp(log_scale) / unit * scores_VNK + targets.log_frequencies()
            if targets.activation == "softmax":
                return -float((weights_VNK * smooth_NK * log_softmax(logits, axis=-1)).sum())
            return float((np.logaddexp(0.0, logits) - smooth_NK * logits).sum())

        log_scale = minimize_scalar(
            loss, bounds=LOG_SCALES, method="bounded", options={"xatol": 1e-4}
        ).x
        return cls(unit / float(np.exp(log_scale)), excess, margins)


def estimate_excess(validations: Sequence[OutOfFold], is_shown_NK: NDArray[np.bool_]) -> float:
    """Estimate what the noise of one photograph adds to the squared norm of the mean of its class.

    The weights of a class fit the noise of its mean. By these weights, the mean of n photographs
    therefore exceeds held-out images of the class: on average by the result, divided by n. The
    result is the sum of these surpluses, over all heads and held-out images, divided by the sum
    of 1 / n. *is_shown_NK* tells which classes an image shows.

    With one class per image, the surplus is 1 - 1 / K times as large, because the mean of all
    class means, with which a class is compared, has 1 / K of the noise, too. With several classes
    per image, the mean of the images that do not show a class adds a surplus of its own.
    """
    surplus = expected = 0.0
    for one in validations:
        for index, head in enumerate(one.heads):
            products_nK = one.products[one.folds == index]
            shown_nK = is_shown_NK[one.folds == index]
            present_K = head.numbers > 0
            is_single_K = np.isinf(head.other_numbers)  # one class per image

            # How far the mean of a class exceeds held-out images that show it.
            of_class_K = present_K * shown_nK.sum(axis=0)
            surplus += (present_K * shown_nK * (head.own - products_nK)).sum()
            in_common_K = is_single_K / max(1, present_K.sum())
            expected += (of_class_K * (1 - in_common_K) / np.maximum(head.numbers, 1)).sum()

            # How far held-out images that do not show the class exceed the mean of such images.
            without_K = present_K & ~is_single_K
            surplus += (without_K * ~shown_nK * (products_nK - head.others)).sum()
            expected += (
                without_K * (~shown_nK).sum(axis=0) / np.maximum(head.other_numbers, 1)
            ).sum()
    return max(0.0, float(surplus / expected)) if expected else 0.0


def estimate_margins(
    validations: Sequence[OutOfFold], scores_VNK: Array, targets: Targets
) -> Array:
    """Estimate the margins (K,), by which a class of fewer than `ENOUGH` photographs must exceed the others.

    The others are learned. The score of a class of few photographs is uncertain: without a
    margin, the class would take photographs of learned classes. With it, it takes about the share
    `TAKEN` of them. The margin is the upper end of a prediction interval of the surplus: how far
    the class exceeds the right one in held-out photographs that the learned classes alone get
    right. The fewer such photographs, the wider the interval. The margin is 0 for learned
    classes, with fewer than two such photographs, and if no class is learned.

    Letters: V cross-validations, L learned classes, F the others, P predictions that count.
    """
    is_learned_K = validations[0].numbers >= ENOUGH - 1e-6
    margins_K = np.zeros(len(is_learned_K))
    if is_learned_K.all() or not is_learned_K.any():
        return margins_K

    # Which predictions the learned classes alone get right, and the surplus of the others.
    of_learned_VNL = scores_VNK[..., is_learned_K]
    is_right_VN = np.flatnonzero(is_learned_K)[of_learned_VNL.argmax(axis=2)] == targets.strata
    surplus_VNF = scores_VNK[..., ~is_learned_K] - of_learned_VNL.max(axis=2, keepdims=True)

    # The upper end of the interval of each class. A photograph counts once, though V
    # cross-validations predict it.
    has_class_VNK = np.stack([one.has_class() for one in validations])
    for position, label in enumerate(np.flatnonzero(~is_learned_K)):
        is_judged_VN = is_right_VN & has_class_VNK[..., label]
        count = int(is_judged_VN.any(axis=0).sum())
        if count > 1:
            surplus_P = surplus_VNF[..., position][is_judged_VN]
            deviations = stdtrit(count - 1, 1 - TAKEN) * np.sqrt(1 + 1 / count)
            margins_K[label] = max(0.0, surplus_P.mean() + deviations * surplus_P.std())
    return margins_K


class Space(NamedTuple):
    """The span of vectors: an input is `(vector - center) * scale`, and `basis` (D, R) is orthonormal."""

    center: Array
    scale: Array
    basis: Array

    @classmethod
    def of(cls, parts: Sequence[NDArray[np.floating]]) -> "Space":
        """Build the space of the vectors whose *parts* are (M, D_i).

        Each part is divided by the root of its mean squared norm, so that statistics of
        different lengths and units have equal weights. No target is used for this.
        """
        centers = [part.mean(axis=0, dtype=np.float64) for part in parts]
        scales = []
        inputs = []
        for part, center in zip(parts, centers, strict=True):
            centered = part - center
            # If all vectors are equal, their norm is 0, and 1 replaces it.
            norm = np.sqrt(np.square(centered).sum(axis=1).mean()) or 1.0
            scales.append(np.full(part.shape[1], 1 / norm))
            inputs.append(centered / norm)
        basis = np.linalg.qr(np.concatenate(inputs, axis=1).T)[0]
        return cls(np.concatenate(centers), np.concatenate(scales), basis)

    def project(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """Compute the coordinates (n, R) of *vectors* (n, D)."""
        return (((vectors - self.center) * self.scale) @ self.basis).astype(np.float32)


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """N images with `targets`, their vectors, and what is computed from them; folds (N,) count from 0.

    `reduced` (N, R) are the coordinates of the vectors in `space`. `own` (N, D_0) are the network's
    own vectors, scaled to length 1, with `weights` (N,) in the class means. Images of one of the
    `groups` (N,) count as one photograph; by default, all are different.
    """

    space: Space
    reduced: NDArray[np.float32]
    own: NDArray[np.float32]
    targets: Targets
    weights: Array | float = 1.0
    groups: Indices | None = None

    def cross_validate(
        self, folds_N: Indices, fitted: NDArray[np.bool_] | bool = True
    ) -> OutOfFold:
        """Fit heads to the *fitted* images (N,) without each of the folds (N,); apply them to its images."""
        products_NK = np.zeros(self.targets.classes.shape)
        heads: list[Discriminant] = []

        # The sums of each fold; a head has the sums of all folds but one.
        folds = [folds_N == fold for fold in range(int(folds_N.max()) + 1)]
        of_folds = [self.moments(in_fold_N & fitted) for in_fold_N in folds]
        total = Moments.sum(of_folds)

        for in_fold_N, of_fold in zip(folds, of_folds, strict=True):
            heads.append(total.without(of_fold).discriminate(self.targets.activation))
            products_NK[in_fold_N] = self.reduced[in_fold_N] @ heads[-1].weight.T
        return OutOfFold(products_NK, heads, folds_N, total.numbers())

    def group_counts(self) -> Indices:
        """Count the groups (K,) that have images of each class; without groups, the images."""
        images, labels = np.nonzero(self.targets.classes)
        groups = images if self.groups is None else self.groups[images]
        pairs = np.unique(np.stack([labels, groups]), axis=1)
        return np.bincount(pairs[0], minlength=self.targets.classes.shape[1])

    def moments(self, images: NDArray[np.bool_]) -> Moments:
        """Compute the sums over *images* (N,), in blocks to save memory."""
        num_classes = self.targets.classes.shape[1]
        rank = self.reduced.shape[1]
        chosen = np.flatnonzero(images)
        products = np.zeros((rank + 1, rank + 1))
        sums = np.zeros((num_classes, rank + 1))
        for block in np.array_split(chosen, 1 + len(chosen) // ROWS):
            inputs = np.pad(
                self.reduced[block].astype(np.float64), ((0, 0), (0, 1)), constant_values=1.0
            )
            products += inputs.T @ inputs
            sums += self.targets.classes[block].T @ inputs
        return Moments(products, sums, self._squared_groups(chosen))

    def _squared_groups(self, chosen: Indices) -> Array:
        """Sum (K,) the squared numbers of images of each class in each group of the *chosen* images."""
        images, labels = np.nonzero(self.targets.classes[chosen])
        num_classes = self.targets.classes.shape[1]
        groups = chosen if self.groups is None else self.groups[chosen]
        pairs, sizes = np.unique(groups[images] * num_classes + labels, return_counts=True)
        return np.bincount(pairs % num_classes, sizes**2, num_classes).astype(np.float64)

    def logits(self, validation: OutOfFold, scaling: Scaling) -> Array:
        """Compute the out-of-fold logits (N, K) of a cross-validation."""
        scores_NK = validation.scores(scaling.excess) - scaling.margins
        return scores_NK / scaling.temperature + self.targets.log_frequencies()

    def logits_without_doubted(
        self, logits_NK: Array, folds_N: Indices, scaling: Scaling
    ) -> Array:
        """Compute out-of-fold logits (N, K) by heads that are not fitted to images with doubtful labels.

        These logits contradict wrong labels more clearly (Northcutt et al., "Confident Learning", JAIR
        2021, section 3). A label is doubtful if by *logits_NK* it is less probable than another
        class and than `IMPLAUSIBLE`.
        """
        log_probabilities_NK = log_softmax(logits_NK, axis=1)
        is_label_NK = self.targets.classes > 0  # once in each row, so that it selects N values
        of_label_N = log_probabilities_NK[is_label_NK]
        another_is_likelier_N = of_label_N < log_probabilities_NK.max(axis=1)
        doubted_N = another_is_likelier_N & (of_label_N < np.log(IMPLAUSIBLE))
        if not doubted_N.any():
            return logits_NK
        return self.logits(self.cross_validate(folds_N, ~doubted_N), scaling)

    def fit_all(self, scaling: Scaling) -> LinearHead:
        """Fit a head to all images; it reads the vectors of the network, not `reduced`, and gives logits."""
        head = self.moments(np.ones(len(self.reduced), np.bool_)).discriminate(
            self.targets.activation
        )
        # For reduced = ((vector - center) * scale) @ basis, weight @ reduced = weight_KD @
        # (vector - center).
        weight_KD = (head.weight / scaling.temperature @ self.space.basis.T) * self.space.scale
        bias_K = (head.bias(scaling.excess) - scaling.margins) / scaling.temperature
        bias_K += self.targets.log_frequencies()
        return LinearHead(weight_KD, bias_K - weight_KD @ self.space.center)

    def cosines(self, folds_N: Indices) -> Array:
        """Compute the cosine (N,) of each own vector and the nearest class mean without its fold."""
        classes_NK = self._weighted_classes()
        cosines_N = np.zeros(len(self.own))
        total_KD = class_sums(self.own, classes_NK)
        for fold in range(int(folds_N.max()) + 1):
            tested = folds_N == fold
            present_K = classes_NK[~tested].sum(axis=0) > 0
            means_KD = unit_length(
                (total_KD - class_sums(self.own, classes_NK, tested))[present_K]
            )
            cosines_N[tested] = (self.own[tested] @ means_KD.T).max(axis=1)
        return cosines_N

    def diffuse_classes(self) -> Indices:
        """Find the classes whose images resemble each other far less than those of the other classes.

        The mean cosine of two of their images is below `DIFFUSE` times that of the median class.
        A class of anything else has 0.3 to 0.47 times the cosine of the median class, the other
        classes have 0.6 or more. Classes of fewer than `MIN_FOLDS` images are not judged; among
        fewer than three judged ones, none is found.
        """
        classes_NK = self.targets.classes
        counts_K = classes_NK.sum(axis=0)
        pairs_K = np.maximum(counts_K * (counts_K - 1), 1)
        cosines_K = (
            np.square(class_sums(self.own, classes_NK)).sum(axis=1) - counts_K
        ) / pairs_K
        judged_K = counts_K >= MIN_FOLDS  # of fewer images, the mean is not certain
        if judged_K.sum() < 3:
            return np.zeros(0, np.intp)
        return np.flatnonzero(judged_K & (cosines_K < DIFFUSE * np.median(cosines_K[judged_K])))

    def class_means(self) -> NDArray[np.float32]:
        """Compute the weighted mean own vector (K, D_0) of each class, scaled to length 1."""
        return mean_vectors(self.own, self._weighted_classes())

    def _weighted_classes(self) -> Array:
        """Compute the share (N, K) of each image in the mean of its class, not divided by their sum."""
        return self.targets.classes * np.reshape(self.weights, (-1, 1))

    def cosines_without_class(self) -> Array:
        """Compute the cosine (N,) of each own vector and the nearest mean of the other classes."""
        cosines_NK = self.own @ self.class_means().T
        return np.where(self.targets.classes > 0, -1.0, cosines_NK).max(axis=1)


def class_sums(
    own_ND: NDArray[np.float32],
    classes_NK: Array,
    images: NDArray[np.bool_] | slice = slice(None),
) -> Array:
    """Compute the sum (K, D_0) of the own vectors of each class over *images*, in blocks to save memory."""
    chosen = np.arange(len(own_ND))[images]
    sums_KD = np.zeros((classes_NK.shape[1], own_ND.shape[1]))
    for block in np.array_split(chosen, 1 + len(chosen) // ROWS):
        sums_KD += classes_NK[block].T @ own_ND[block]
    return sums_KD


def mean_vectors(own_ND: NDArray[np.float32], classes_NK: Array) -> NDArray[np.float32]:
    """Compute the weighted mean (K, D_0) of the own vectors of each class, scaled to length 1.

    A class without images has the mean of another one, which changes no largest cosine.
    """
    present_K = classes_NK.sum(axis=0) > 0
    filled = np.where(present_K, np.arange(present_K.size), present_K.argmax())
    return unit_length(class_sums(own_ND, classes_NK)[filled])


def unit_length(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scale *vectors* (n, D) to length 1; zeros remain."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def estimate_score(
    classes_NK: Array,
    activation: Activation,
    logits_NK: Array,
    seed: int,
    groups_N: Indices,
    folds: int = 0,
) -> Rate | MeanPrecision:
    """Compute top-1 with Wilson's interval or, with several classes per image, mAP with a bootstrap interval.

    Images of different groups, *groups_N*, are independent. *folds* is the number of folds of a
    cross-validation, or 0 for held-out images; *seed* is for the bootstrap.

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
        num_groups_K = np.asarray(
            [len(np.unique(groups_N[of_class > 0])) for of_class in classes_NK.T]
        )
        few_K = (num_groups_K > 1) & (num_groups_K < MIN_FOLDS)
        factor_K = np.where(few_K, (1 - 1 / np.maximum(num_groups_K, 2)) ** LEARNING, 1.0)
        remaining_errors = float((classes_NK @ factor_K).sum() / max(1.0, classes_NK.sum()))
        highest_share = 1 - (1 - rate.share) * remaining_errors
    high = max(rate.high, wilson(units * highest_share, units).high)
    return rate.model_copy(update={"high": high})
