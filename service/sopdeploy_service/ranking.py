"""The most probable classes of the images of one batch.

They are worked out for the whole batch when the first of its requests asks: what numpy does for one image
takes it nearly as long as for eight.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEW = 10  # classes that are looked for one by one, in all images at once; more need a sort of each alone

Ranked = list[tuple[int, float]]  # places of classes and their probabilities, best first


class Ranking:
    """Ranks the classes by *logits* (C,), one for each image; for one thread."""

    def __init__(self, logits: Sequence[NDArray[np.float32]]) -> None:
        self._logits = logits
        self._found: dict[int, list[Ranked]] = {}

    def best(self, image: int, count: int) -> Ranked:
        """Return the *count* most probable classes of *image*, equal ones in order; of C at most C."""
        if count > FEW:
            return ranked(best(self._logits[image], count)[None], self._logits[image][None])[0]
        if count not in self._found:
            logits = np.stack(self._logits)
            self._found[count] = ranked(largest(logits, count), logits)
        return self._found[count][image]


def ranked(places: NDArray[np.intp], logits: NDArray[np.float32]) -> list[Ranked]:
    """Return *places* (n, k) of classes with the probabilities that *logits* (n, C) give them."""
    probabilities = np.take_along_axis(softmax(logits), places, axis=1)
    return [list(zip(*row, strict=True)) for row in zip(places.tolist(), probabilities.tolist(), strict=True)]


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the places (n, count) of the *count* largest of each row of *values* (n, C), as `best`."""
    left, rows = values.copy(), np.arange(len(values))
    found = np.empty((len(values), min(count, values.shape[1])), np.intp)
    for column in found.T:
        column[:] = left.argmax(axis=1)
        left[rows, column] = -np.inf
    return found


def best(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the places of the *count* largest of finite *values* (C,), best first, equal ones in order.

    The rest is not sorted.
    """
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)  # more than *count* where several are equal to the least
    return places[np.argsort(-values[places], kind="stable")[:count]]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probabilities (..., C) float64 of finite *logits* (..., C), without overflow."""
    powers = logits.astype(np.float64)
    powers -= powers.max(axis=-1, keepdims=True)
    np.exp(powers, out=powers)
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers
