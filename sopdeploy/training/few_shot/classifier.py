"""Linear classifiers by scikit-learn: targets, folds, cross-validation.

The objective is scikit-learn's: C times the weighted sum of the losses plus half the squared norm of the
weights; the bias is not regularized. The optimum lies in the span of the inputs, so it is found in an
orthonormal basis of this span, with at most as many dimensions as there are images.

Letters: N images, D features, R dimensions of the basis, K classes, G values of C.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages
from sopdeploy.decision import Activation
from sopdeploy.errors import DataError

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
GRID = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of C, for inputs whose mean squared norm is 1 per part
TOLERANCE, MAX_ITERATIONS = 1e-4, 2000


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of N images: `classes` (N, K) in [0, 1], `weights` (N,) in the loss, `strata` for the folds."""

    classes: Array
    weights: Array
    strata: list[int]
    activation: Activation
    balanced: bool

    @classmethod
    def of(cls, images: LabeledImages, balance_above: float) -> "Targets":
        """Build the targets from class indices (N,) or, with several classes per image, (N, K).

        With several classes per image, the stratum of an image is its rarest class, or -1 without a class.
        Classes are then not balanced, because the loss of a class does not depend on other classes.
        """
        targets = images.targets
        if targets.ndim == 1:
            classes = np.eye(len(images.labels))[targets]
            counts = classes.sum(axis=0)
            present = np.maximum(counts, 1)
            balanced = bool(counts.max() > balance_above * present.min())
            weights = classes @ (counts.mean() / present) if balanced else np.ones(len(images))
            return cls(classes, weights, targets.tolist(), "softmax", balanced)
        rarest = np.where(targets > 0, targets.sum(axis=0), np.iinfo(np.int64).max).argmin(axis=1)
        strata = np.where(targets.any(axis=1), rarest, -1).tolist()
        return cls((targets > 0).astype(np.float64), np.ones(len(images)), strata, "sigmoid", False)

    def losses(self, logits: Array) -> Array:
        """Compute the weighted loss (..., N) of logits (..., N, K); "sigmoid" is the mean over classes."""
        if self.activation == "sigmoid":
            losses = (np.logaddexp(0.0, logits) - self.classes * logits).mean(axis=-1)
        else:
            largest = logits.max(axis=-1, keepdims=True)
            sums = np.exp(logits - largest).sum(axis=-1)
            losses = np.log(sums) + largest[..., 0] - (self.classes * logits).sum(axis=-1)
        weighted: Array = losses * self.weights
        return weighted

    def folds(self, keys: Sequence[str], folds: int, seed: int) -> Indices:
        """Assign each image a fold (N,), classes spread evenly; images with equal *keys* share a fold.

        There are at most as many folds as the smallest class has images, and at least two. Raises
        `DataError` if all images are the same.
        """
        from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415  # part of an extra

        counts = self.classes.sum(axis=0)
        count = max(2, min(folds, int(counts[counts > 0].min(initial=folds))))
        groups = np.unique(keys, return_inverse=True)[1]
        if groups.max() == 0:
            raise DataError(
                "all training images have the same pixels; cross-validation needs different images"
            )
        fold_N = np.zeros(len(groups), np.intp)
        split = StratifiedGroupKFold(count, shuffle=True, random_state=seed % 2**32)
        strata = self.strata if min(np.unique(self.strata, return_counts=True)[1]) >= count else groups * 0
        for fold, (_, tested) in enumerate(split.split(fold_N, strata, groups)):
            fold_N[tested] = fold
        return np.unique(fold_N, return_inverse=True)[1].astype(np.intp)


