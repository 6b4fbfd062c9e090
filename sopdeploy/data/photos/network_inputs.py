"""The arrays that networks see: images of one size, as uint8, some of them kept in memory.

Letters: N images, B images of a batch, C classes.
"""

import copy
import hashlib
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.images.preprocess import Pixels, Preprocess

# Bytes of the pixels of a data set: 174,000 images of 32 x 32, or 3,500 of 224 x 224
MAX_IN_MEMORY = 2**29


@dataclass(frozen=True, slots=True)
class Dataset(ABC):
    """Base class of network inputs: the `images` of a source, converted to uint8 arrays of one size."""

    images: LabeledImages

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Compute the pixels (B, H, W, 3) of the images at *indices*, and what else belongs to them."""


class FittedPixels:
    """The pixels (N, crop, crop, 3) of *images* by *rules*; not kept if they exceed `MAX_IN_MEMORY`.

    The memory is anonymous and shared: forked loader processes fill and read the same pages,
    without the small /dev/shm of containers. Two processes may compute the same image; they
    write the same bytes.
    """

    def __init__(self, images: LabeledImages, rules: Preprocess) -> None:
        self.images = images
        self.rules = rules
        shape = (len(images), rules.crop, rules.crop, 3)
        self.is_kept = 0 < math.prod(shape) <= MAX_IN_MEMORY
        kept_shape = shape if self.is_kept else (0, 0, 0, 3)
        self.pixels = shared_zeros(kept_shape)
        self.is_computed = shared_zeros(kept_shape[:1])
        self.rows = np.arange(len(images))  # the row of `pixels` of each image

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the images without their pixels."""
        return type(self), (self.images, self.rules)

    def read(self, samples: Sequence[int]) -> Pixels:
        """Return the pixels (B, crop, crop, 3) of the images at the indices *samples*.

        If pixels are kept, they are computed at their first use only. Raises `DataError` for a
        damaged image.
        """
        if not self.is_kept:
            return np.stack([self.images.preprocess(sample, self.rules) for sample in samples])
        rows = self.rows[np.asarray(samples)]
        is_computed = self.is_computed[rows].tolist()
        missing = {
            sample for sample, is_done in zip(samples, is_computed, strict=True) if not is_done
        }
        for sample in sorted(missing):
            self.pixels[self.rows[sample]] = self.images.preprocess(sample, self.rules)
        self.is_computed[rows] = 1  # after the pixels, which other processes read then
        pixels: Pixels = self.pixels[rows]
        return pixels

    def select(self, mask: NDArray[np.bool_]) -> Self:
        """Keep the images where *mask* (N,) is true; both objects share their pixels."""
        selected = copy.copy(self)
        selected.images = self.images.select(mask)
        selected.rows = self.rows[mask]
        return selected


def shared_zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Create an array of zeros for images, which the loader processes that are forked later share.

    Its memory exists page by page, when it is used.
    """
    memory = mmap.mmap(-1, max(1, math.prod(shape)))
    return np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)


@dataclass(frozen=True, slots=True)
class FittedDataset(Dataset):
    """Base class of inputs whose images are fitted to the network; index `sample + copy * N` is a copy.

    `fitted` are the fitted pixels, which stay in memory if they are few; None computes them anew.
    """

    fitted: FittedPixels | None = field(default=None, kw_only=True)

    @abstractmethod
    def pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Compute the pixels (B, H, W, 3) of the images at *indices*, which may be those of copies."""

    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Compute the pixels (B, H, W, 3) and the targets, (B,) int64 or (B, C), of images or copies."""
        targets = self.images.targets[np.asarray(indices) % len(self.images)]
        if not self.images.is_multi_label:
            targets = targets.astype(np.int64)
        return self.pixels(indices), targets

    def fit(self, indices: Sequence[int], rules: Preprocess) -> NDArray[np.uint8]:
        """Return images at *indices* fitted by *rules*, (B, crop, crop, 3), or the `fitted` ones."""
        if self.fitted is not None:
            return self.fitted.read(indices)
        return np.stack([self.images.preprocess(index, rules) for index in indices])

    def select(self, mask: NDArray[np.bool_]) -> Self:
        """Keep the images where *mask* (N,) is true."""
        fitted = None if self.fitted is None else self.fitted.select(mask)
        return replace(self, images=self.images.select(mask), fitted=fitted)


@dataclass(frozen=True, slots=True)
class PreprocessedDataset(FittedDataset):
    """Images preprocessed exactly as the service does, for evaluation.

    With `pad`, they are padded with that many black pixels and cropped at an offset that the
    pixels decide.
    """

    preprocess: Preprocess
    pad: int = 0

    def pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Compute the pixels (B, crop, crop, 3) at *indices*, shifted by `pad` at most."""
        arrays = self.fit(indices, self.preprocess)
        pad = self.pad
        if not pad:
            return arrays
        windows = []
        for array in arrays:  # the offset is the same in every epoch
            digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
            top, left = (
                int.from_bytes(half, "big") % (2 * pad + 1) for half in (digest[:8], digest[8:])
            )
            windows.append(Window(top, left))
        return crop_padded(arrays, pad, windows)


class Window(NamedTuple):
    """Where a padded image is cropped, in pixels, and whether the result is mirrored."""

    top: int
    left: int
    is_mirrored: bool = False


def crop_padded(
    arrays: NDArray[np.uint8], pad: int, windows: Sequence[Window]
) -> NDArray[np.uint8]:
    """Pad *arrays* (B, H, W, 3) with *pad* black pixels and crop each to (H, W) at its window.

    A window may mirror what it shows.
    """
    count, height, width, channels = arrays.shape
    padded = np.zeros((count, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = arrays
    cropped = np.empty_like(arrays)
    for array, result, (top, left, is_mirrored) in zip(padded, cropped, windows, strict=True):
        window = array[top : top + height, left : left + width]
        result[:] = window[:, ::-1] if is_mirrored else window
    return cropped
