"""The sizes of logits: how much of a difference is rounding, class by class.

Networks mask classes by a large negative constant, such as -1e9, or by minus infinity. The rounding of such
a constant is larger than all other logits, so it must not be a limit for them.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

# Rounding of float32 explains a difference of 64 roundings of the largest logit.
OWN_ROUNDING = 64 * float(np.finfo(np.float32).eps)
# A class is masked if its logits are so many times larger than those of the classes that are predicted.
MASKED = 16
SMALLEST = float(np.finfo(np.float32).min)  # stands for minus infinity in JSON


class LogitRanges(NamedTuple):
    """What the logits of each class (C,) are over the images, infinities and NaN left out.

    `largest` is the largest absolute value, and `spread` the range. `is_ordinary` marks the classes that no large
    number masks. `rounding` is `OWN_ROUNDING` of the largest value: of all ordinary classes, or of a masked one.
    """

    largest: NDArray[np.float64]
    spread: NDArray[np.float64]
    is_ordinary: NDArray[np.bool_]
    rounding: NDArray[np.float64]

    @classmethod
    def of(cls, logits: NDArray[Any]) -> Self:
        """Measure *logits* (P, C).

        The logits of an ordinary class are at most `MASKED` times larger than those of the classes that have the
        largest logit of an image.
        """
        if not logits.size:
            nothing = np.zeros(logits.shape[1])
            return cls(nothing, nothing, nothing == 0, nothing)

        is_finite = np.isfinite(logits)
        largest = largest_values(logits)
        highest = np.where(is_finite, logits, -np.inf).max(axis=0)
        lowest = np.where(is_finite, logits, np.inf).min(axis=0)
        spread = np.maximum(highest - lowest, 0.0)

        predicted = np.where(is_finite, logits, -np.inf).argmax(axis=1)
        is_small = largest <= MASKED * largest[predicted].max()
        is_ordinary = is_finite.any(axis=0) & is_small

        largest_ordinary = largest[is_ordinary].max(initial=0.0)
        rounding = OWN_ROUNDING * np.where(is_ordinary, largest_ordinary, largest)
        return cls(largest, spread, is_ordinary, rounding)

    @property
    def masked_rounding(self) -> NDArray[np.float64]:
        """`rounding` of the classes that a large number masks, and 0 of the others."""
        return np.where(self.is_ordinary, 0.0, self.rounding)


def largest_values(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest absolute value (...) over P images of *values* (P, ...), without infinities and NaN."""
    finite = np.where(np.isfinite(values), np.abs(values), 0.0)
    return finite.max(axis=0, initial=0.0).astype(np.float64)


def absolute_errors(values: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Compute |*values* - *expected*|, of equal shapes; 0 where both are minus infinity, as of a masked class."""
    with np.errstate(invalid="ignore"):
        errors = np.abs(values.astype(np.float64) - expected)
    errors[np.isneginf(values) & np.isneginf(expected)] = 0.0
    return errors


def beyond_rounding(
    errors: NDArray[np.float64], masked_rounding: NDArray[np.float64], tolerance: float
) -> NDArray[np.float64]:
    """Return *errors* (P, C), smaller by what *masked_rounding* (C,) of a class exceeds *tolerance*."""
    return np.maximum(errors - np.maximum(masked_rounding - tolerance, 0.0), 0.0)
