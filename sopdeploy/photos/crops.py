"""Whether two photographs show one, by aligning small gray images and correlating their tiles.

Vectors tell which photographs are similar; only pixels tell whether one is a copy, or a part,
of the other. Normalized cross-correlation at several sizes and all positions finds where an
image correlates most with another one (`_search`). Robust Gauss-Newton steps then fit an affine
map (`_align`; Baker and Matthews, "Lucas-Kanade 20 Years On", 2004). Where it was fitted,
nearly every tile of a copy equals the photograph, but for those that a caption or a watermark
covers; in a similar photograph, nearly every tile differs a little.

Letters: N images, P pairs (an image, and another one that may be a part of it), S and T pixels
of a side, K samples of an image.
"""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# Of 1,800 photographs of ten kinds, no two different ones have more than half of their tiles
# equal; those of hand signs and solar cells, before one camera, up to 0.7 and 0.9
# (docs/benchmarks/copied_photos.md).
# Correlation of equal tiles, and the share of the tiles of a copy that are equal
SAME = 0.95
MOSTLY = 0.6
# tiles per side, and those that must show something
TILES = 8
MIN_TILES = 6
# Standard deviation of the gray levels of a tile, or of an image, that shows nothing
PLAIN = 2.0
# Pixels of a side that are compared, and standard deviation of the removed frequencies
SIDE = 32
BLUR = 1.25
SIZES = np.arange(0.6, 1.01, 0.05)  # shares of a side of the image that a part may show
# pixels by which a part may exceed the image, as the middle of a crop of a wide photograph does
MARGIN = 4
MIN_FOUND = 0.4  # correlation below which a place is not aligned
# Share of the correlation in the better way from which on both ways are aligned
OTHER_WAY = 0.9
# Gauss-Newton steps, and the largest change of an affine map by one of them
STEPS = 8
MAX_STEP = 0.15
# of the first image that the second one may show
MIN_AREA = 0.3
MAX_AREA = 1.3
OUTLIER = 1.5  # standard deviations of a difference that counts half
_BLOCK = 1024  # pairs that are compared at once

_Images = NDArray[np.float32]


