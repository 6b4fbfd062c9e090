"""Linear classifiers: targets, folds, cross-validation, and its score.

Objective, solver, and folds are those of scikit-learn (`LogisticRegression`, `StratifiedGroupKFold`), whose
import takes a second: C times the weighted sum of the losses plus half the squared norm of the
weights; the bias is not regularized. The optimum lies in the span of the inputs, so it is found in an
orthonormal basis of this span, with at most as many dimensions as there are images. Of more than `MAX_RANK`
images, a random choice of that many spans the space, so that time and memory grow linearly with the images.

Letters: N images, D features, R dimensions of the basis, K classes, G values of C, the weight of the losses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from sopdeploy.decision import Activation, energy
from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.photos.copies import effective_count
from sopdeploy.photos.photo import LabeledImages

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
GRID = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of C, for inputs whose mean squared norm is 1 per part
MAX_RANK = 1024
BALANCE_ABOVE = 1.5  # ratio of the largest class to the smallest
DISTANCE_WEIGHT = 0.5  # standard deviations of the energy that one of the distance counts as
IMPLAUSIBLE = 0.1  # probability of a label
ROWS = 1024  # images that are centered and scaled at once
_OPTIONS = {"gtol": 1e-4, "ftol": 64 * np.finfo(float).eps, "maxiter": 2000, "maxls": 50}  # scikit-learn's


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of N images: `classes` (N, K) in [0, 1], `weights` (N,) in the loss, `strata` for the folds."""

    classes: Array
    weights: Array
    strata: NDArray[np.int64]
    activation: Activation
    balanced: bool

    @classmethod
    def of(cls, images: LabeledImages) -> "Targets":
        """Build the targets from class indices (N,) or, with several classes per image, (N, K).

        With several classes per image, the stratum of an image is its rarest class, or -1 without a class.
        Classes are then not balanced, because the loss of a class does not depend on other classes.
        """
        targets, ones = images.targets.astype(np.int64), np.ones(len(images))
        if targets.ndim == 2:
            is_shown_NK = targets > 0
            # The number of images of each class that an image shows; infinite for the other classes.
            counts_NK = np.where(is_shown_NK, targets.sum(axis=0), np.inf)
            rarest_N = np.where(is_shown_NK.any(axis=1), counts_NK.argmin(axis=1), -1)
            return cls(is_shown_NK.astype(np.float64), ones, rarest_N, activation="sigmoid", balanced=False)
        one_hot_NK = np.eye(len(images.labels))[targets]
        counts_K = one_hot_NK.sum(axis=0)
        at_least_one_K = np.maximum(counts_K, 1)  # a class may have no images here
        balanced = bool(counts_K.max() > BALANCE_ABOVE * at_least_one_K.min())
        weights_N = (counts_K.mean() / at_least_one_K)[targets] if balanced else ones  # by the image's class
        return cls(one_hot_NK, weights_N, targets, activation="softmax", balanced=balanced)

    def losses(self, logits: Array) -> Array:
        """Compute the weighted loss (..., N) of logits (..., N, K); "sigmoid" is the mean over classes."""
        if self.activation == "sigmoid":
            losses: Array = (np.logaddexp(0.0, logits) - self.classes * logits).mean(axis=-1)
        else:
            losses = -(self.classes * log_softmax(logits, axis=-1)).sum(axis=-1)
        return losses * self.weights

    def contradictions(self, groups_N: Indices) -> Iterator[Indices]:
        """Yield the images of each group whose images have different classes."""
        for group in np.flatnonzero(np.bincount(groups_N) > 1):
            images = np.flatnonzero(groups_N == group)
            if (self.classes[images] != self.classes[images[0]]).any():
                yield images

    def folds(self, keys: Sequence[str], at_most: int, seed: int) -> Indices:
        """Assign each image to one of *at_most* folds (N,), which have equal shares of each class.

        Images with equal *keys* share a fold, so that there are at most as many folds as keys. Many folds are
        wanted, even more than a class has images: each head is then fitted to nearly all images, and its
        energies are similar to those of the final head. Raises `DataError` if all keys are equal.
        """
        _, groups_N = np.unique(keys, return_inverse=True)  # each key as a number from 0
        num_groups = int(groups_N.max()) + 1
        if num_groups == 1:
            raise DataError(
                "all training images are copies of one photograph; cross-validation needs different images"
            )
        num_folds = min(at_most, num_groups)
        _, stratum_sizes = np.unique(self.strata, return_counts=True)
        # If no stratum has an image for every fold, only the sizes of the folds are balanced: one stratum.
        strata = self.strata if stratum_sizes.max() >= num_folds else np.zeros_like(self.strata)
        return _spread(strata, groups_N, num_folds, seed % 2**32)  # NumPy's limit for seeds


