"""Whether a bundle may replace the live one: a loss that matters must be unlikely.

A replacement can be taken back in seconds, so no gain has to be proved. What is bounded is the
difference of the accuracies on the same photographs, wins and losses as in
`sopdeploy.evaluation.statistics`. With ten times as many photographs, two thirds of the loss are
tolerated: few photographs cannot show a small loss, and many can.

Photographs of a class that only the new bundle has count as they are: the live one is wrong on
them. The other photographs are then tested alone, so that a new class cannot hide what the old
classes lose. A single class refuses only a loss that is proved to be large: with a thousand
photographs, small losses of one class that others outweigh would stop every second bundle.
docs/decisions.md says which bundles pass.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

from sopdeploy.evaluation.statistics import ALPHA, Z_POWER, bound_difference, score_statistic

TOLERANCE = 5.0  # points that a bundle may lose on `TOLERANCE_IMAGES` photographs
TOLERANCE_IMAGES = 100
TENFOLD = 2 / 3  # of the tolerance remain with ten times as many (docs/decisions.md)
# With fewer, the tolerance grows no more, and a difference says too little about more images; the
# rule was measured from here on
MIN_TOLERANCE_IMAGES = 60
MIN_IMAGES = 20  # with fewer, the score test errs more often than stated, and nothing passes
OLD_TOLERANCES = 2  # tolerances that the old classes alone may lose
OLD_ALPHA = 0.2  # probability that a bundle passes although its old classes lose as much
CLASS_TOLERANCES = 2  # tolerances of 100 photographs that each class may lose
MAX_MORE_IMAGES = 1_000  # that somebody would label for one decision


class Counts(NamedTuple):
    """Photographs, and those that only the new bundle (*wins*) or the live one (*losses*) answers right."""

    images: int
    wins: int
    losses: int

    @property
    def difference(self) -> float:
        """Accuracy of the new bundle minus that of the live one."""
        return (self.wins - self.losses) / self.images


class Bound(NamedTuple):
    """A difference of accuracies, the smallest likely one (*low*), and the *limit* that *low* must reach."""

    difference: float
    low: float
    limit: float

    @property
    def passes(self) -> bool:
        """Whether a difference below the limit is unlikely."""
        return self.low >= self.limit


class Rule(NamedTuple):
    """A level, as the *quantile* of the normal distribution, and a *tolerance* in points on 100 images."""

    quantile: float
    tolerance: float

    def limit(self, images: int) -> float:
        """Return the smallest tolerated difference, a negative fraction, on so many *images*."""
        tens = math.log10(max(images, MIN_TOLERANCE_IMAGES) / TOLERANCE_IMAGES)
        return -min(0.99, self.tolerance / 100 * TENFOLD**tens)

    def bound(self, counts: Counts) -> Bound:
        """Bound the difference of *counts*: `score_statistic` rejects differences below `low` at this level.

        With fewer than `MIN_IMAGES`, nothing is rejected.
        """
        if counts.images < MIN_IMAGES:
            return Bound(counts.difference, -1.0, self.limit(counts.images))

        low = bound_difference(counts.wins, counts.losses, counts.images, -1.0, self.quantile)
        return Bound(counts.difference, low, self.limit(counts.images))

    def labels_to_pass(self, counts: Counts) -> int | None:
        """Estimate how many more labels let a bundle pass in 80 % of cases.

        The shares of wins and losses are taken to stay as they are in *counts*. None if
        `MAX_MORE_IMAGES` are not enough. For a bundle that is worse, it can be that no number is
        enough, because the tolerance shrinks with the number of images.
        """
        # The mean square of the outcomes: 1 for a win, -1 for a loss, else 0. It is at least their
        # variance. One more image with a win or loss, and one without, keep it above 0.
        mean_square = (counts.wins + counts.losses + 1) / (counts.images + 2)

        # The smallest number, in steps of 2 %, at which the difference is as far above the limit as
        # this level and this power need.
        quantiles = self.quantile + Z_POWER
        images = counts.images

        while images < counts.images + MAX_MORE_IMAGES:
            images += max(1, images // 50)
            distance = counts.difference - self.limit(images)
            if images >= MIN_IMAGES and quantiles * math.sqrt(mean_square / images) <= distance:
                return images - counts.images
        return None


def rule_of_all(tolerance: float, attempt: int) -> Rule:
    """Return the rule for all photographs; further attempts at one live bundle share the level."""
    return Rule(NormalDist().inv_cdf(1 - ALPHA / attempt), tolerance)


def rule_of_old(tolerance: float) -> Rule:
    """Return the rule for the photographs of classes that the live bundle has."""
    return Rule(NormalDist().inv_cdf(1 - OLD_ALPHA), OLD_TOLERANCES * tolerance)


def proves_class_loss(counts: Counts, tolerance: float, num_classes: int) -> bool:
    """Whether one of *num_classes* loses more than `CLASS_TOLERANCES`, by the score test of 5 % for all."""
    limit = min(0.99, CLASS_TOLERANCES * tolerance / 100)
    quantile = NormalDist().inv_cdf(1 - ALPHA / num_classes)
    return score_statistic(counts.wins, counts.losses, counts.images, -limit) <= -quantile