def compare_pixels(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the share (P,) of equal tiles of each of the *pairs* (2, P), by *small* images (N, S, S).

    Each image of a pair may show a part of the other one.
    """
    # Search in both ways, in blocks of pairs with the same first image.
    num_pairs = pairs.shape[1]
    both_ways = np.concatenate([pairs, pairs[::-1]], axis=1)
    order = np.argsort(both_ways[0], kind="stable")
    correlations = np.empty(2 * num_pairs, np.float32)
    boxes = np.empty((2 * num_pairs, 4))
    for start in range(0, 2 * num_pairs, _BLOCK):
        block = order[start : start + _BLOCK]
        correlations[block], boxes[block] = _search(small, both_ways[:, block])

    # Equal frames correlate equally in both ways; a part correlates less with what contains it.
    best = np.tile(np.maximum(correlations[:num_pairs], correlations[num_pairs:]), 2)
    found = np.flatnonzero((correlations >= MIN_FOUND) & (correlations >= OTHER_WAY * best))

    # Align those that correlate well; of both ways, the better one counts.
    shares = np.zeros(2 * num_pairs, np.float32)
    for start in range(0, len(found), _BLOCK):
        block = found[start : start + _BLOCK]
        shares[block] = _align(small, both_ways[:, block], boxes[block])
    return np.maximum(shares[:num_pairs], shares[num_pairs:])


def _search(
    small: NDArray[np.uint8], pairs: NDArray[np.intp]
) -> tuple[_Images, NDArray[np.float64]]:
    """Find correlations (P,) and boxes (P, 4) of the second images of *pairs*, sorted, in the first ones."""
    side = small.shape[1]
    num_pairs = pairs.shape[1]
    images, position = np.unique(pairs, return_inverse=True)

    first, second = position.reshape(2, -1)  # positions among the images of these pairs
    whole = np.tile([0.0, 0.0, side, side], (len(images), 1))
    margins = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))
    scenes = np.pad(_remove_low(_resample(small[images], whole, SIDE)), margins)

    # The best correlation of each pair so far, and where it is.
    best = np.full(num_pairs, -1.0, np.float32)
    boxes = np.tile(whole[0], (num_pairs, 1))

    # Where the pairs of each first image begin
    starts = np.flatnonzero(np.diff(first, prepend=-1))

    for size in (SIDE * SIZES).round().astype(int).tolist():
        crops = _normalize(_resample(small[images], whole, size)).reshape(len(images), -1)

        num_places = SIDE + 2 * MARGIN - size + 1  # per side
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), num_pairs], strict=True):
            # The first image of these pairs, compared at all places at once
            scene = scenes[first[start]]
            windows = sliding_window_view(scene, (size, size)).reshape(-1, size * size)
            windows = windows - windows.mean(axis=1, keepdims=True)
            lengths = np.maximum(np.linalg.norm(windows, axis=1), 1e-3)

            correlations = (windows @ crops[second[start:stop]].T) / lengths[:, None]
            place = correlations.argmax(axis=0)
            reached = correlations.max(axis=0)

            # Note the place where the correlation is larger than at other sizes.
            is_better = reached > best[start:stop]
            best[start:stop][is_better] = reached[is_better]
            top, left = np.divmod(place[is_better], num_places)
            extent = np.full(len(top), size)
            boxes[start:stop][is_better] = np.stack(
                [top - MARGIN, left - MARGIN, extent, extent], axis=1
            ) * (side / SIDE)
    return best, boxes


def _align(
    small: NDArray[np.uint8], pairs: NDArray[np.intp], boxes: NDArray[np.float64]
) -> _Images:
    """Fit affine maps from the second images of *pairs* to *boxes* (P, 4); return shares of equal tiles.

    The maps change inversely: how the second image changes with a map of itself is computed
    once.
    """
    side = small.shape[1]
    num_pairs = pairs.shape[1]
    images, position = np.unique(pairs, return_inverse=True)
    first, second = position.reshape(2, -1)

    # The second images, and how they change by the six numbers of a map.
    whole = np.tile([0.0, 0.0, side, side], (len(images), 1))
    expected_PTT = _resample(small[images], whole, SIDE)[second]
    grid = (np.arange(SIDE, dtype=np.float32) + 0.5) * 2 / SIDE - 1
    points_K2 = np.stack([np.repeat(grid, SIDE), np.tile(grid, SIDE)], axis=1)  # row and column
    down_PTT, right_PTT = np.gradient(expected_PTT, 2 / SIDE, axis=(1, 2))
    slopes_P2K = np.stack([down_PTT, right_PTT], axis=1).reshape(num_pairs, 2, -1)
    # Per row and column: by the four numbers of the matrix, and by the two of the shift.
    of_matrix = slopes_P2K[:, :, None] * points_K2.T
    slopes_P6K = np.concatenate([of_matrix.reshape(num_pairs, 4, -1), slopes_P2K], axis=1)
    expected_PK = expected_PTT.reshape(num_pairs, -1)

    damping = 1e-3 * len(points_K2) * np.eye(6, dtype=np.float32)

    # From `points_K2` to pixels of the first image
    matrices = np.zeros((num_pairs, 2, 2), np.float32)
    matrices[:, [0, 1], [0, 1]] = boxes[:, 2:] / 2
    centers = (boxes[:, :2] + boxes[:, 2:] / 2 - 0.5).astype(np.float32)
    scenes = _smooth(small[images])

    # Each step fits what the first image shows to the second one, whatever the contrast and the
    # brightness. Pixels that differ much, as those of a caption, count less.
    weights_PK = np.ones_like(expected_PK)
    for step in range(STEPS + 1):
        shown_PK, is_inside_PK = _sample(
            scenes, first, points_K2 @ matrices.transpose(0, 2, 1) + centers[:, None]
        )
        if step == STEPS:
            break
        weights_PK *= is_inside_PK

        total = np.maximum(weights_PK.sum(axis=1, keepdims=True), 1e-6)
        shown_PK -= (weights_PK * shown_PK).sum(axis=1, keepdims=True) / total
        wanted_PK = expected_PK - (weights_PK * expected_PK).sum(axis=1, keepdims=True) / total
        products = (weights_PK * shown_PK * wanted_PK).sum(axis=1, keepdims=True)
        contrast = products / ((weights_PK * shown_PK**2).sum(axis=1, keepdims=True) + 1e-3)

        errors_PK = contrast.clip(0.2, 5.0) * shown_PK - wanted_PK
        deviation = (
            1.4826 * np.median(np.abs(errors_PK) * is_inside_PK, axis=1, keepdims=True) + 1
        )
        weights_PK = is_inside_PK / (1 + (errors_PK / (OUTLIER * deviation)) ** 2)

        # The step, from the normal equations.
        weighted_P6K = slopes_P6K * weights_PK[:, None]
        curvatures = weighted_P6K @ slopes_P6K.transpose(0, 2, 1) + damping
        moves = np.linalg.solve(curvatures, weighted_P6K @ errors_PK[:, :, None]).clip(
            -MAX_STEP, MAX_STEP
        )
        matrices = matrices @ np.linalg.inv(np.eye(2) + moves[:, :4].reshape(-1, 2, 2)).astype(
            np.float32
        )
        centers = centers - (matrices @ moves[:, 4:])[:, :, 0]

    # Only a part of a possible size counts.
    area = np.linalg.det(matrices) * 4 / side**2  # of the part, as a share of the first image
    return np.where(
        (area > MIN_AREA) & (area < MAX_AREA),
        _share_equal(shown_PK, expected_PK, is_inside_PK),
        0,
    )


def _share_equal(
    shown_PK: _Images, expected_PK: _Images, is_inside_PK: NDArray[np.bool_]
) -> _Images:
    """Return the share (P,) of the tiles that are equal, among those that show something."""

    def cut(samples_PK: NDArray[Any]) -> NDArray[Any]:
        tiles = samples_PK.reshape(len(samples_PK), TILES, SIDE // TILES, TILES, SIDE // TILES)
        return tiles.transpose(0, 1, 3, 2, 4).reshape(len(samples_PK), TILES**2, -1)

    shown = cut(shown_PK)
    expected = cut(expected_PK)
    shown = shown - shown.mean(axis=2, keepdims=True)
    expected = expected - expected.mean(axis=2, keepdims=True)
    contrasts = [np.sqrt((part**2).mean(axis=2)) for part in (shown, expected)]
    correlations = (shown * expected).mean(axis=2) / np.maximum(
        contrasts[0] * contrasts[1], 1e-3
    )
    counts = cut(is_inside_PK).all(axis=2) & (np.maximum(*contrasts) >= PLAIN)
    num_counted = counts.sum(axis=1)
    num_equal = ((correlations >= SAME) & counts).sum(axis=1)
    return np.where(num_counted >= MIN_TILES, num_equal / np.maximum(num_counted, 1), 0)


def _smooth(images: NDArray[np.uint8]) -> _Images:
    """Average each pixel of *images* (N, S, S) with its neighbors, as samples two pixels apart need."""
    side = images.shape[1]
    shifted = [np.eye(side, k=shift, dtype=np.float32) for shift in (-1, 0, 0, 1)]
    filters = np.sum(shifted, axis=0)
    filters /= filters.sum(axis=1, keepdims=True)
    return filters @ images.astype(np.float32) @ filters.T


def _sample(
    images: _Images, chosen: NDArray[np.intp], points: NDArray[Any]
) -> tuple[_Images, NDArray[np.bool_]]:
    """Interpolate *images* (N, S, S) at *points* (P, K, 2) of the *chosen* (P,); tell which are inside."""
    side = images.shape[1]
    is_inside = ((points > -0.5) & (points < side - 0.5)).all(axis=2)
    points = points.clip(0, side - 1.001)
    # The first row and column of the four pixels around each point.
    lower = points.astype(np.intp)
    index = lower[:, :, 0] * side + lower[:, :, 1] + chosen[:, None] * side**2
    down, right = np.moveaxis(points - lower.astype(np.float32), 2, 0)
    pixels = images.reshape(-1)
    top = pixels[index] * (1 - right) + pixels[index + 1] * right
    bottom = pixels[index + side] * (1 - right) + pixels[index + side + 1] * right
    return top * (1 - down) + bottom * down, is_inside


def _resample(images: NDArray[np.uint8], boxes: NDArray[np.float64], side: int) -> _Images:
    """Resample the *boxes* (P, 4) of *images* (P, S, S) to squares of *side* pixels, (P, T, T)."""

    def weights(starts: NDArray[np.float64], extents: NDArray[np.float64]) -> _Images:
        """Return a linear filter (P, T, S) for the pixels of an axis, as wide as a pixel of the result."""
        step = (extents / side)[:, None]
        centers = starts[:, None] + step * (np.arange(side) + 0.5) - 0.5
        distances = np.abs(np.arange(images.shape[1]) - centers[:, :, None])
        filters = np.maximum(0.0, 1.0 - distances / np.maximum(1.0, step[:, :, None]))
        return (filters / np.maximum(filters.sum(axis=2, keepdims=True), 1e-6)).astype(
            np.float32
        )

    rows = weights(boxes[:, 0], boxes[:, 2])
    columns = weights(boxes[:, 1], boxes[:, 3])
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
