"""The rules that turn logits into classes: activation, calibration, rejection of unknown images.

Checkpoints and bundles contain a `Decision`. Probabilities and thresholds refer to calibrated
logits, which are divided by the temperature. By default, the export divides the last layer, so
the logits of a bundle are already calibrated. With `export --set trained_logits=true`, the decision of the
bundle divides them (`Decision.calibrate`). This module does not import torch.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import Count, Fraction, Positive, StrictModel
from sopdeploy.base.names import MAX_CLASSES

Activation = Literal["softmax", "sigmoid"]
Estimate = Literal["held-out", "cross-validation"]
# Larger ones are not exact as floats, or none
Occurrences = Annotated[int, pydantic.Field(ge=0, le=2**53)]
# Bounds of the confidence histogram, closer together near 1, where most confidences are.
CONFIDENCE_BOUNDS = (
    0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999,
)  # fmt: skip
ACCEPTS = 0.95  # of new known images, unless a recipe or a user says another fraction
# Width of the interval of the share of a new class that is rejected, above which it says nothing
MAX_WIDTH = 0.5
_MAX_LISTED = 20  # with more classes, a report shows only the range of the thresholds


class Calibration(StrictModel):
    """A temperature that was fitted to the predictions of images not used for training.

    Attributes:
        temperature: Divisor of the network's logits (Guo et al., ICML 2017, section 4.2).
        loss_before: Log loss of these predictions without the temperature: the mean negative log-likelihood.
        loss_after: Log loss of these predictions with the temperature.
        num_images: Number of predictions that the temperature was fitted to, one per image.
        estimated_on: Whether the predictions are of held-out images or out-of-fold predictions of a cross-validation.
    """

    temperature: Positive
    loss_before: Annotated[float, pydantic.Field(ge=0)]
    loss_after: Annotated[float, pydantic.Field(ge=0)]
    num_images: Count
    estimated_on: Estimate

    @property
    def images(self) -> str:
        """How many images of which kind the temperature was fitted to, in words."""
        kind = "validation" if self.estimated_on == "held-out" else "cross-validated"
        return f"{self.num_images:,} {kind} images"

    def row(self) -> tuple[str, str]:
        """Describe the temperature, and what it changes in the log loss, in a (name, text) row."""
        if self.temperature == 1:
            return "log loss", f"{self.loss_after:.4f} of {self.images}"
        losses = f"log loss {self.loss_before:.4f} before, {self.loss_after:.4f} after"
        return "temperature", f"{self.temperature:.4g}, from {self.images}; {losses}"


class Rejection(StrictModel):
    """Rule that rejects images of unknown classes: their energy is below `threshold`.

    A known image is one of a class of the network.

    Attributes:
        threshold: Smallest energy, the log-sum-exp of the logits, of an image that is accepted as known.
        accepts: Fraction of known images that the threshold was chosen to accept.
        accepted: 95 % interval of the fraction that it accepts of as many new known images as in the fit, if
            they are taken in the same way.
        recognized: How many unknown images it rejects, and of how many, if there are any.
        is_unknown_shipped: Whether the unknown images come with the network, not from a folder of the user.
        new_class: How many known images it rejects if their own class is left out, and of how many.
        new_class_share: 95 % interval of the fraction of a new class that it rejects.
    """

    threshold: float
    # The default is for files without this field, whatever new thresholds accept
    accepts: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.95
    accepted: tuple[Fraction, Fraction] | None = None
    recognized: tuple[Occurrences, Occurrences] | None = None
    is_unknown_shipped: bool = False
    new_class: tuple[Occurrences, Occurrences] | None = None
    new_class_share: tuple[Fraction, Fraction] | None = None

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, text) rows on the known images accepted and unknown ones rejected.

        The rejected share of a new class is listed if its interval is at most `MAX_WIDTH` wide.
        """
        # The rule, and which known images it accepts.
        accepted = f"accepts about {100 * self.accepts:g} % of new images like these"
        if self.accepted is not None:
            low, high = (100 * share for share in self.accepted)
            accepted += f" (95 % interval {low:.0f} to {high:.0f} %)"
        rows = [("rejection", f"score below {self.threshold:.4g}, {accepted}")]

        # Photographs of other things. Only images of such things measure how many are rejected;
        # the rate of a left-out class says nothing about them.
        others = ""
        if self.recognized is not None:
            others = "{} of {} rejected".format(*self.recognized)
            if self.is_unknown_shipped:
                others += " (of ImageNet; --unknown FOLDER measures your own)"
        elif self.new_class is not None:
            others = "not measured (give --unknown FOLDER)"
        if others:
            rows.append(("photos of other things", others))

        # A new class like the known ones: how images of a known class fare if it is left out.
        if self.new_class is not None and self.new_class_share is not None:
            rejected, count = self.new_class
            low, high = self.new_class_share
            if high - low <= MAX_WIDTH:
                share = f"{100 * rejected / max(1, count):.0f} % rejected"
                interval = f"95 % interval {100 * low:.0f} to {100 * high:.0f} %"
                rows.append(
                    (
                        "a new class of this kind",
                        f"{share} ({interval}; each class left out once)",
                    )
                )
        return rows


