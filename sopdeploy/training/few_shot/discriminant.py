"""Linear discriminants with a shrunk covariance, fitted to sums over images.

A head classifies normally distributed classes with a common covariance (Hastie, Tibshirani and
Friedman, "The Elements of Statistical Learning", 2009, section 4.3). There are more features
than images, so the covariance is shrunk towards a multiple of the identity (Friedman,
"Regularized Discriminant Analysis", JASA 1989).

Letters: R dimensions of the inputs, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve

from sopdeploy.bundle.decision import Activation
from sopdeploy.training.few_shot.targets import Array

SHRINKAGE = 0.1  # share of the identity in the covariance; 0.03 to 0.2 are as good
COMMON = 1.0  # photographs; 0 to 3 are nearly as good


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

        # With one class per image: averaged with the norm of all classes.
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

    Inputs of one group with the same classes have equal weights, whose sum is 1 (`share_groups`).
    """

    products: Array
    sums: Array

    @classmethod
    def sum(cls, parts: Sequence["Moments"]) -> "Moments":
        """Add the sums over several *parts* of the images, which divide no group."""
        return cls(*(np.sum(sums, axis=0) for sums in zip(*parts, strict=True)))

    def without(self, part: "Moments") -> "Moments":
        """Subtract the sums over a *part* of the images, which divides no group."""
        return Moments(*(whole - one for whole, one in zip(self, part, strict=True)))

    def numbers(self) -> Array:
        """Return the number (K,) of independent images of each class."""
        return self.sums[:, -1]

    def discriminate(
        self, activation: Activation, shrinkage: float = SHRINKAGE
    ) -> Discriminant:
        """Fit a discriminant with a shrunk covariance, of which the identity has the share *shrinkage*.

        With "softmax", the covariance is that within the classes, and a class is compared with
        the mean of all class means. With "sigmoid", each class is compared with the images that
        do not show it.
        """
        # The means of the classes and of all inputs. The last column of the sums counts images.
        sums_KR = self.sums[:, :-1]
        counts_K1 = self.sums[:, -1:]
        counts_K = self.sums[:, -1]
        total_R = self.products[-1, :-1]
        count = self.products[-1, -1]
        means_KR = sums_KR / np.maximum(counts_K1, 1)
        mean_R = total_R / max(1, count)
        total_RR = self.products[:-1, :-1] - count * np.outer(mean_R, mean_R)

        # What a class is compared with, and the scatter of the inputs.
        if activation == "softmax":
            present_K = counts_K > 0
            others_KR = np.broadcast_to(
                means_KR.sum(axis=0) / max(1, present_K.sum()), means_KR.shape
            )
            scatter_RR = self.products[:-1, :-1] - sums_KR.T @ means_KR
        else:
            present_K = (counts_K > 0) & (counts_K < count)
            others_KR = (total_R - sums_KR) / np.maximum(count - counts_K1, 1)
            scatter_RR = total_RR

        # The shrunk scatter: `count` times the covariance. With one image per class, nothing is known
        # of the scatter within classes, whose trace is then 0.
        trace = max(np.trace(scatter_RR), 1e-6 * np.trace(total_RR)) or 1.0
        rank = len(mean_R)
        shrunk_RR = (1 - shrinkage) * scatter_RR + shrinkage * trace / rank * np.eye(rank)

        # The weights: the inverse of the covariance, times the differences of the means.
        differences_KR = np.where(present_K[:, None], means_KR - others_KR, 0)
        weight = count * solve(shrunk_RR, differences_KR.T, assume_a="pos").T

        # Remove the scatter between presence and absence (Sherman, Morrison).
        if activation == "sigmoid":
            shares_K = counts_K * (count - counts_K) / max(1, count) ** 2
            between_K = (1 - shrinkage) * shares_K * (weight * differences_KR).sum(axis=1)
            weight /= np.maximum(1 - between_K, 1e-6)[:, None]

        # Scale the weights: heads of more images have shorter ones, so that the heads of the
        # folds and the head of the network would differ.
        if weight.any():
            weight /= np.sqrt(np.square(weight).sum(axis=1)[present_K].mean())

        # What the biases are computed from.
        numbers_K = present_K * self.numbers()
        other_numbers_K = np.full(len(counts_K), np.inf)
        if activation == "sigmoid":
            other_numbers_K = count - counts_K
        own_K = (weight * means_KR).sum(axis=1)
        others_K = (weight * others_KR).sum(axis=1)
        return Discriminant(weight, own_K, others_K, numbers_K, other_numbers_K)