class LinearHead(NamedTuple):
    """`weight` (K, D) and `bias` (K,) of a linear layer."""

    weight: Array
    bias: Array

    def logits(self, inputs: Array) -> Array:
        """Compute the logits (N, K) of *inputs* (N, D)."""
        logits: Array = inputs @ self.weight.T + self.bias
        return logits


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
        """Center the *parts* (N, D_i) of the vectors and divide each by the root of its mean squared norm.

        Statistics of different lengths and units then have equal weights. No target is used for this.
        """
        centers = [part.mean(axis=0, dtype=np.float64) for part in parts]
        rows = [part - center for part, center in zip(parts, centers, strict=True)]
        norms = [float(np.sqrt(np.square(part).sum(axis=1).mean())) or 1.0 for part in rows]
        scale = np.concatenate([np.full(part.shape[1], 1 / n) for part, n in zip(rows, norms, strict=True)])
        basis, reduced = np.linalg.qr((np.concatenate(rows, axis=1) * scale).T)
        return cls(reduced.T, basis, np.concatenate(centers), scale, targets)

    def path(self, images: Indices, grid: Sequence[float] = GRID) -> Iterator[LinearHead]:
        """Fit *images* for every C of *grid*, ascending; the input of the heads is `reduced`.

        A class that all or none of *images* show gets constant logits.
        """
        from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415  # part of an extra
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

        x, y, w = self.reduced[images], self.targets.classes[images], self.targets.weights[images]
        multi_label = self.targets.activation == "sigmoid"
        columns = list(y.T) if multi_label else [y.argmax(axis=1)]
        options = {"tol": TOLERANCE, "max_iter": MAX_ITERATIONS, "warm_start": True}
        models = [LogisticRegression(**options) for _ in columns]
        rare = -np.log(len(images) + 1.0)  # log-odds of a class that was not seen
        for strength in grid:
            weight, bias = np.zeros((y.shape[1], x.shape[1])), np.full(y.shape[1], rare)
            for place, (column, model) in enumerate(zip(columns, models, strict=True)):
                shown = np.unique(column).astype(int)
                if len(shown) == 1:
                    at = place if multi_label else shown[0]
                    bias[at] = -rare if not multi_label or shown[0] else rare
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model.set_params(C=strength).fit(x, column, sample_weight=w)
                if multi_label:
                    weight[place], bias[place] = model.coef_[0], model.intercept_[0]
                elif len(shown) == 2:  # scikit-learn returns the difference of the two logits
                    weight[shown] = np.concatenate([-model.coef_, model.coef_]) / 2
                    bias[shown] = np.concatenate([-model.intercept_, model.intercept_]) / 2
                else:
                    weight[shown], bias[shown] = model.coef_, model.intercept_
                if not multi_label:
                    absent = np.setdiff1d(np.arange(y.shape[1]), shown)
                    bias[absent] = bias[shown].min() + rare
            yield LinearHead(weight, bias)

    def fit(self, images: Indices, strength: float) -> LinearHead:
        """Fit *images* with one C."""
        return next(self.path(images, [strength]))

    def cross_validate(self, folds_N: Indices) -> Array:
        """Compute the out-of-fold logits (G, N, K) for every C of the grid."""
        logits_GNK = np.zeros((len(GRID), *self.targets.classes.shape))
        for fold in range(int(folds_N.max()) + 1):
            tested = folds_N == fold
            for number, head in enumerate(self.path(np.flatnonzero(~tested))):
                logits_GNK[number, tested] = head.logits(self.reduced[tested])
        return logits_GNK

    def linear(self, head: LinearHead) -> LinearHead:
        """Convert *head*, whose input is `reduced`, to one whose input are the vectors of the network."""
        weight_KD = head.weight @ self.basis.T * self.scale
        return LinearHead(weight_KD, head.bias - weight_KD @ self.center)

    def distances(self) -> Array:
        """Compute the distance (N,) of each input from the mean input."""
        distances: Array = np.sqrt(np.square(self.reduced).sum(axis=1))
        return distances

    def without(self, column: int) -> "Problem":
        """Return the problem without the class *column*."""
        targets = replace(self.targets, classes=np.delete(self.targets.classes, column, axis=1))
        return replace(self, targets=targets)