class LinearHead(NamedTuple):
    """`weight` (K, D) and `bias` (K,) of a linear layer."""

    weight: Array
    bias: Array


class OutOfFold(NamedTuple):
    """A cross-validation: mean `losses` (G,), `logits` (N, K), and `distances` (N,) from the mean image."""

    losses: Array
    logits: Array
    distances: Array


@dataclass(frozen=True, slots=True)
class Problem:
    """Inputs of N images in a basis of their span, `reduced` (N, R), with `targets`.

    An input is `(vector - center) * scale`, and `basis` (D, R) is orthonormal.
    """

    reduced: Array
    basis: Array
    center: Array
    scale: Array
    targets: Targets

    @classmethod
    def create(cls, parts: Sequence[NDArray[np.floating]], targets: Targets) -> "Problem":
        """Build the problem of the vectors whose *parts* are (N, D_i): center, scale and project them.

        Each part is divided by the root of its mean squared norm, so that statistics of different lengths and
        units have equal weights. No target is used for this.
        """
        count = len(parts[0])
        blocks = [slice(start, start + ROWS) for start in range(0, count, ROWS)]  # to save memory
        centers, scales = [], []
        for part in parts:
            center = part.mean(axis=0, dtype=np.float64)
            squares = sum(float(np.square(part[block] - center).sum()) for block in blocks)
            norm = np.sqrt(squares / count) or 1.0  # 0 if all images have the same part
            centers.append(center)
            scales.append(np.full(len(center), 1 / norm))
        center_D, scale_D = np.concatenate(centers), np.concatenate(scales)

        def inputs(images: Any) -> Array:
            """Compute the inputs (n, D) of *images*, a slice or indices."""
            return (np.concatenate([part[images] for part in parts], axis=1) - center_D) * scale_D

        # At most `MAX_RANK` random images. If these are all, they are in their order, and the basis is exact.
        spanning = np.sort(np.random.default_rng(0).permutation(count)[:MAX_RANK])
        basis = np.linalg.qr(inputs(spanning).T)[0]  # (D, R)
        reduced = np.concatenate([inputs(block) @ basis for block in blocks])
        return cls(reduced, basis, center_D, scale_D, targets)

    def fit(self, images: Indices, grid: Sequence[float]) -> Iterator[LinearHead]:
        """Fit a head on `reduced` to *images* for each C of *grid*, in this order.

        With "sigmoid", each class is a problem with the classes "absent" and "present", whose difference of
        logits is the logit of the class.
        """
        inputs, classes = self.reduced[images], self.targets.classes[images]
        weights = self.targets.weights[images]
        if self.targets.activation == "softmax":
            yield from _fit_softmax(inputs, classes, weights, grid)
            return
        absent_and_present = (np.stack([1 - column, column], axis=1) for column in classes.T)  # (n, 2) each
        # For each class, an iterator over its heads (two rows), one for each C.
        heads_of_classes = [_fit_softmax(inputs, pair, weights, grid) for pair in absent_and_present]
        for heads in zip(*heads_of_classes, strict=True):  # of all classes, for the next C
            yield LinearHead(
                np.stack([head.weight[1] - head.weight[0] for head in heads]),
                np.stack([head.bias[1] - head.bias[0] for head in heads]),
            )

    def cross_validate(
        self, folds_N: Indices, grid: Sequence[float] = GRID, fitted: NDArray[np.bool_] | bool = True
    ) -> Array:
        """Compute out-of-fold logits (G, N, K): those of an image by heads that were fitted without its fold.

        *fitted* (N,) selects the images to which heads are fitted, by default all.
        """
        logits_GNK = np.zeros((len(grid), *self.targets.classes.shape))
        for fold in range(int(folds_N.max()) + 1):
            tested = folds_N == fold
            for number, head in enumerate(self.fit(np.flatnonzero(fitted & ~tested), grid)):  # of each C
                logits_GNK[number, tested] = self.reduced[tested] @ head.weight.T + head.bias
        return logits_GNK

    def out_of_fold(self, folds_N: Indices) -> "OutOfFold":
        """Cross-validate; the images of a fold have no part in its choice of C (`compose`)."""
        logits_GNK = self.cross_validate(folds_N)
        losses_GN = self.targets.losses(logits_GNK)
        logits_NK = compose(losses_GN, logits_GNK, folds_N)
        return OutOfFold(losses_GN.mean(axis=1), logits_NK, self.distances(folds_N))

    def doubt_labels(self, logits_NK: Array, folds_N: Indices, strength: float) -> Array:
        """Compute out-of-fold logits (N, K) by heads that are not fitted to images with doubtful labels.

        A label is doubtful if, by the out-of-fold *logits_NK*, its probability is below `IMPLAUSIBLE` and
        another class is more probable. Without any, *logits_NK* are returned. Heads without these images
        contradict their labels more clearly (Northcutt et al., "Confident Learning", JAIR 2021, section 3).
        """
        log_probabilities_NK = log_softmax(logits_NK, axis=1)
        is_label_NK = self.targets.classes > 0  # true once in each row, so that it selects N values
        of_label_N = log_probabilities_NK[is_label_NK]
        other_is_likelier_N = of_label_N < log_probabilities_NK.max(axis=1)
        doubted_N = other_is_likelier_N & (of_label_N < np.log(IMPLAUSIBLE))
        if not doubted_N.any():
            return logits_NK
        return self.cross_validate(folds_N, [strength], fitted=~doubted_N)[0]

    def fit_all(self, strength: float) -> LinearHead:
        """Fit a head to all images with C = *strength*; it reads the vectors of the network, not `reduced`.

        Like the heads of the cross-validation, it starts from the head of the next smaller C of `GRID`. For a
        large C, the solver stops before the optimum, so that its logits depend on the start. Thresholds that
        were fitted to out-of-fold logits must suit this head, too.
        """
        *_, head = self.fit(np.arange(len(self.reduced)), GRID[: GRID.index(strength) + 1])  # the last one
        # For reduced = ((vector - center) * scale) @ basis, weight @ reduced = weight_KD @ (vector - center).
        weight_KD = (head.weight @ self.basis.T) * self.scale
        return LinearHead(weight_KD, head.bias - weight_KD @ self.center)

    def distances(self, folds_N: Indices) -> Array:
        """Compute the distance (N,) of each input from the mean of the images of the other folds."""
        distances_N = np.zeros(len(self.reduced))
        for fold in range(int(folds_N.max()) + 1):
            tested = folds_N == fold
            center_R = self.reduced[~tested].mean(axis=0)
            distances_N[tested] = np.linalg.norm(self.reduced[tested] - center_R, axis=1)
        return distances_N

    def distance_weight(self, logits_NK: Array, distances_N: Array) -> float:
        """Compute the weight w: all logits of an image are reduced by w times its distance (*distances_N*).

        The logits of a linear classifier grow with the distance from the mean of the training images, also
        for images that resemble none of them. The subtraction lowers the energy of distant images and keeps
        all probabilities; ViM subtracts the norm of a residual (Wang et al., CVPR 2022, section 4). With the
        standard deviations s over the images, w = `DISTANCE_WEIGHT` * s(energy) / s(distance).
        """
        if self.targets.activation == "sigmoid":  # no energy is used there
            return 0.0
        return DISTANCE_WEIGHT * float(energy(logits_NK).std() / max(distances_N.std(), 1e-12))


