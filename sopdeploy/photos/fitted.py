"""The pixels of images that are fitted to the network, kept in memory from their first use on."""

import copy
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Pixels, Preprocess

if TYPE_CHECKING:
    from sopdeploy.photos.photo import LabeledImages

MAX_IN_MEMORY = 2**29  # bytes of the pixels of a data set: 174,000 images of 32 x 32, or 3,500 of 224 x 224


class FittedPixels:
    """The pixels (N, crop, crop, 3) of *images* by *rules*; not kept if they exceed `MAX_IN_MEMORY`.

    The memory is anonymous and shared: forked loader processes fill and read the same pages, without the
    small /dev/shm of containers. A process that is started in another way begins with empty pixels. Two
    processes may compute the same image at the same time; they write the same bytes.
    """

    def __init__(self, images: "LabeledImages", rules: Preprocess) -> None:
        self.images, self.rules = images, rules
        shape = (len(images), rules.crop, rules.crop, 3)
        self.is_kept = 0 < math.prod(shape) <= MAX_IN_MEMORY
        kept_shape = shape if self.is_kept else (0, 0, 0, 3)
        self.pixels, self.is_computed = shared_zeros(kept_shape), shared_zeros(kept_shape[:1])
        self.rows = np.arange(len(images))  # the row of `pixels` of each image

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the images without their pixels."""
        return type(self), (self.images, self.rules)

    def read(self, samples: Sequence[int]) -> Pixels:
        """Return the pixels (B, crop, crop, 3) of *samples*.

        They are computed and kept at their first use. Raises `DataError` for a damaged image.
        """
        if not self.is_kept:
            return np.stack([preprocess_image(self.images.decode(sample), self.rules) for sample in samples])
        rows = self.rows[np.asarray(samples)]
        missing = {samples[position] for position in np.flatnonzero(self.is_computed[rows] == 0).tolist()}
        for sample in sorted(missing):
            self.pixels[self.rows[sample]] = preprocess_image(self.images.decode(sample), self.rules)
        self.is_computed[rows] = 1  # after the pixels, which other processes read then
        pixels: Pixels = self.pixels[rows]
        return pixels

    def select(self, mask: NDArray[np.bool_]) -> Self:
        """Keep the images where *mask* (N,) is true; both objects share their pixels."""
        selected = copy.copy(self)
        selected.images, selected.rows = self.images.select(mask), self.rows[mask]
        return selected


def shared_zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Create an array of zeros that this process and those that it forks share; pages exist when used."""
    memory = mmap.mmap(-1, max(1, math.prod(shape)))
    return np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)
