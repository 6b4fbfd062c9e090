"""How far two programs' pixels of a photo are apart, in levels of 255."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Programs round in each step, and their JPEG decoders differ: 0.3 and 1 were measured between Pillow, OpenCV
# and torch. Without antialiasing, or with another filter, a photo of this package differs by more.
MEAN_LIMIT = 1.0
HIGH_LIMIT = 4.0
_HIGH = 99  # percent of the values


class Difference(NamedTuple):
    """The mean and the largest difference of two photos, and the one that 99 % of their values stay below."""

    mean: float
    high: float
    largest: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        return self.mean <= MEAN_LIMIT and self.high <= HIGH_LIMIT


def measure(first: NDArray[np.float32], second: NDArray[np.float32]) -> Difference:
    """Compare two images (H, W, C) with values from 0 to 255.

    If one is moved by a pixel, the rest is compared: programs round half a pixel of the margin of a crop
    in different directions.
    """
    if first.shape != second.shape:
        return Difference(*[float("inf")] * 3)
    differences = []
    for one, other in _moved(first, second):
        absolute = np.abs(one - other)
        differences.append(
            Difference(
                mean=float(absolute.mean()),
                high=float(np.percentile(absolute, _HIGH)),
                largest=float(absolute.max()),
            )
        )
        if differences[-1].is_rounding:
            break
    return min(differences)


def _moved(
    first: NDArray[np.float32], second: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield the common parts of the images, as they are first, then moved by a pixel along one or two sides."""
    cuts = {0: slice(None), 1: slice(1, None), -1: slice(None, -1)}
    steps = sorted(
        ((x, y) for x in cuts for y in cuts), key=lambda step: abs(step[0]) + abs(step[1])
    )
    for x, y in steps:
        yield first[cuts[y], cuts[x]], second[cuts[-y], cuts[-x]]