def _fit_softmax(
    inputs: Array, classes: Array, image_weights: Array, grid: Sequence[float]
) -> Iterator[LinearHead]:
    """Fit a head to one-hot *classes* (N, K) for each C of *grid*, starting from the head of the previous C.

    A class without images gets the same low logit for every image.
    """
    present = np.flatnonzero(classes.any(axis=0))  # indices of the P classes with images
    targets, shares = classes[:, present], image_weights / image_weights.sum()
    parameters = np.zeros((len(present), inputs.shape[1] + 1))  # (P, R + 1): the last column is the bias
    # For two classes, scikit-learn fits only the difference d of their rows and regularizes |d|^2. The rows
    # here are then d / 2 and -d / 2, whose squared norms add up to |d|^2 / 2, so they count twice.
    norm_factor = 2 if len(present) == 2 else 1
    for strength in grid:
        if len(present) > 1:  # otherwise there is nothing to fit, or no image at all
            regularization = norm_factor / (strength * image_weights.sum())
            fixed = (inputs, targets, shares, regularization)  # the other arguments of the loss
            found = minimize(_softmax_loss, parameters.ravel(), fixed, "L-BFGS-B", jac=True, options=_OPTIONS)
            parameters = found.x.reshape(parameters.shape)
        # By the rule of succession, a class without images has the probability 1 / (N + 2), odds of 1 to
        # N + 1: its logit is log(N + 1) below that of another class, here the lowest bias (at most 0).
        absent_logit = parameters[:, -1].min(initial=0.0) - np.log(len(inputs) + 1.0)
        weight, bias = np.zeros((classes.shape[1], inputs.shape[1])), np.full(classes.shape[1], absent_logit)
        weight[present], bias[present] = parameters[:, :-1], parameters[:, -1]
        yield LinearHead(weight, bias)


def _softmax_loss(
    parameters: Array, inputs: Array, targets: Array, shares: Array, regularization: float
) -> tuple[float, Array]:
    """Compute the loss of a linear classifier, and its gradient by *parameters*, both (K * (R + 1),).

    The parameters are a row (weight, bias) for each class, joined. *inputs* are (N, R), *targets* (N, K), and
    *shares* (N,) the weights of the images, with the sum 1.
    """
    weight, bias = np.split(parameters.reshape(targets.shape[1], -1), [-1], axis=1)  # (K, R) and (K, 1)
    log_probabilities = log_softmax(inputs @ weight.T + bias[:, 0], axis=1)  # (N, K)
    loss = regularization / 2 * np.square(weight).sum() - shares @ (targets * log_probabilities).sum(axis=1)
    grad_logits = shares[:, None] * (np.exp(log_probabilities) - targets)  # (N, K)
    grad_weight = grad_logits.T @ inputs + regularization * weight
    grad_bias = grad_logits.sum(axis=0)[:, None]
    return float(loss), np.concatenate([grad_weight, grad_bias], axis=1).ravel()


def _spread(strata_N: NDArray[np.int64], groups_N: Indices, count: int, seed: int) -> Indices:
    """Assign the groups to *count* folds with equal shares of each stratum; returns the folds (N,) of images.

    The groups with the most uneven strata are assigned first, as long as others can compensate them.
    """
    _, stratum_N, sizes_S = np.unique(strata_N, return_inverse=True, return_counts=True)  # numbered from 0
    images_GS = np.zeros((int(groups_N.max()) + 1, len(sizes_S)))  # number by group and stratum
    np.add.at(images_GS, (groups_N, stratum_N), 1)  # counts each image
    shuffled = np.random.RandomState(seed).permutation(len(images_GS))  # groups in scikit-learn's order
    unevenness = images_GS[shuffled].std(axis=1)  # of the shuffled groups
    fold_G = np.zeros(len(images_GS), np.intp)
    images_FS = np.zeros((count, len(sizes_S)))  # number by fold and stratum, of the groups assigned so far
    for group in shuffled[np.argsort(-unevenness, kind="stable")]:
        fold = _most_even_fold(images_FS, images_GS[group], sizes_S)
        fold_G[group] = fold
        images_FS[fold] += images_GS[group]
    _, folds_N = np.unique(fold_G[groups_N], return_inverse=True)  # renumbered, without empty folds
    return folds_N.astype(np.intp)


