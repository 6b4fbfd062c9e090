"""Crops of photographs that look alike, found by aligning small gray images.

The cosine of a crop and its photograph is no larger than that of two similar objects. But a crop equals a
part of the photograph: the correlation of their pixels, without low frequencies, is nearly 1 where it was cut
out. Normalized cross-correlation at several sizes and all positions finds this place (`_search`), and
Gauss-Newton steps make it precise (`_align`; Lucas and Kanade, "An Iterative Image Registration Technique",
1981).

Letters: N images, P pairs (an image, and another one that may be a crop of it), S and T pixels of a side.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# Of the photographs of docs/benchmarks/copied_photos.md, 93 to 98 % of the crops to half of coins, hand signs
# and chess pieces reach it; of the pairs of coins of different kinds, the most similar one reaches 0.954.
CORRELATION = 0.97
SIDE, BLUR = 32, 1.25  # pixels of a side that are compared, and standard deviation of the removed frequencies
SIZES = np.arange(0.6, 1.01, 0.05)  # shares of a side of the image that a crop may show
MIN_FOUND = 0.5  # correlation below which a place is not aligned
ALIGNED = 4  # images with which an image is aligned, as it may be a crop of each
MOSTLY = 0.8  # share of these that seem to contain the images of a class whose background hides differences
STEPS, SHIFT, MAX_STEP = 6, 0.5, 2.0  # Gauss-Newton steps; pixels of differences, and of a step at most
_BLOCK = 2048  # pairs that are compared at once

_Images = NDArray[np.float32]


def find_crops(
    small: NDArray[np.uint8], pairs: NDArray[np.intp], classes: NDArray[np.int64]
) -> NDArray[np.intp]:
    """Select the *pairs* (2, P) whose second image shows a part of the first, by *small* ones (N, S, S).

    If nearly all images of one of the *classes* (N,) seem to be crops of several others, they show small
    objects before one background, and none of them is selected.
    """
    pairs = pairs[:, np.argsort(pairs[0], kind="stable")]
    num_pairs = pairs.shape[1]
    correlations, boxes = np.empty(num_pairs, np.float32), np.empty((num_pairs, 4))
    for start in range(0, num_pairs, _BLOCK):
        block = slice(start, start + _BLOCK)
        correlations[block], boxes[block] = _search(small, pairs[:, block])
    # Each second image is aligned with the `ALIGNED` images whose places correlate most with it.
    order = np.lexsort((-correlations, pairs[1]))  # by second image, the largest correlation first
    second = pairs[1][order]
    rank = np.arange(num_pairs) - np.searchsorted(second, second)  # among the pairs of this image
    best = order[(rank < ALIGNED) & (correlations[order] >= MIN_FOUND)]
    is_crop = np.zeros(len(best), np.bool_)
    for start in range(0, len(best), _BLOCK):
        block = slice(start, start + _BLOCK)
        first, second = pairs[:, best[block]]
        is_crop[block] = _align(small[first], small[second], boxes[best[block]]) >= CORRELATION
    crops = pairs[:, best[is_crop]]
    num_found = np.bincount(classes[crops[1]], minlength=classes.max() + 1)
    # Of a class before one background, nearly all images are found in all `ALIGNED` first images.
    has_background = num_found > MOSTLY * ALIGNED * np.bincount(classes)
    return crops[:, ~has_background[classes[crops]].any(axis=0)]


def _search(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> tuple[_Images, NDArray[np.float64]]:
    """Find where the second image of each of the *pairs*, sorted by the first, correlates most with it.

    Returns the correlations (P,), and the boxes (P, 4): top, left, height and width in pixels of *small*.
    """
    side, num_pairs = small.shape[1], pairs.shape[1]
    images, position = np.unique(pairs, return_inverse=True)
    first, second = position.reshape(2, -1)  # positions among the images of these pairs
    whole = np.tile([0.0, 0.0, side, side], (len(images), 1))
    scenes = _remove_low(_resample(small[images], whole, SIDE))
    best, boxes = np.full(num_pairs, -1.0, np.float32), np.tile(whole[0], (num_pairs, 1))
    starts = np.flatnonzero(np.diff(first, prepend=-1))  # where the pairs of each first image begin
    for size in (SIDE * SIZES).round().astype(int).tolist():
        crops = _normalize(_resample(small[images], whole, size)).reshape(len(images), -1)
        num_places = SIDE - size + 1  # per side
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), num_pairs], strict=True):
            scene = scenes[first[start]]  # the first image of these pairs, compared at all places at once
            windows = sliding_window_view(scene, (size, size)).reshape(-1, size * size)
            windows = windows - windows.mean(axis=1, keepdims=True)
            lengths = np.maximum(np.linalg.norm(windows, axis=1), 1e-3)
            correlations = (windows @ crops[second[start:stop]].T) / lengths[:, None]
            place = correlations.argmax(axis=0)
            reached = correlations.max(axis=0)
            is_better = reached > best[start:stop]
            best[start:stop][is_better] = reached[is_better]
            top, left = np.divmod(place[is_better], num_places)
            extent = np.full(len(top), size)
            boxes[start:stop][is_better] = np.stack([top, left, extent, extent], axis=1) * (side / SIDE)
    return best, boxes


def _align(scenes: NDArray[np.uint8], crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> _Images:
    """Fit *boxes* (P, 4) in *scenes* (P, S, S) to the *crops*; return the best correlations (P,)."""
    count, side = len(crops), crops.shape[1]
    whole = np.tile([0.0, 0.0, side, side], (count, 1))
    expected = _normalize(_resample(crops, whole, SIDE))
    # How a crop changes with the center, the height and the width of its box. The same changes of the scene
    # are expected where the box does not fit (Baker and Matthews, "Lucas-Kanade 20 Years On", 2004).
    directions = np.asarray([[1, 0, 0, 0], [0, 1, 0, 0], [-0.5, 0, 1, 0], [0, -0.5, 0, 1]], np.float64)
    moved = [_normalize(_resample(crops, whole + SHIFT * one, SIDE)) for one in directions]
    slopes = np.stack([(one - expected) / SHIFT for one in moved], axis=1).reshape(count, 4, SIDE * SIDE)
    curvatures = slopes @ slopes.transpose(0, 2, 1) + 1e-4 * np.eye(4, dtype=np.float32)
    best = np.full(count, -1.0, np.float32)
    for _ in range(STEPS):
        shown = _normalize(_resample(scenes, boxes, SIDE))
        best = np.maximum(best, (shown * expected).sum(axis=(1, 2)))
        errors = (shown - expected).reshape(count, SIDE * SIDE, 1)
        moves = np.linalg.solve(curvatures, slopes @ errors)[:, :, 0].clip(-MAX_STEP, MAX_STEP)
        boxes = boxes - moves @ directions * (boxes[:, [2, 3, 2, 3]] / side)
        boxes[:, 2:] = boxes[:, 2:].clip(side / 2, side)
    return best


def _resample(images: NDArray[np.uint8], boxes: NDArray[np.float64], side: int) -> _Images:
    """Resample the *boxes* (P, 4) of *images* (P, S, S) to squares of *side* pixels, (P, T, T)."""

    def weights(starts: NDArray[np.float64], extents: NDArray[np.float64]) -> _Images:
        """Return a linear filter (P, T, S) for the pixels of an axis, as wide as a pixel of the result."""
        step = (extents / side)[:, None]
        centers = starts[:, None] + step * (np.arange(side) + 0.5) - 0.5
        distances = np.abs(np.arange(images.shape[1]) - centers[:, :, None])
        filters = np.maximum(0.0, 1.0 - distances / np.maximum(1.0, step[:, :, None]))
        return (filters / np.maximum(filters.sum(axis=2, keepdims=True), 1e-6)).astype(np.float32)

    rows, columns = weights(boxes[:, 0], boxes[:, 2]), weights(boxes[:, 1], boxes[:, 3])
    return rows @ images.astype(np.float32) @ columns.transpose(0, 2, 1)


def _remove_low(images: _Images) -> _Images:
    """Subtract the *images* (P, T, T) blurred by a Gaussian: smooth shades are alike in many photographs."""
    pixels = np.arange(images.shape[1])
    blur = np.exp(-0.5 * ((pixels[:, None] - pixels) / BLUR) ** 2)
    blur = (blur / blur.sum(axis=1, keepdims=True)).astype(np.float32)
    return images - blur @ images @ blur.T


def _normalize(images: _Images) -> _Images:
    """Remove the low frequencies of *images* (P, T, T) and their means, and scale them to norm 1."""
    images = _remove_low(images)
    images = images - images.mean(axis=(1, 2), keepdims=True)
    return images / np.maximum(np.linalg.norm(images, axis=(1, 2), keepdims=True), 1e-3)
