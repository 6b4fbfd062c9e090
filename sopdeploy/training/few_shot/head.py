"""A regularized linear head: multinomial or per-class logistic regression in float64.

The objective is the weighted mean of the loss over images plus l2 / 2 times the squared norm of the weights;
the bias is not regularized. Inputs are centered and divided by the root of their mean squared norm, so that
the same grid of `l2` suits all networks. The optimum lies in the span of the inputs. The problem is therefore
solved in an orthonormal basis of this span, with at most as many dimensions as there are rows.

Letters: N images, V views, D features, R dimensions of the basis, C classes, L values of `l2`, K folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import derive_seed
from sopdeploy.decision import Activation

Array = NDArray[np.float64]
GRID = tuple(float(10.0**-exponent) for exponent in np.arange(0.0, 6.5, 0.5))  # descending
RANK_TOLERANCE = 1e-10  # relative to the largest eigenvalue of the Gram matrix
MAX_ITERATIONS = 1000


class LinearHead(NamedTuple):
    """`weight` (C, D) and `bias` (C,) float64 of a linear layer."""

    weight: Array
    bias: Array


@dataclass(frozen=True, slots=True)
class HeadProblem:
    """Features and targets to which linear heads are fitted.

    `reduced` (N, V, R) are the features after centering, scaling and projection, with `center` (D,), `scale`
    and `basis` (R, D). `targets` (N, C) are in [0, 1], `weights` (N,) belong to the images. A head is fitted
    to all views of an image and evaluated on the first one, which the service sees.
    """

    reduced: Array
    targets: Array
    weights: Array
    activation: Activation
    basis: Array
    center: Array
    scale: float

    @classmethod
    def create(
        cls, features_NVD: NDArray[np.floating], targets_NC: Array, weights_N: Array, activation: Activation
    ) -> "HeadProblem":
        """Center, scale and project *features_NVD* onto the basis; the targets are not used for this."""
        rows = features_NVD.astype(np.float64).reshape(-1, features_NVD.shape[-1])
        center_D = rows.mean(axis=0)
        rows = rows - center_D
        scale = float(np.sqrt(np.square(rows).sum(axis=1).mean())) or 1.0
        rows /= scale
        if len(rows) < rows.shape[1]:
            values, vectors = np.linalg.eigh(rows @ rows.T)
            keep = values > RANK_TOLERANCE * max(values[-1], RANK_TOLERANCE)
            roots = np.sqrt(values[keep])
            basis_RD = (vectors[:, keep] / roots).T @ rows
        else:
            values, vectors = np.linalg.eigh(rows.T @ rows)
            basis_RD = vectors[:, values > RANK_TOLERANCE * max(values[-1], RANK_TOLERANCE)].T
        reduced = (rows @ basis_RD.T).reshape(*features_NVD.shape[:2], -1)
        return cls(reduced, targets_NC, weights_N, activation, basis_RD, center_D, scale)

    def fit(self, images: NDArray[np.intp], l2: float, start: Array | None = None) -> Array:
        """Fit *images* (indices) and return the parameters (C, R + 1), the bias last, by L-BFGS.

        *start* are the initial parameters, by default 0. Without images, the weights become 0.
        """
        from scipy.optimize import minimize  # noqa: PLC0415  # not part of the base installation

        views, classes = self.reduced.shape[1], self.targets.shape[1]
        x = self.reduced[images].reshape(len(images) * views, self.reduced.shape[2])
        y = np.repeat(self.targets[images], views, axis=0)
        w = np.repeat(self.weights[images], views)
        w = w / w.sum()

        def objective(flat: Array) -> tuple[float, Array]:
            parameters = flat.reshape(classes, -1)
            weight, bias = parameters[:, :-1], parameters[:, -1]
            losses, gradient = loss_and_gradient(x @ weight.T + bias, y, self.activation)
            gradient *= w[:, None]
            both = np.concatenate([gradient.T @ x + l2 * weight, gradient.sum(axis=0)[:, None]], axis=1)
            return float(w @ losses + l2 / 2 * np.square(weight).sum()), both.ravel()

        if start is None:
            start = np.zeros((classes, x.shape[1] + 1))
        options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "ftol": 1e-12, "gtol": 1e-7}
        found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        parameters: Array = found.x.reshape(classes, -1)
        return parameters

    def path(self, images: NDArray[np.intp], tested: NDArray[np.intp]) -> Array:
        """Fit *images* for every `l2` of the grid; returns the logits (L, T, C) of the *tested* images."""
        logits, parameters = [], None
        for l2 in GRID:
            parameters = self.fit(images, l2, parameters)
            logits.append(self.logits(parameters, tested))
        return np.stack(logits)

    def logits(self, parameters: Array, images: NDArray[np.intp]) -> Array:
        """Compute the logits (N, C) of the first view of *images*."""
        logits_NC: Array = self.reduced[images, 0] @ parameters[:, :-1].T + parameters[:, -1]
        return logits_NC

    def losses(self, logits: Array, images: NDArray[np.intp]) -> Array:
        """Compute the weighted losses (..., N) of *logits* (..., N, C) of *images*."""
        values, _ = loss_and_gradient(logits, self.targets[images], self.activation)
        return values * self.weights[images]

    def linear(self, parameters: Array) -> LinearHead:
        """Convert *parameters* to a linear layer whose input are the features that the network computes."""
        weight_CD = parameters[:, :-1] @ self.basis / self.scale
        return LinearHead(weight_CD, parameters[:, -1] - weight_CD @ self.center)


def loss_and_gradient(logits: Array, targets: Array, activation: Activation) -> tuple[Array, Array]:
    """Compute the losses (..., N) and their gradients (..., N, C) by the logits (..., N, C).

    "softmax" is the cross-entropy, "sigmoid" the sum over classes of the binary cross-entropy.
    """
    if activation == "sigmoid":
        losses = (np.logaddexp(0.0, logits) - targets * logits).sum(axis=-1)
        return losses, np.exp(-np.logaddexp(0.0, -logits)) - targets
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(logits - largest)
    sums = exponentials.sum(axis=-1, keepdims=True)
    losses = (np.log(sums) + largest)[..., 0] - (targets * logits).sum(axis=-1)
    return losses, exponentials / sums - targets


class HeadEstimate(NamedTuple):
    """Out-of-fold `logits` (N, C), the chosen `l2`, and `l2_of_fold`, chosen without the images of a fold."""

    logits: Array
    l2: float
    l2_of_fold: tuple[float, ...]


def cross_validate(problem: HeadProblem, folds_N: NDArray[np.intp]) -> HeadEstimate:
    """Choose `l2` by cross-validation, and compute the out-of-fold logits of every image.

    The logits of a fold use the `l2` with the smallest loss on the other folds, predicted by heads that were
    fitted without this fold (nested cross-validation; Varma and Simon, BMC Bioinformatics 2006). With only
    two folds, the other fold must be predicted by a head that was fitted to this one.
    """
    count, images = int(folds_N.max()) + 1, np.arange(len(folds_N))
    members = [images[folds_N == fold] for fold in range(count)]
    outer_LNC = np.zeros((len(GRID), *problem.targets.shape))
    for fold, tested in enumerate(members):
        outer_LNC[:, tested] = problem.path(images[folds_N != fold], tested)
    outer_LN = problem.losses(outer_LNC, images)
    inner_KL = np.zeros((count, len(GRID)))
    for one, other in combinations(range(count), 2):
        left_out = (members[one], members[other])
        if count == 2:
            losses = [outer_LN[:, tested] for tested in left_out]
        else:
            fitted = images[(folds_N != one) & (folds_N != other)]
            logits = problem.path(fitted, np.concatenate(left_out))
            losses = np.split(problem.losses(logits, np.concatenate(left_out)), [len(left_out[0])], axis=1)
        inner_KL[one] += losses[1].sum(axis=1)
        inner_KL[other] += losses[0].sum(axis=1)
    chosen_K = inner_KL.argmin(axis=1)
    return HeadEstimate(
        outer_LNC[chosen_K[folds_N], images],
        GRID[int(outer_LN.sum(axis=1).argmin())],
        tuple(GRID[index] for index in chosen_K),
    )


def assign_folds(strata: Sequence[int], keys: Sequence[str], folds: int, seed: int) -> NDArray[np.intp]:
    """Assign each image a fold (N,) out of *folds*, with the images of each stratum spread evenly.

    Images with equal *keys*, duplicates, share a fold. The result depends on *seed*, keys and strata, not on
    the order of the images.
    """
    counts: dict[int, list[int]] = {stratum: [0] * folds for stratum in sorted(set(strata))}
    totals, fold_of = [0] * folds, {}
    dealt = sorted((derive_seed(seed, "fold", key), key, one) for key, one in zip(keys, strata, strict=True))
    for _, key, stratum in dealt:
        of_stratum = counts[stratum]
        if key not in fold_of:
            fold_of[key] = min(range(folds), key=lambda fold: (of_stratum[fold], totals[fold], fold))
        of_stratum[fold_of[key]] += 1
        totals[fold_of[key]] += 1
    used = np.asarray([fold_of[key] for key in keys], dtype=np.intp)
    return np.unique(used, return_inverse=True)[1].astype(np.intp)