def _most_even_fold(images_FS: Array, group_S: Array, sizes_S: Indices) -> int:
    """Choose the fold for a group of *group_S* images by stratum; all images of a stratum are *sizes_S*.

    The strata are then spread most evenly over the folds. Of equally good folds, the smallest is chosen.
    """
    count = len(images_FS)
    # Entry [f] is `images_FS` with the group added to its row f, where the identity matrix is 1.
    attempts_FFS = images_FS + np.eye(count)[:, :, None] * group_S
    share_of_stratum_FFS = attempts_FFS / sizes_S
    deviation_over_folds_FS = share_of_stratum_FFS.std(axis=1)
    unevenness_F = deviation_over_folds_FS.mean(axis=1)  # of each attempt
    fold_sizes_F = images_FS.sum(axis=1)
    best = 0
    for fold in range(1, count):
        is_smaller = fold_sizes_F[fold] < fold_sizes_F[best]
        is_as_even = np.isclose(unevenness_F[fold], unevenness_F[best])
        if unevenness_F[fold] < unevenness_F[best] or (is_as_even and is_smaller):
            best = fold
    return best


def compose(losses_GN: Array, logits_GNK: Array, folds_N: Indices) -> Array:
    """Choose one of the G values of C for each fold by the losses on other folds; join the logits to (N, K).

    The images of a fold have no part in the choice that is scored on them (Varma and Simon, 2006).
    """
    composed_NK = np.zeros(logits_GNK.shape[1:])
    for fold in range(int(folds_N.max()) + 1):
        tested = folds_N == fold
        chosen = losses_GN[:, ~tested].mean(axis=1).argmin()  # index of C
        composed_NK[tested] = logits_GNK[chosen, tested]
    return composed_NK


def shift_energies(validations: Sequence[OutOfFold], distance_weight: float) -> Array:
    """Shift the logits (N, K) of the first validation to the mean energies of all *validations*.

    As in the deployed network, *distance_weight* times the distance is subtracted. All logits of an image are
    shifted by the same number, which shifts the energy (log-sum-exp) by it, too, and keeps the probabilities.
    """
    energies = [energy(one.logits) - distance_weight * one.distances for one in validations]
    logits_NK = validations[0].logits
    shifts_N = np.mean(energies, axis=0) - energy(logits_NK)
    return logits_NK + shifts_N[:, None]


def estimate(
    classes_NK: Array, activation: Activation, logits_NK: Array, seed: int, groups_N: Indices, folds: int = 0
) -> Rate | MeanPrecision:
    """Compute top-1 with Wilson's interval, or mAP with a bootstrap interval, of independent *groups_N*.

    *folds* is the number of folds of a cross-validation, or 0 for held-out images. The heads of a
    cross-validation share most of their training images, so the interval of top-1 is widened: Nadeau and
    Bengio, "Inference for the Generalization Error" (2003), section 3.
    """
    if activation == "softmax":
        right = logits_NK.argmax(axis=1) == classes_NK.argmax(axis=1)
        # The variance of a mean of J folds is s (1 / J + r), not s / J, where r = 1 / (J - 1) is the ratio of
        # test images to training images of a fold. So the factor is 1 + r J.
        variance_factor = 1 + folds / (folds - 1) if folds > 0 else 1.0
        return Rate.of(int(right.sum()), len(right), effective_count(groups_N) / variance_factor)
    return MeanPrecision.of(classes_NK > 0, logits_NK, seed, groups_N)
