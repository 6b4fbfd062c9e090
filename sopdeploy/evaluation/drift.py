"""Drift: whether the newest predictions come from the same traffic as earlier ones.

A window of predictions is compared with a reference of earlier ones, five times: the most
probable classes, the log-odds of the largest probability, the score of `known`, the share of
images that `known` rejects, and measures of the image itself, which need no network and see a
camera or a lamp that the predictions hide.

A large change shows in `NEWEST` predictions, a small one only in many, so both are compared: the
newest ones and the whole window. Fewer predictions, or a reference that is not complete yet, must
differ more (`compare_answers`).

Photographs that follow each other are alike: several show one object, or one hour. So a sample is
no set of independent images but of *blocks* of consecutive ones, and the p-value comes from
exchanging blocks between the samples (a permutation test; Good, "Permutation Tests", 2000). A
scaled chi-square with the mean and the variance of the exchanged statistics has its tail (Box,
Annals of Mathematical Statistics 1954). With enough answers, every difference becomes
significant, so an alarm also needs a large one: a *shift* in standard deviations of one answer.

Letters: N answers, B blocks, F numbers of a statistic, E exchanges.
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
REFERENCE = 300  # predictions of a complete first reference
PART = 5  # consecutive answers that are exchanged while there are too few blocks
NUM_EXCHANGES = 1000
SIGNIFICANCE = 0.002  # of each statistic: of all five together 1 % (Bonferroni)
MIN_SHIFT = 0.1  # standard deviations
MAX_LOG_ODDS = 10.0  # larger ones are clipped: no difference between sure and surer
# What a difference of each statistic probably comes from.
CAUSES = {
    "image": "the photos look different: a camera, the light, the background",
    "score": "things that belong to none of the classes",
    "classes": "another mix of the classes, or a new one",
    "confidence": "photos that are harder or easier, perhaps of a new class",
    "unknown": "more or fewer unknown images than before",
}

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in a gray level (ITU-R BT.601)

_Floats = NDArray[np.float64]


class Answers(NamedTuple):
    """Consecutive answers: classes (N,), log-odds and scores (N,), and `measure_image` of each (N, F).

    `unknown` (N,) is 1 where `known` is false, else 0; NaN if the bundle has no threshold for it.
    """

    classes: NDArray[np.int64]
    confidence: NDArray[np.float32]
    score: NDArray[np.float32]
    image: NDArray[np.float32]
    unknown: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        logits_NC: NDArray[np.float32],
        image_NF: NDArray[np.float32],
        unknown_N: NDArray[np.float32] | None = None,
    ) -> "Answers":
        """Describe answers with finite *logits_NC*, C at least 1, and the measures *image_NF*.

        *unknown_N* is None if the bundle has no threshold of `known`.
        """
        classes = logits_NC.argmax(axis=1)
        largest = logits_NC[np.arange(len(logits_NC)), classes]

        # The log-odds of the largest probability: that logit against all others together, or, if
        # there is only one class, against 0, as with a sigmoid.
        others = logits_NC.copy()
        others[np.arange(len(logits_NC)), classes] = -np.inf
        is_only = logits_NC.shape[1] == 1
        rest = np.zeros(len(logits_NC)) if is_only else log_sum_exp(others)
        log_odds = np.clip(largest - rest, -MAX_LOG_ODDS, MAX_LOG_ODDS)

        scores = log_sum_exp(logits_NC)
        if unknown_N is None:
            unknown_N = np.full(len(logits_NC), np.nan, np.float32)
        return cls(
            classes,
            log_odds.astype(np.float32),
            scores.astype(np.float32),
            image_NF,
            unknown_N.astype(np.float32),
        )

    def newest(self, count: int) -> "Answers":
        """Return the last *count* answers, or all if they are fewer."""
        return Answers(
            self.classes[-count:],
            self.confidence[-count:],
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
            "confidence": self.confidence[:, None].astype(np.float64),
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

    The share of rejected images is compared only if both tell it. Few predictions are less certain,
    and are compared more often. So with a part of a full window and of a complete reference, the
    p-value is divided by this part, and the shift is reduced by its square root.
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
        shift, p_value, rises = compare_samples(first[name], second[name], size)
        compared[name] = Comparison(math.sqrt(share) * shift, min(1.0, p_value / share), rises)
    return compared


def compare_samples(first_NF: _Floats, second_NF: _Floats, size: int = BLOCK) -> Comparison:
    """Compare the means of two samples, each of whole blocks of *size* consecutive rows.

    Each column is divided by its standard deviation. Columns of several classes, which are 0 or 1,
    are not, so that rare classes count less. Equal samples have the shift 0 and the p-value 1.
    """
    # Columns in standard deviations, except those of classes, which are 0 or 1.
    rises = bool(second_NF[:, 0].mean() > first_NF[:, 0].mean())
    joined_NF = np.concatenate([first_NF, second_NF])
    is_share = bool(((joined_NF == 0) | (joined_NF == 1)).all()) and joined_NF.shape[1] > 1
    if not is_share:
        deviations_F = joined_NF.std(axis=0)
        joined_NF = joined_NF / np.where(deviations_F > 0, deviations_F, 1.0)
    within = sum(
        float(part.var(axis=0).sum())
        for part in (joined_NF[: len(first_NF)], joined_NF[len(first_NF) :])
    )
    if not within:
        is_equal = bool((joined_NF == joined_NF[0]).all())
        return Comparison(0.0, 1.0) if is_equal else Comparison(math.inf, 0.0, rises)

    # The squared distance of the means is a quadratic form in the weights of the blocks.
    num_first = len(first_NF) // size
    blocks_BF = joined_NF.reshape(-1, size, joined_NF.shape[1]).mean(axis=1)
    blocks_BF -= blocks_BF.mean(axis=0)
    gram_BB = blocks_BF @ blocks_BF.T
    num_second = len(blocks_BF) - num_first
    weights_B = np.repeat([1 / num_first, -1 / num_second], [num_first, num_second])
    squared = max(0.0, float(weights_B @ gram_BB @ weights_B))

    # The same distance after exchanges of blocks, which are random but always the same.
    random = np.random.default_rng(0)
    exchanged_EB = random.permuted(np.tile(weights_B, (NUM_EXCHANGES, 1)), axis=1)
    squares_E = np.einsum("eb,bc,ec->e", exchanged_EB, gram_BB, exchanged_EB, optimize=True)
    mean = float(squares_E.mean())
    variance = float(squares_E.var())

    # The distance beyond that of exchanged blocks, in standard deviations within a sample.
    shift = math.sqrt(max(0.0, squared - mean) / (within / 2))
    if variance == 0:  # all blocks are equal
        return Comparison(shift, 1.0, rises)

    # The squares have the distribution of c chi-square(d). The mean c d and the variance 2 c^2 d
    # give d = 2 mean^2 / variance and, for the statistic, squared / c = 2 mean squared / variance.
    p_value = chi_square_tail(2 * mean * squared / variance, 2 * mean**2 / variance)
    return Comparison(shift, p_value, rises)


def chi_square_tail(statistic: float, degrees: float) -> float:
    """Approximate the probability of a larger *statistic* (Wilson and Hilferty, PNAS 1931)."""
    variance = 2.0 / (9.0 * degrees)
    # The cube root is nearly Gaussian.
    deviation = ((statistic / degrees) ** (1 / 3) - (1.0 - variance)) / math.sqrt(variance)
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