class Reference(StrictModel):
    """Distribution of the predictions for the images of `Calibration`, which bundles of before 0.2 have.

    Attributes:
        classes: For each class, the number of images for which it is the most probable one.
        confidences: Number of images by their largest probability, in intervals between `CONFIDENCE_BOUNDS`.
    """

    classes: Annotated[tuple[Occurrences, ...], pydantic.Field(max_length=MAX_CLASSES)]
    confidences: Annotated[
        tuple[Occurrences, ...],
        pydantic.Field(
            min_length=len(CONFIDENCE_BOUNDS) + 1, max_length=len(CONFIDENCE_BOUNDS) + 1
        ),
    ]


class Answer(NamedTuple):
    """What `Decision` says about one image; `http_api.name_classes` names its classes.

    Attributes:
        ranked: Index and probability of the listed classes, the most probable one first.
        known: Whether the image shows one of the classes; `None` without a `Rejection`.
        score: What `Rejection.threshold` is compared with; `None` without a `Rejection`.
        explanation: For each part of the image, row by row, the probability that the first listed class loses
            without it; `None` if it was not requested, or no class is listed.
    """

    ranked: tuple[tuple[int, float], ...]
    known: bool | None = None
    score: float | None = None
    explanation: tuple[tuple[float, ...], ...] | None = None


