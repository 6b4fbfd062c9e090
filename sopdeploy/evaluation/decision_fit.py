"""Fit of a `Decision` to predictions of images that were not used for training: temperature and rejection.

Temperature: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 4.2. It
divides all logits, so it changes probabilities but never the order of the classes. It is kept
if temperatures that are fitted without a fifth of the images at a time lower the loss of these
images.

Rejection: an image whose energy is below a threshold (`evaluation.known_threshold`) counts as
unknown. With several classes per image, each class has a threshold. The energy of a network of
the few-shot procedure is a cosine (`models.second_order_head`).

Letters: N images, M images of no class, C outputs, K classes that images show.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.decision import (
    ACCEPTS,
    Calibration,
    Decision,
    Estimate,
    Rejection,
    log_sum_exp,
    sigmoid,
)
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import DataError, amount
from sopdeploy.evaluation.known_threshold import choose_threshold
from sopdeploy.evaluation.metrics import Rate, log_loss, wilson
from sopdeploy.evaluation.statistics import LEVEL

Logits = NDArray[np.float64]

MIN_IMAGES = 50  # with fewer predictions, a temperature or a 5 % quantile is mostly noise
MIN_COSINES = 20  # the same for cosines: from here on, about 95 % of new images are accepted
MAX_TEMPERATURE = 20.0  # the smallest temperature is 1 / MAX_TEMPERATURE
SIGNIFICANT = 1.920729  # half the 95 % quantile of chi-square with one degree of freedom
NESTED_FOLDS = 5
PRIOR_IMAGES = 10  # with this many images of a class, the logit of its threshold is halved
MIN_RECOGNIZED = 0.8  # share of the unknown images; fewer are a weakness
MAX_LOGIT = 30.0  # larger absolute values are clipped


def fit_decision(
    logits: Logits,
    targets: NDArray[np.int64],
    *,
    estimated_on: Estimate,
    accepts: float = ACCEPTS,
    scalable: bool = True,
    groups: NDArray[np.integer] | None = None,
    unknown: Logits | None = None,
    is_unknown_shipped: bool = False,
    left_out: NDArray[np.float64] | None = None,
    are_cosines: bool = False,
) -> Decision:
    """Fit temperature and rejection threshold to *logits* (N, C) of images of the classes *targets* (N,).

    Only the first image of each of the *groups* (N,) of copies is used. With fewer than
    `least_images` or with one class, nothing is fitted.

    Args:
        logits: Predictions for images that the network was not trained on.
        estimated_on: Where the predictions come from, for reports.
        accepts: Fraction of known images to accept. With 1, or if N is too small for the quantile, there is
            no rejection; for cosines, `explain_missing_threshold` says why.
        scalable: Whether the logits can be divided; otherwise the temperature is 1. It is also 1 without
            evidence for another value (`fit_temperature`, `temperature_lowers_loss`).
        groups: The groups of the images; by default, all images are different.
        unknown: Predictions (M, C) for images of no class, which the rejection is tested with.
        is_unknown_shipped: Whether the unknown images come with the network, not from a folder.
        left_out: Energies (N,) of the images if their own class is left out, another test.
        are_cosines: Whether the energies of the *logits* are cosines.
    """
    # Copies of a photograph count once.
    if groups is not None:
        # The index of the first image of each group, in the order of the images.
        first_of_group = np.sort(np.unique(groups, return_index=True)[1])
        logits = logits[first_of_group]
        targets = targets[first_of_group]
        left_out = None if left_out is None else left_out[first_of_group]

    if len(logits) < least_images(are_cosines=are_cosines) or logits.shape[1] < 2:
        return Decision()

    # The temperature first: the threshold is of scaled logits.
    is_scaled = scalable and temperature_lowers_loss(logits, targets)
    temperature = fit_temperature(logits, targets) if is_scaled else 1.0
    scaled = logits / temperature
    calibration = Calibration(
        temperature=temperature,
        loss_before=log_loss(logits, targets),
        loss_after=log_loss(scaled, targets),
        num_images=len(logits),
        estimated_on=estimated_on,
    )

    # The threshold of their energies, and what it rejects.
    rejection = None
    if threshold := choose_threshold(log_sum_exp(scaled), accepts, are_cosines=are_cosines):
        unknown_energies = None if unknown is None else log_sum_exp(unknown / temperature)
        new_class_share = None
        if left_out is not None:
            new_class_share = new_class_interval(left_out < threshold.value, targets)
        rejection = Rejection(
            threshold=threshold.value,
            accepts=accepts,
            accepted=threshold.accepted,
            recognized=_count_rejected(unknown_energies, threshold.value),
            is_unknown_shipped=is_unknown_shipped and unknown is not None,
            new_class=_count_rejected(left_out, threshold.value),
            new_class_share=new_class_share,
        )

    return Decision(calibration=calibration, rejection=rejection)


def fit_to_images(
    logits: Logits,
    images: LabeledImages,
    labels: Sequence[str],
    *,
    accepts: float,
    is_multi_label: bool,
    scalable: bool = True,
) -> Decision:
    """Fit a decision to the *logits* (N, C) of *images*; the classes of the logits are *labels*.

    Of photos that show one object, the first counts. With several classes per image, each class gets a
    threshold, and *accepts* is not used. The other arguments are those of `fit_decision`.
    """
    if is_multi_label:
        thresholds = fit_thresholds(images.targets, sigmoid(logits))
        return Decision(activation="sigmoid", thresholds=thresholds)

    output_of_class = np.array([labels.index(label) for label in images.labels])
    return fit_decision(
        logits,
        output_of_class[images.targets.astype(np.int64)],
        estimated_on="held-out",
        accepts=accepts,
        scalable=scalable,
        groups=images.groups,
    )


def check_are_enough(images: LabeledImages) -> None:
    """Raise `DataError` for fewer than `MIN_IMAGES`, one of each group: their decision would be chance."""
    count = len(images)
    noun = "image"
    if images.groups is not None:  # one image of each counts, as in a run
        count = len(np.unique(images.groups))
        noun = "different image"

    if count < MIN_IMAGES:
        raise DataError(
            f"only {amount(count, noun)}; give at least {MIN_IMAGES}", setting="fit_decision"
        )


def least_images(*, are_cosines: bool) -> int:
    """Return the smallest number of images that a decision is fitted to."""
    return MIN_COSINES if are_cosines else MIN_IMAGES


def _count_rejected(
    energies: NDArray[np.float64] | None, threshold: float
) -> tuple[int, int] | None:
    """Count the *energies* (M,) below *threshold*, and all of them; None without *energies*."""
    return None if energies is None else (int((energies < threshold).sum()), len(energies))


def new_class_interval(
    is_rejected_N: NDArray[np.bool_], targets: NDArray[np.int64]
) -> tuple[float, float]:
    """Compute the 95 % interval of the rejected share of a new class, from the share of each class left out.

    *is_rejected_N* tells which images are rejected while their class, *targets* (N,), is left
    out. The interval is Student's prediction interval of one more class: of the shares of K
    classes with the mean m and the deviation s, m +- t s sqrt(1 + 1 / K). It contains Wilson's
    interval with as many trials as classes, because two or three equal shares say little about
    the next one.
    """
    from scipy.special import stdtrit  # noqa: PLC0415 # SciPy takes a quarter of a second

    labels, class_N = np.unique(targets, return_inverse=True)
    shares_K = np.bincount(class_N, is_rejected_N) / np.bincount(class_N)
    mean = float(shares_K.mean())
    count = len(labels)
    low, high = wilson(mean * count, count)
    if count > 1:
        deviation = float(shares_K.std(ddof=1)) * math.sqrt(1 + 1 / count)
        half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * deviation
        low = max(0.0, min(low, mean - half))
        high = min(1.0, max(high, mean + half))
    return low, high


def explain_missing_threshold(num_images: int, num_classes: int, accepts: float) -> str:
    """Say why `fit_decision` fits no threshold of cosines for unknown images; empty if it fits one.

    *num_images* counts different images; *accepts* is the argument of `fit_decision`.
    """
    min_images = least_images(are_cosines=True)
    if num_images < min_images:
        return (
            f"not recognized, because a threshold needs {min_images} "
            f"different images and there are {num_images}; add "
            f"{min_images - num_images}"
        )

    if num_classes < 2:
        return "not recognized, because there is only one class"
    if accepts == 1:
        return "not recognized, because all images are to be accepted"
    return ""


def temperature_lowers_loss(logits: Logits, targets: NDArray[np.int64]) -> bool:
    """Check whether temperatures fitted to four fifths of the images lower the loss of the other fifth."""
    folds = np.arange(len(targets)) % NESTED_FOLDS
    scaled = logits.copy()
    for fold in range(NESTED_FOLDS):
        tested = folds == fold
        scaled[tested] /= fit_temperature(logits[~tested], targets[~tested])
    return log_loss(scaled, targets) < log_loss(logits, targets)


def fit_temperature(logits: Logits, targets: NDArray[np.int64]) -> float:
    """Find the temperature with the smallest negative log-likelihood, in [1/20, 20].

    The result is 1 if the data determine no temperature: no prediction is wrong (the likelihood
    then grows until the bound), the optimum is at a bound, or a likelihood ratio test at 5 %
    keeps 1 (Wilks, 1938).
    """
    if (logits.argmax(axis=1) == targets).all():
        return 1.0
    from scipy.optimize import minimize_scalar  # noqa: PLC0415

    def loss(log_temperature: float) -> float:
        return log_loss(logits / math.exp(log_temperature), targets)

    bound = math.log(MAX_TEMPERATURE)
    optimum = minimize_scalar(
        loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}
    )

    # A better temperature at the bound, or by chance, is none.
    at_bound = abs(optimum.x) > bound - 0.01  # within 1 % of the temperature
    # The likelihood ratio is of sums; `loss` is a mean over images.
    significant = len(targets) * (loss(0.0) - optimum.fun) >= SIGNIFICANT
    return math.exp(optimum.x) if significant and not at_bound else 1.0


def fit_thresholds(targets: NDArray[np.floating], probabilities: Logits) -> tuple[float, ...]:
    """Choose the threshold of each class that maximizes F1 of *probabilities* (N, C) for *targets* (N, C).

    The logit of the best threshold is multiplied by n / (n + PRIOR_IMAGES), where n images show
    the class: few images determine it only roughly, so the threshold moves towards 0.5. It is
    0.5 if no image or every image shows the class.
    """
    thresholds = []

    for true, scores in zip(targets.T > 0, probabilities.T, strict=True):
        count = int(true.sum())
        if count in (0, len(true)):
            thresholds.append(0.5)
        else:
            logit = _best_logit(true, scores) * count / (count + PRIOR_IMAGES)
            thresholds.append(1 / (1 + float(np.exp(-logit))))
    return tuple(thresholds)


def _best_logit(true: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Return the threshold, as a logit, with the largest F1 of *scores* (N,) for *true* (N,).

    It is half-way between the logits of two scores, or that of the lowest score. Of several
    with the largest F1, it is the one nearest to 0, the probability 0.5.
    """
    from sklearn.metrics import precision_recall_curve  # noqa: PLC0415  # its import takes a second

    # Precision and recall at each distinct score, ascending.
    precision, recall, distinct = precision_recall_curve(true, scores)
    # The last value belongs to no score: it is for a threshold above all of them.
    precision = precision[:-1]
    recall = recall[:-1]

    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(distinct) - np.log1p(-distinct), -MAX_LOGIT, MAX_LOGIT)

    lower_neighbors = np.append(logits[0], logits[:-1])  # the lowest logit has none
    halfway = (logits + lower_neighbors) / 2
    best = halfway[f1 >= f1.max() - 1e-12]  # equal but for rounding
    return float(min(best, key=lambda logit: (abs(logit), -logit)))  # of +x and -x, +x


