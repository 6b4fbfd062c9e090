"""Drift: whether the newest predictions come from the same traffic as earlier ones.

A window of predictions is compared with a reference of earlier ones, four times: the most probable
classes, the score of `known`, the share of images that `known` rejects, and measures of the image
itself, which need no network and see a camera or a lamp that the predictions hide. How sure the
predictions are is not compared: a bundle is too sure of reference images that it was trained on
(docs/decisions.md).

A large change shows in `NEWEST` predictions, a small one only in more (`sopdeploy.evaluation.watch`
compares the newest 100, 200 and 300, and the whole window). Fewer predictions, or a reference of
fewer than `REFERENCE`, must differ more clearly (`compare_answers`).

Photographs that follow each other are alike: several show one object, or one hour. Single images
are not independent, so the means of *blocks* of consecutive images are compared. The p-value comes
from an F test, which compares the distance of the means with the variance of blocks within the
samples. The numbers of a statistic depend on each other, so the test has fewer degrees of freedom
(Box, Annals of Mathematical Statistics 1954; Bai and Saranadasa, Statistica Sinica 1996). Rejected
images are often rare, so their share must also differ by Fisher's exact test. With enough answers, every difference
becomes significant, so an alarm also needs a large one: a *shift* in standard deviations of one
answer.

Letters: N answers, B blocks, F numbers of a statistic.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import log_sum_exp
from sopdeploy.images.preprocess import Pixels

BLOCK = 25  # consecutive answers
WINDOW = 1000  # predictions of a full window
NEWEST = 100  # predictions that show a large change
REFERENCE = 300  # predictions from which on a reference is no longer compared more strictly
PART = 5  # consecutive answers of a block while there are too few of `BLOCK`
SIGNIFICANCE = 0.002  # of each statistic: of all four together 0.8 % (Bonferroni)
MIN_SHIFT = 0.1  # standard deviations
# What a difference of each statistic probably comes from.
CAUSES = {
    "image": "the photos look different: a camera, the light, the background",
    "score": "things that belong to none of the classes",
    "classes": "another mix of the classes, or a new one",
    "unknown": "more or fewer unknown images than before",
}

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in a gray level (ITU-R BT.601)

_Floats = NDArray[np.float64]


class Answers(NamedTuple):
    """Consecutive answers: classes (N,), scores (N,), and `measure_image` of each (N, F).

    `unknown` (N,) is 1 where `known` is false, else 0; NaN if the bundle has no threshold for it.
    """

    classes: NDArray[np.int64]
    score: NDArray[np.float32]
    image: NDArray[np.float32]
    unknown: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        logits_NC: NDArray[np.floating],
        image_NF: NDArray[np.float32],
        unknown_N: NDArray[np.float32] | None = None,
    ) -> "Answers":
        """Describe answers with finite *logits_NC*, C at least 1, and the measures *image_NF*.

        *unknown_N* is None if the bundle has no threshold of `known`.
        """
        if unknown_N is None:
            unknown_N = np.full(len(logits_NC), np.nan, np.float32)
        return cls(
            logits_NC.argmax(axis=1),
            log_sum_exp(logits_NC).astype(np.float32),
            image_NF,
            unknown_N.astype(np.float32),
        )

    def newest(self, count: int) -> "Answers":
        """Return the last *count* answers, or all if they are fewer."""
        return Answers(
            self.classes[-count:],
            self.score[-count:],
            self.image[-count:],
            self.unknown[-count:],
        )

    @property
    def has_unknown(self) -> bool:
        """Whether it is known which images were rejected."""
        return not bool(np.isnan(self.unknown).any())

    def columns(self, num_classes: int) -> Mapping[str, _Floats]:
        """Return the numbers (N, F) of each statistic."""
        return {
            "unknown": self.unknown[:, None].astype(np.float64),
            "classes": np.eye(num_classes)[self.classes],
            "score": self.score[:, None].astype(np.float64),
            "image": self.image.astype(np.float64),
        }


class Comparison(NamedTuple):
    """Result of one statistic: the *shift* in standard deviations, and the *p_value*.

    The p-value is the probability of a difference of this size without drift. `rises` tells
    whether the mean (of the first column) is higher than before.
    """

    shift: float
    p_value: float
    rises: bool = False

    @property
    def is_alarm(self) -> bool:
        """Whether the difference is no chance, and large."""
        return self.p_value < SIGNIFICANCE and self.shift > MIN_SHIFT


def measure_image(pixels: Pixels) -> NDArray[np.float32]:
    """Measure *pixels* (H, W, 3) uint8: light, color, contrast and sharpness, eleven numbers."""
    # Colors of a quarter of the pixels, which suffice, and the gray levels of all.
    values = pixels[::2, ::2].astype(np.float32)
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    gray = pixels.astype(np.float32) @ np.asarray(LUMA, np.float32)
    height, width = gray.shape

    # The border is mostly background.
    inner = gray[height // 4 : -height // 4, width // 4 : -width // 4]
    border = (gray.sum() - inner.sum()) / max(1, gray.size - inner.size)

    # Differences of neighbors, fine and coarse: a lens, a codec, a texture.
    details = []
    for step in (1, 2, 4):
        part = gray[: height - height % step, : width - width % step]
        coarse = part.reshape(height // step, step, width // step, step).mean(axis=(1, 3))
        differences = np.abs(np.diff(coarse, axis=0)).mean() + np.abs(np.diff(coarse)).mean()
        details.append(math.log(float(differences) + 1.0))

    # Light, contrast, border against middle, three of color, dark and bright parts, details.
    colorfulness = (values.max(axis=2) - values.min(axis=2)).mean()
    return np.asarray(
        [
            gray.mean(),
            math.log(float(gray.std()) + 1.0),
            border - inner.mean(),
            (red - green).mean(),
            (blue - green).mean(),
            colorfulness,
            (gray < 32).mean(),
            (gray > 224).mean(),
            *details,
        ],
        np.float32,
    )


def compare_answers(
    reference: Answers, window: Answers, num_classes: int
) -> dict[str, Comparison]:
    """Compare *window* with *reference*, both whole blocks, in each statistic of `CAUSES`.

    The share of rejected images is compared only if both tell it. Few predictions are compared more
    often. So with a part of a full window and of a complete reference, the p-value is divided by
    this part.
    """
    first = reference.columns(num_classes)
    second = window.columns(num_classes)
    names = [
        name
        for name in CAUSES
        if name != "unknown" or (reference.has_unknown and window.has_unknown)
    ]
    complete = min(1.0, len(reference.classes) / REFERENCE)
    share = complete * min(1.0, len(window.classes) / WINDOW)
    size = BLOCK if complete == 1 else PART

    compared = {}
    for name in names:
        result = compare_samples(first[name], second[name], size)
        compared[name] = result._replace(p_value=min(1.0, result.p_value / share))
    return compared


def compare_samples(first_NF: _Floats, second_NF: _Floats, size: int = BLOCK) -> Comparison:
    """Compare the means of two samples, each of whole blocks of *size* consecutive rows.

    Each column is divided by its standard deviation. Columns of several classes, which are 0 or 1,
    are not, so that rare classes count less. Equal samples have the shift 0 and the p-value 1.
    """
    # Columns in standard deviations, except those of classes, which are 0 or 1.
    rises = bool(second_NF[:, 0].mean() > first_NF[:, 0].mean())
    joined_NF = np.concatenate([first_NF, second_NF])
    is_binary = bool(((joined_NF == 0) | (joined_NF == 1)).all())
    is_share = is_binary and joined_NF.shape[1] == 1
    if is_share or not is_binary:
        deviations_F = joined_NF.std(axis=0)
        joined_NF = joined_NF / np.where(deviations_F > 0, deviations_F, 1.0)
    within = sum(
        float(part.var(axis=0).sum())
        for part in (joined_NF[: len(first_NF)], joined_NF[len(first_NF) :])
    )
    if not within:
        is_equal = bool((joined_NF == joined_NF[0]).all())
        return Comparison(0.0, 1.0) if is_equal else Comparison(math.inf, 0.0, rises)

    num_first = len(first_NF) // size
    blocks_BF = joined_NF.reshape(-1, size, joined_NF.shape[1]).mean(axis=1)
    squared, p_value = compare_means(blocks_BF[:num_first], blocks_BF[num_first:])

    # Of a rare event, blocks show too little variance, so an exact test must also see a difference.
    if is_share:
        p_value = max(p_value, compare_shares(first_NF[:, 0] > 0, second_NF[:, 0] > 0))
    return Comparison(math.sqrt(squared / (within / 2)), p_value, rises)


def compare_means(first_BF: _Floats, second_BF: _Floats) -> tuple[float, float]:
    """Return the squared distance of the means beyond what chance lets expect, at least 0, and its p-value."""
    samples = first_BF, second_BF
    distance_F = second_BF.mean(axis=0) - first_BF.mean(axis=0)
    squared = float(distance_F @ distance_F)

    # The variance of a row, from the rows of each sample alone: so a difference of the samples does
    # not hide itself.
    residuals_BF = np.concatenate([sample - sample.mean(axis=0) for sample in samples])
    freedom = len(residuals_BF) - 2
    covariance_FF = residuals_BF.T @ residuals_BF / freedom
    variance = float(np.trace(covariance_FF))
    expected = variance * sum(1 / len(sample) for sample in samples)
    excess = max(0.0, squared - expected)
    if variance == 0:  # all rows of a sample are equal
        return excess, 0.0 if squared else 1.0

    # So many independent numbers of equal variance have the same sum of squared covariances, which
    # few rows overestimate.
    squares = float((covariance_FF**2).sum()) - variance**2 / freedom
    squares *= freedom**2 / ((freedom - 1) * (freedom + 2))
    degrees = variance**2 / max(squares, variance**2 / len(covariance_FF))
    return excess, f_tail(squared / expected, degrees, degrees * freedom)


def compare_shares(first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]) -> float:
    """Return the p-value of a difference of two shares of independent answers (Fisher's exact test)."""
    num_second = int(second_N.sum())
    total = num_second + int(first_N.sum())

    # The number of ways in which k of the positive answers are in the second sample, for each k.
    fewest = max(0, total - len(first_N))
    most = min(total, len(second_N))
    ways = [
        math.comb(len(second_N), k) * math.comb(len(first_N), total - k)
        for k in range(fewest, most + 1)
    ]
    place = num_second - fewest
    tail = min(sum(ways[: place + 1]), sum(ways[place:]))
    return min(1.0, 2 * tail / sum(ways))


def f_tail(ratio: float, first: float, second: float) -> float:
    """Approximate the probability of a larger *ratio* of mean squares with these degrees of freedom.

    The cube roots of both are nearly Gaussian (Paulson, Annals of Mathematical Statistics 1942).
    """
    root = ratio ** (1 / 3)
    variances = 2 / (9 * first), 2 / (9 * second)
    difference = (1 - variances[1]) * root - (1 - variances[0])
    deviation = difference / math.sqrt(variances[1] * root**2 + variances[0])
    return math.erfc(deviation / math.sqrt(2.0)) / 2.0


def describe_alarms(comparisons: Mapping[str, Comparison]) -> str:
    """Say which statistics raise an alarm, the largest shift first, and what causes such a shift."""
    alarms = sorted(
        (comparison.shift, name)
        for name, comparison in comparisons.items()
        if comparison.is_alarm
    )
    return "; ".join(
        f"{CAUSES[name]} ({name} {shift:.2f} standard deviations)"
        for shift, name in reversed(alarms)
    )