class Decision(StrictModel):
    """Rules that turn logits into classes.

    Attributes:
        activation: "softmax" for one class per image, "sigmoid" for any number of classes.
        calibration: How the temperature was fitted; `None` if it was not.
        rejection: How images of unknown classes are recognized; `None` accepts every image.
        thresholds: Smallest probability at which a class is present, one per class; only with "sigmoid".
        reference: Of bundles of before 0.2; nothing reads it.
        divides_logits: Whether the logits must still be divided by the temperature. False if the classifier of
            the bundle was divided, and in checkpoints (`for_trained_logits`).
    """

    activation: Activation = "softmax"
    calibration: Calibration | None = None
    rejection: Rejection | None = None
    thresholds: (
        Annotated[tuple[Fraction, ...], pydantic.Field(max_length=MAX_CLASSES)] | None
    ) = None
    reference: Reference | None = None
    divides_logits: Annotated[bool, pydantic.Field(exclude_if=lambda divides: not divides)] = (
        False
    )

    @pydantic.model_validator(mode="after")
    def _check_activation(self) -> "Decision":
        if (self.thresholds is not None) != self.is_multi_label:
            raise ValueError(
                "thresholds: required with activation sigmoid, not allowed with softmax"
            )
        if self.is_multi_label and (self.rejection or self.reference):
            raise ValueError("rejection, reference: not supported with activation sigmoid")
        if self.divides_logits and self.calibration is None:
            raise ValueError("divides_logits: requires a calibration")
        return self

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.activation == "sigmoid"

    @property
    def temperature(self) -> float:
        """Divisor of the network's logits; 1 if none was fitted."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def divisor(self) -> float:
        """What the logits of the network must still be divided by."""
        return self.temperature if self.divides_logits else 1.0

    def for_trained_logits(self) -> "Decision":
        """Return this decision for the logits of the trained network, which it divides by the temperature."""
        return self.model_copy(update={"divides_logits": self.temperature != 1})

    def calibrate(self, logits: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return calibrated logits (..., C) for the *logits* (..., C) of the network that this decision is for."""
        if not self.divides_logits:
            return logits
        return logits.astype(np.float64) / self.temperature

    def problem_with(self, classes: int) -> str | None:
        """Describe a field whose length is not the number of *classes*; None if all lengths match."""
        if self.thresholds is not None and len(self.thresholds) != classes:
            return f"{len(self.thresholds)} thresholds for {classes} classes"
        if self.reference is not None and len(self.reference.classes) != classes:
            return (
                f"reference predictions of {len(self.reference.classes)} classes, not {classes}"
            )
        return None

    def answer(
        self,
        logits: NDArray[np.floating],
        top_k: int | None = None,
        threshold: float | None = None,
        occluded: NDArray[np.floating] | None = None,
    ) -> Answer:
        """Answer for one image with *logits* (C,) that `have_answers`.

        Lists at most *top_k* classes, by default all; with "sigmoid", only those whose
        probability reaches *threshold*, by default their own. Ties keep the order of the
        classes. `explanation` is computed from *occluded*, the logits (n * n, C) of the copies
        by `images.occlusion.occlude`.
        """
        activate = sigmoid if self.is_multi_label else softmax
        logits = self.calibrate(logits)
        probabilities = activate(logits)

        if self.thresholds is None:
            indices = most_probable(logits, top_k)
        else:
            thresholds = self.thresholds if threshold is None else [threshold] * len(logits)
            reached = [
                index
                for index in most_probable(logits)
                if probabilities[index] >= thresholds[index]
            ]
            indices = reached[:top_k]
        ranked = tuple((index, float(probabilities[index])) for index in indices)

        # The probability of the first class that each occluded cell takes away, as (n, n).
        explanation = None
        if occluded is not None and ranked:
            first_class, probability = ranked[0]
            n = math.isqrt(len(occluded))
            of_copies = activate(self.calibrate(occluded))[:, first_class]
            losses = (probability - of_copies).reshape(n, n)
            explanation = tuple(tuple(row) for row in losses.tolist())

        if self.rejection is None:
            return Answer(ranked, explanation=explanation)
        score = float(log_sum_exp(logits))
        is_known = score >= self.rejection.threshold
        return Answer(ranked, is_known, score, explanation)

    def rows(self, labels: Sequence[str] = ()) -> list[tuple[str, str]]:
        """Describe calibration, rejection and thresholds in (name, text) rows.

        With at most 20 *labels*, the row of the thresholds lists the one of each label. With more or
        none, it tells only their range.
        """
        rows = []
        if self.calibration is not None:
            rows.append(self.calibration.row())
        if self.rejection is not None:
            rows += self.rejection.rows()

        # The threshold of each class, for images of several classes.
        if self.thresholds is not None:
            listed = f"{min(self.thresholds):.3f} to {max(self.thresholds):.3f}, one per class"
            if 0 < len(labels) <= _MAX_LISTED:
                pairs = zip(labels, self.thresholds, strict=True)
                listed = ", ".join(f"{label} {threshold:.3f}" for label, threshold in pairs)
            rows.append(("thresholds", listed))
        return rows


def have_answers(logits: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Mark the rows (N,) of *logits* (N, C) that have an answer: not NaN, not infinity, not minus infinity alone.

    A class whose logit is minus infinity has probability 0, as networks mask classes.
    """
    return np.asarray(np.isfinite(logits.max(axis=1)), dtype=np.bool_)


def most_probable(logits: NDArray[np.floating], count: int | None = None) -> list[int]:
    """List the indices of the *count* largest *logits* (C,), by default of all, the largest one first.

    Ties keep the order of the classes.
    """
    # Sort only what can be listed: a thousand classes take longer to sort than to compare.
    candidates = np.arange(len(logits))
    if count is not None and count < len(logits):
        smallest_listed = np.partition(logits, -count)[-count]
        candidates = np.flatnonzero(logits >= smallest_listed)

    order = np.argsort(-logits[candidates], kind="stable")[:count]
    indices: list[int] = candidates[order].tolist()
    return indices


def log_sum_exp(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute the log-sum-exp (...) float64 of *logits* (..., C), without overflow.

    It is the negative free energy of "Energy-based Out-of-distribution Detection" (Liu et al.,
    2020), Eq. 4.
    """
    values = logits.astype(np.float64)
    largest = values.max(axis=-1)
    sums: NDArray[np.float64] = largest + np.log(
        np.exp(values - largest[..., None]).sum(axis=-1)
    )
    return sums


def sigmoid(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute sigmoid probabilities in float64, with the shape of *logits*, without overflow."""
    values = logits.astype(np.float64)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute the probabilities of *logits* (..., C) that `have_answers`, in float64 and without overflow."""
    exponentials = logits.astype(np.float64)
    exponentials -= exponentials.max(axis=-1, keepdims=True)
    np.exp(exponentials, out=exponentials)
    exponentials /= exponentials.sum(axis=-1, keepdims=True)
    return exponentials