def describe_weakness(rule: Rejection | None, before: Rejection | None) -> str:
    """Say that *rule* rejects few unknown images, or clearly fewer than *before*; empty if neither holds.

    "Few" is less than `MIN_RECOGNIZED` of the images that test the threshold. "Clearly" means
    that the 95 % interval of *rule* is below the interval of *before*.
    """
    now = _recognition_rate(rule)
    earlier = _recognition_rate(before)
    # Shares of different images, those that come with the network or those of a folder, cannot be
    # compared.
    if rule and before and rule.is_unknown_shipped != before.is_unknown_shipped:
        earlier = None

    if now is None:
        return ""
    has_fallen = earlier is not None and now.high < earlier.low
    if now.share >= MIN_RECOGNIZED and not has_fallen:
        return ""

    text = f"only {now.right} of {now.count} unknown images are rejected"
    if earlier is not None:
        text += f", {earlier.right} of {earlier.count} before"
    return f"{text}; add photos of all classes and of unknown things, and compare before you promote"


def _recognition_rate(rule: Rejection | None) -> Rate | None:
    """Compute the rate of unknown images that *rule* rejects; None if no unknown image tested it."""
    if rule is None or rule.recognized is None or not rule.recognized[1]:
        return None
    return Rate.of(*rule.recognized)
