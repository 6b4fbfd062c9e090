"""The linear problem of a head: vectors, reduced to their span, and the classifiers fitted to them.

The weights of a head (`discriminant`) lie in the span of the inputs, so they are computed in an
orthonormal basis of this span, with at most as many dimensions as there are images. Of more than
`MAX_RANK` images, a random choice of that many spans the space: memory and time grow with the
images, and not with their product with the features.

Letters: N images, D features, D_0 of the network's own vector, R dimensions of the basis, K
classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from sopdeploy.training.few_shot.discriminant import SHRINKAGE, Discriminant, Moments
from sopdeploy.training.few_shot.scaling import OutOfFold, Scaling
from sopdeploy.training.few_shot.targets import MIN_FOLDS, Array, Indices, Targets, share_groups

MAX_RANK = 1024
IMPLAUSIBLE = 0.1  # probability of a label
DIFFUSE = 0.53
ROWS = 4096  # images whose sums are computed at once
# Shares of the identity in the covariance, of which `shrink_to_learn` chooses one
SHRINKAGES = (SHRINKAGE, 0.3, 0.5, 0.7, 0.8, 0.9)
LEARNABLE = 0.5  # of the held-out loss


class LinearHead(NamedTuple):
    """`weight` (K, D) and `bias` (K,) of a linear layer."""

    weight: Array
    bias: Array

    def logits(self, inputs: NDArray[np.floating]) -> Array:
        """Compute logits (n, K) of inputs (n, D)."""
        return inputs @ self.weight.T + self.bias


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
    `groups` (N,) with the same classes count together as one; by default, all are different.
    `shrinkage` is the share of the identity in the covariance.
    """

    space: Space
    reduced: NDArray[np.float32]
    own: NDArray[np.float32]
    targets: Targets
    weights: Array | float = 1.0
    groups: Indices | None = None
    shrinkage: float = SHRINKAGE

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
            heads.append(
                total.without(of_fold).discriminate(self.targets.activation, self.shrinkage)
            )
            products_NK[in_fold_N] = self.reduced[in_fold_N] @ heads[-1].weight.T
        return OutOfFold(products_NK, heads, folds_N, total.numbers(), self.shares())

    def _groups(self) -> Indices:
        """Return the group (N,) of each image; without groups, its index."""
        return np.arange(len(self.reduced)) if self.groups is None else self.groups

    def shares(self) -> Array:
        """Weigh the images (N,) so that those of a group with the same classes count as one."""
        return share_groups(self.targets.classes, self._groups())

    def moments(self, images: NDArray[np.bool_]) -> Moments:
        """Compute the sums over *images* (N,), in blocks to save memory.

        Those of a group with the same classes count as one, so that a burst of one thing does not
        outweigh the other images of its class.
        """
        num_classes = self.targets.classes.shape[1]
        rank = self.reduced.shape[1]
        chosen = np.flatnonzero(images)
        shares_n = share_groups(self.targets.classes[chosen], self._groups()[chosen])
        products = np.zeros((rank + 1, rank + 1))
        sums = np.zeros((num_classes, rank + 1))
        num_blocks = 1 + len(chosen) // ROWS
        for block, shares in zip(
            np.array_split(chosen, num_blocks),
            np.array_split(shares_n, num_blocks),
            strict=True,
        ):
            inputs = np.pad(
                self.reduced[block].astype(np.float64), ((0, 0), (0, 1)), constant_values=1.0
            )
            counted = shares[:, None] * inputs
            products += inputs.T @ counted
            sums += self.targets.classes[block].T @ counted

        # The sums of shares are whole numbers.
        sums[:, -1] = np.rint(sums[:, -1])
        products[-1, -1] = np.rint(products[-1, -1])
        return Moments(products, sums)

    def logits(self, validation: OutOfFold, scaling: Scaling) -> Array:
        """Compute the out-of-fold logits (N, K) of a cross-validation."""
        scores_NK = validation.scores(scaling.excess) - scaling.margins
        return scores_NK / scaling.temperature + self.targets.log_odds(self.shares())

    def logits_without_doubted(
        self, logits_NK: Array, folds_N: Indices, scaling: Scaling
    ) -> Array:
        """Compute out-of-fold logits (N, K) by heads that are not fitted to images with doubtful labels.

        These logits contradict wrong labels more clearly (Northcutt et al., "Confident Learning", JAIR
        2021, section 3). A label is doubtful if by *logits_NK* it is less probable than another
        class and than `IMPLAUSIBLE`. If none is, these logits are returned.
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
        head = self._fit_to_all()
        # For reduced = ((vector - center) * scale) @ basis, weight @ reduced = weight_KD @
        # (vector - center).
        weight_KD = (head.weight / scaling.temperature @ self.space.basis.T) * self.space.scale
        bias_K = (head.bias(scaling.excess) - scaling.margins) / scaling.temperature
        bias_K += self.targets.log_odds(self.shares())
        return LinearHead(weight_KD, bias_K - weight_KD @ self.space.center)

    def shrink_to_learn(self, folds: Sequence[Indices]) -> tuple["LinearProblem", Scaling]:
        """Shrink the covariance until the head no longer interpolates the training images; fit the scaling.

        A head whose loss on the training images is almost 0 gives a network that starts from it no
        gradient. The smallest of `SHRINKAGES` counts with which this loss is at least `LEARNABLE`
        of that of images outside of the *folds* (N,), or else the largest.
        """
        for shrinkage in SHRINKAGES:
            problem = replace(self, shrinkage=shrinkage)
            validations = [problem.cross_validate(folds_N) for folds_N in folds]
            scaling = Scaling.fit(validations, self.targets)
            held_out = self.targets.losses(problem.logits(validations[0], scaling)).mean()
            learned = self.targets.losses(problem.training_logits(scaling)).mean()
            if learned >= LEARNABLE * held_out:
                break
        return problem, scaling

    def training_logits(self, scaling: Scaling) -> Array:
        """Compute the logits (N, K) of the images by the head that is fitted to all of them."""
        head = self._fit_to_all()
        scores_NK = self.reduced @ head.weight.T + head.bias(scaling.excess) - scaling.margins
        logits_NK: Array = scores_NK / scaling.temperature
        return logits_NK + self.targets.log_odds(self.shares())

    def _fit_to_all(self) -> Discriminant:
        moments = self.moments(np.ones(len(self.reduced), np.bool_))
        return moments.discriminate(self.targets.activation, self.shrinkage)

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
        return self.targets.classes * np.reshape(self.weights * self.shares(), (-1, 1))

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
