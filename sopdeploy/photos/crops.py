"""Whether two photographs show one, by aligning small gray images and correlating their tiles.

Vectors tell which photographs are similar; only pixels tell whether one is a copy, or a part,
of the other: also turned, mirrored, squashed or enlarged, as tools that augment photographs
write them. The middle of an image, under many such changes (`_list_changes`), is correlated with
all places of another one (`_search`). From the best ones, robust Gauss-Newton steps fit an
affine map (`_align`; Baker and Matthews, "Lucas-Kanade 20 Years On", 2004). Where it was fitted,
nearly every tile of a copy equals the photograph, but for those that a caption or a watermark
covers; in a similar photograph, nearly every tile differs a little.

Letters: N images, P pairs (an image, and another one that may be a part of it), S and T pixels
of a side, K samples of an image, C changes, L places.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# Correlation of equal tiles, and the share of the tiles of a copy that are equal. Of 2,520
# photographs of seven kinds, three pairs of different ones reach this share, objects on one cloth
# or table, with 0.61 at most; photographs of hand signs and solar cells, before one camera, can
# exceed it (docs/decisions.md).
SAME = 0.95
MOSTLY = 0.6
# Share of the equal tiles of a copy where other images are alike: in classes that look alike, and in
# frames that show something in few of their tiles, as objects cut out on white do. There, no tile
# may differ: resistors with other rings have 0.93 of their tiles equal, cartons of other milk 0.78.
NEARLY = 0.85
# Share of the tiles inside that show something, below which a frame is mostly plain
SHOWN = 0.6
DIFFERS = 0.8  # correlation below which a tile differs
TONE = 8.0  # standard deviation of the gray levels of the tiles of a background of one tone
WHOLE = 0.5  # of the first image that the second one shows, from which on both show as much
# tiles per side, and those that must show something
TILES = 8
MIN_TILES = 6
# Standard deviation of the gray levels of a tile, or of an image, that shows nothing
PLAIN = 2.0
SIDE = 32  # pixels of a side that are compared
# What is searched: pixels of a side of an image and of its middle, and pixels by which the middle
# may exceed the other image, as that of a crop of a wide photograph does
COARSE = 16
MIDDLE = 10
MARGIN = 2
BLUR = 1.5  # standard deviation of the removed frequencies, in pixels of `COARSE`
# Changes of the middle: turned by degrees, the part of the image that it shows, from smaller to
# larger, and height by width
TURNS = (-30, -15, 0, 15, 30)
ZOOMS = (0.8, 1.0, 1.2, 1.4, 1.65)
PROPORTIONS = (0.75, 1.0, 1.33)
MIN_FOUND = 0.3  # correlation or agreement below which a place is not aligned
# Share of the largest correlation of a pair from which on a start is aligned, and their number
OTHER_START = 0.5
MAX_STARTS = 6
MAX_FITS = 2  # rough ones, which are aligned exactly
# Gauss-Newton steps, and the largest change of an affine map by one of them
STEPS = 8
MAX_STEP = 0.15
# of the first image that the second one may show
MIN_AREA = 0.3
MAX_AREA = 1 / MIN_AREA
BLURS = 3  # of an image, which may show a third of the other one
OUTLIER = 1.5  # standard deviations of a difference that counts half
MEDIAN_TO_DEVIATION = 1.4826  # of normally distributed differences, by their median size
MAX_CONTRAST = 5.0  # of an image, relative to the other one
_BLOCK = 1024  # pairs that are compared at once

_Images = NDArray[np.float32]


def compare_pixels(small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the share (P,) of equal tiles of each of the *pairs* (2, P), by *small* images (N, S, S).

    Each image of a pair may show a part of the other one.
    """
    num_pairs = pairs.shape[1]
    both_ways = np.concatenate([pairs, pairs[::-1]], axis=1)

    # The best starts of each pair in each way; pairs of one image are searched together.
    order = np.argsort(both_ways[0], kind="stable")
    correlations = np.empty((2 * num_pairs, MAX_STARTS), np.float32)
    matrices = np.empty((2 * num_pairs, MAX_STARTS, 2, 2), np.float32)
    centers = np.empty((2 * num_pairs, MAX_STARTS, 2), np.float32)
    for start in range(0, 2 * num_pairs, _BLOCK):
        searched = order[start : start + _BLOCK]
        correlations[searched], matrices[searched], centers[searched] = _search(
            small, both_ways[:, searched]
        )

    # Equal frames correlate equally in both ways; a part correlates less with what contains it.
    is_start = _select_best(np.tile(np.arange(num_pairs), 2), correlations, MAX_STARTS)
    way, rank = np.nonzero(is_start)  # the column of each start in `both_ways`
    matrix = matrices[way, rank]
    center = centers[way, rank]

    # Align roughly first, and the best of these maps exactly.
    roughly = np.empty(len(way), np.float32)
    for start in range(0, len(way), _BLOCK):
        block = slice(start, start + _BLOCK)
        fit = _align(small, both_ways[:, way[block]], matrix[block], center[block], COARSE)
        matrix[block], center[block], roughly[block] = fit.matrices, fit.centers, fit.agreement
    chosen = _select_best(way % num_pairs, roughly[:, None], MAX_FITS)[:, 0]

    # The images as they are count as a start, too, in one way: a caption misleads rough fits, and
    # middles may differ.
    side = small.shape[1]
    as_it_is = np.tile(np.eye(2, dtype=np.float32) * (side / 2), (num_pairs, 1, 1))
    middle = np.full((num_pairs, 2), (side - 1) / 2, np.float32)
    way = np.concatenate([way[chosen], np.arange(num_pairs)])
    matrix = np.concatenate([matrix[chosen], as_it_is])
    center = np.concatenate([center[chosen], middle])

    # The share of a pair is the largest one of its exact fits.
    shares = np.zeros(num_pairs, np.float32)
    for start in range(0, len(way), _BLOCK):
        block = slice(start, start + _BLOCK)
        fit = _align(small, both_ways[:, way[block]], matrix[block], center[block], SIDE)
        np.maximum.at(shares, way[block] % num_pairs, _share_equal(fit, side))
    return shares


def are_mostly_plain(small: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell which *small* images (N, S, S) are mostly a background of one tone, as objects on white are."""
    width = small.shape[1] // TILES
    tiles = small.reshape(len(small), TILES, width, TILES, width)
    is_plain = tiles.std(axis=(2, 4)) < PLAIN
    levels = np.ma.masked_array(tiles.mean(axis=(2, 4)), ~is_plain)
    has_one_tone = levels.std(axis=(1, 2)).filled(np.inf) < TONE
    return has_one_tone & (is_plain.mean(axis=(1, 2)) > 1 - SHOWN)


def _select_best(
    pairs: NDArray[np.intp], correlations: _Images, num_kept: int
) -> NDArray[np.bool_]:
    """Select the *num_kept* largest *correlations* (M, R) of each pair; the result is (M, R).

    A row of correlations is of the pair with the number in *pairs* (M,); a pair may have several
    rows. None is below `MIN_FOUND`, or below the share `OTHER_START` of the largest one of its
    pair.
    """
    # All correlations by pair, the largest of each pair first.
    pair = np.repeat(pairs, correlations.shape[1])
    flat = correlations.reshape(-1)
    order = np.lexsort((-flat, pair))
    ordered = flat[order]

    # Where the pair of each one begins, and its rank in the pair.
    is_first = np.diff(pair[order], prepend=-1) != 0
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    rank = np.arange(len(flat)) - first

    lowest = np.maximum(MIN_FOUND, OTHER_START * ordered[first])
    is_best = np.empty(len(flat), np.bool_)
    is_best[order] = (rank < num_kept) & (ordered >= lowest)
    return is_best.reshape(correlations.shape)


def _list_changes() -> _Images:
    """List the matrices (C, 2, 2) that turn, zoom and squash the middle of an image, mirrored and not."""
    changes = []
    for mirror in (1, -1):
        for degrees in TURNS:
            cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
            turn = np.asarray([[cosine, -sine], [sine, cosine]])
            for zoom in ZOOMS:
                for proportion in PROPORTIONS:
                    squash = np.diag([proportion**-0.5, mirror * proportion**0.5])
                    changes.append(zoom * turn @ squash)
    return np.asarray(changes, np.float32)


def _search(
    small: NDArray[np.uint8], pairs: NDArray[np.intp]
) -> tuple[_Images, _Images, _Images]:
    """Find where the first images of *pairs* (2, P) show the middle of the second ones.

    Returns, for the `MAX_STARTS` changes of the middle (`_list_changes`) that correlate best, their
    correlations (P, `MAX_STARTS`), and the affine map that `_align` starts with: matrix (P,
    `MAX_STARTS`, 2, 2) and center (P, `MAX_STARTS`, 2).
    """
    side = small.shape[1]
    width = side // COARSE
    images, position = np.unique(pairs, return_inverse=True)
    first, second = position.reshape(2, -1)  # positions among the images of these pairs
    detailed = _remove_low(small[images].astype(np.float32), BLUR * width)
    smooth = _smooth(detailed, COARSE)

    # All places (N, L, K) in each image.
    coarse = _sample_whole(smooth, COARSE)
    padded = np.pad(coarse, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    windows = sliding_window_view(padded, (MIDDLE, MIDDLE), axis=(1, 2))
    num_places = windows.shape[1]  # per side
    places_NLK = _normalize(windows.reshape(len(images), num_places**2, MIDDLE**2))

    changes = _list_changes()
    middles_NCK = _sample_middles(smooth, changes)

    # For each change its best place; for each pair the best changes.
    correlations = np.empty((len(first), MAX_STARTS), np.float32)
    place = np.empty((len(first), MAX_STARTS), np.intp)
    change = np.empty((len(first), MAX_STARTS), np.intp)
    for pair, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        correlations_CL = middles_NCK[other] @ places_NLK[one].T
        best_C = correlations_CL.max(axis=1)
        change[pair] = np.argpartition(-best_C, MAX_STARTS)[:MAX_STARTS]
        correlations[pair] = best_C[change[pair]]
        place[pair] = correlations_CL[change[pair]].argmax(axis=1)

    # As maps of rows and columns of -1 to 1 to pixels of the first image.
    top_left = np.stack(np.divmod(place, num_places), axis=2) - MARGIN
    centers = (top_left + MIDDLE / 2) * width - 0.5
    return correlations, np.linalg.inv(changes)[change] * (side / 2), centers.astype(np.float32)


def _sample_middles(images: _Images, changes: _Images) -> _Images:
    """Sample the middle of each of *images* (N, S, S) under all *changes* (C, 2, 2), (N, C, K)."""
    side = images.shape[1]
    points_K2 = _grid(MIDDLE) * (MIDDLE * (side // COARSE) / 2)
    points = (points_K2 @ changes.transpose(0, 2, 1)).reshape(-1, 2) + (side - 1) / 2

    # One image after the other, because the points of all take much memory.
    middles = [
        _sample(images[[index]], np.zeros(1, np.intp), points[None])[0]
        for index in range(len(images))
    ]
    return _normalize(np.concatenate(middles).reshape(len(images), len(changes), -1))


class _Fit(NamedTuple):
    """Affine maps of P pairs: `matrices` (P, 2, 2) and `centers` (P, 2).

    With them, the first images `shown` (P, K) resemble the second ones `expected` (P, K) where
    they are `inside` (P, K). The `agreement` (P,) is their weighted correlation times the mean
    weight; outliers have small weights, and samples outside of the first image have none.
    """

    matrices: _Images
    centers: _Images
    shown: _Images
    expected: _Images
    inside: NDArray[np.bool_]
    agreement: _Images


def _align(
    small: NDArray[np.uint8],
    pairs: NDArray[np.intp],
    matrices: _Images,
    centers: _Images,
    num_samples: int,
) -> _Fit:
    """Fit affine maps from the second images of *pairs* (2, P) to the first, by *num_samples* per side.

    They start with *matrices* (P, 2, 2) and *centers* (P, 2), which map rows and columns of -1
    to 1 to pixels of the first image. The algorithm is inverse compositional: each step is a map
    of the second image to itself, so that the slopes of this image are computed only once.
    """
    side = small.shape[1]
    num_pairs = pairs.shape[1]
    images, position = np.unique(pairs, return_inverse=True)
    first, second = position.reshape(2, -1)

    # A part of an image, enlarged, is sharper than the image in the same place. So parts are
    # blurred more.
    plain = small[images].astype(np.float32)
    scenes = np.concatenate([_smooth(plain, num_samples, 1 + level) for level in range(BLURS)])
    area = np.abs(np.linalg.det(matrices)) * 4 / side**2
    first = first + len(images) * _blur_level(area)
    second = second + len(images) * _blur_level(1 / np.maximum(area, 1e-6))

    # The second images, and how they change by the six numbers of a map.
    points_K2 = _grid(num_samples)
    expected_PTT = _sample_whole(scenes, num_samples)[second]
    slopes_P6K = _slopes_by_map(expected_PTT)
    expected_PK = expected_PTT.reshape(num_pairs, -1)
    damping = 1e-3 * len(points_K2) * np.eye(6, dtype=np.float32)

    # Each step fits what the first image shows to the second one, whatever the contrast and the
    # brightness. Pixels that differ much, as those of a caption, count less. The last round only
    # measures the fit.
    weights_PK = np.ones_like(expected_PK)
    for step in range(STEPS + 1):
        shown_PK, is_inside_PK = _sample(
            scenes, first, points_K2 @ matrices.transpose(0, 2, 1) + centers[:, None]
        )

        # Both without their weighted means: brightness does not count.
        weights_PK *= is_inside_PK
        total = np.maximum(weights_PK.sum(axis=1, keepdims=True), 1e-6)
        shown_PK -= (weights_PK * shown_PK).sum(axis=1, keepdims=True) / total
        wanted_PK = expected_PK - (weights_PK * expected_PK).sum(axis=1, keepdims=True) / total
        products = (weights_PK * shown_PK * wanted_PK).sum(axis=1, keepdims=True)
        if step == STEPS:
            break

        # The differences at the best contrast. Their deviation is that of a normal distribution with
        # this median difference, plus a gray level.
        contrast = products / ((weights_PK * shown_PK**2).sum(axis=1, keepdims=True) + 1e-3)
        errors_PK = contrast.clip(1 / MAX_CONTRAST, MAX_CONTRAST) * shown_PK - wanted_PK
        median = np.median(np.abs(errors_PK) * is_inside_PK, axis=1, keepdims=True)
        deviation = MEDIAN_TO_DEVIATION * median + 1
        weights_PK = is_inside_PK / (1 + (errors_PK / (OUTLIER * deviation)) ** 2)

        # The step, from the normal equations.
        weighted_P6K = slopes_P6K * weights_PK[:, None]
        curvatures = weighted_P6K @ slopes_P6K.transpose(0, 2, 1) + damping
        gradients = weighted_P6K @ errors_PK[:, :, None]
        moves = np.linalg.solve(curvatures, gradients).clip(-MAX_STEP, MAX_STEP)  # (P, 6, 1)

        # The step is a map of the second image, so its inverse changes the map to the first one.
        second_maps = np.eye(2) + moves[:, :4].reshape(-1, 2, 2)
        matrices = matrices @ np.linalg.inv(second_maps).astype(np.float32)
        centers = centers - (matrices @ moves[:, 4:])[:, :, 0]

    # The weighted correlations. A fit of few samples proves little, so the mean weight counts, too.
    correlations = products[:, 0] / np.sqrt(
        (weights_PK * shown_PK**2).sum(axis=1) * (weights_PK * wanted_PK**2).sum(axis=1) + 1e-3
    )
    agreement = correlations * weights_PK.mean(axis=1)
    return _Fit(matrices, centers, shown_PK, expected_PK, is_inside_PK, agreement)


def _slopes_by_map(images: _Images) -> _Images:
    """Compute how *images* (P, T, T) change by the six numbers of an affine map of themselves, (P, 6, K).

    These are the four numbers of the matrix, by row, and the two of the shift.
    """
    count, num_samples, _ = images.shape
    down_PTT = np.gradient(images, 2 / num_samples, axis=1)
    right_PTT = np.gradient(images, 2 / num_samples, axis=2)
    by_shift_P2K = np.stack([down_PTT, right_PTT], axis=1).reshape(count, 2, -1)
    by_matrix = by_shift_P2K[:, :, None] * _grid(num_samples).T
    return np.concatenate([by_matrix.reshape(count, 4, -1), by_shift_P2K], axis=1)


def _share_equal(fit: _Fit, side: int) -> _Images:
    """Return the share (P,) of the tiles that are equal, among those that show something.

    It is 0 where the part is too small or too large for images of *side* pixels, and below `MOSTLY`
    for mostly plain frames that are not `NEARLY` equal.
    """

    def cut(samples_PK: NDArray[Any]) -> NDArray[Any]:
        tiles = samples_PK.reshape(len(samples_PK), TILES, SIDE // TILES, TILES, SIDE // TILES)
        return tiles.transpose(0, 1, 3, 2, 4).reshape(len(samples_PK), TILES**2, -1)

    shown = cut(fit.shown)
    expected = cut(fit.expected)
    levels = expected.mean(axis=2)
    shown = shown - shown.mean(axis=2, keepdims=True)
    expected = expected - expected.mean(axis=2, keepdims=True)
    contrast_shown = np.sqrt((shown**2).mean(axis=2))
    contrast_expected = np.sqrt((expected**2).mean(axis=2))
    contrasts = np.maximum(contrast_shown * contrast_expected, 1e-3)
    correlations = (shown * expected).mean(axis=2) / contrasts

    # Tiles count if all of their samples are inside, and one of the two shows something.
    shows_something = np.maximum(contrast_shown, contrast_expected) >= PLAIN
    is_inside = cut(fit.inside).all(axis=2)
    counts = is_inside & shows_something
    num_counted = counts.sum(axis=1)
    num_equal = ((correlations >= SAME) & counts).sum(axis=1)
    shares = num_equal / np.maximum(num_counted, 1)

    # The area of the part, as a share of the first image.
    area = np.abs(np.linalg.det(fit.matrices)) * 4 / side**2
    is_part = (area > MIN_AREA) & (area < MAX_AREA) & (num_counted >= MIN_TILES)

    # Objects of one shape on white have equal outlines, and many tiles show nothing else. Their
    # share counts as that of similar images. A small part may differ because it is sharper.
    is_whole = (area > WHOLE) & (area < 1 / WHOLE)
    has_one_tone = np.ma.masked_array(levels, ~is_inside | counts).std(axis=1).filled(0) < TONE
    is_plain = is_whole & has_one_tone & (num_counted < SHOWN * is_inside.sum(axis=1))
    has_difference = ((correlations < DIFFERS) & counts).any(axis=1)
    is_similar = is_plain & ((shares < NEARLY) | has_difference)
    shares = np.where(is_similar, shares * MOSTLY, shares)
    return np.where(is_part, shares, 0)


def _blur_level(area: _Images) -> NDArray[np.intp]:
    """Return how much more (P,) to blur images whose partners show *area* (P,) times as much, 0 to 2."""
    return (area - 1).round().clip(0, BLURS - 1).astype(np.intp)


def _smooth(images: _Images, num_samples: int, times: int = 1) -> _Images:
    """Average each pixel of *images* (N, S, S) with its neighbors, *times* as *num_samples* per side need."""
    side = images.shape[1]
    shifted = [np.eye(side, k=shift, dtype=np.float32) for shift in (-1, 0, 0, 1)]
    weights = np.sum(shifted, axis=0)
    weights /= weights.sum(axis=1, keepdims=True)
    # The variances of repeated filters add up. What is needed grows with the square of the
    # distance of samples.
    weights = np.linalg.matrix_power(weights, times * (side // num_samples) ** 2 // 4)
    return weights @ images @ weights.T


def _sample(
    images: _Images, chosen: NDArray[np.intp], points: NDArray[Any]
) -> tuple[_Images, NDArray[np.bool_]]:
    """Interpolate *images* (N, S, S) at *points* (P, K, 2), K in each image of the indices *chosen* (P,).

    Also tells which points (P, K) are inside of their image.
    """
    side = images.shape[1]
    is_inside = ((points > -0.5) & (points < side - 0.5)).all(axis=2)
    points = points.clip(0, side - 1.001)  # so that there is a next row and column
    # The first row and column of the four pixels around each point.
    lower = points.astype(np.intp)
    index = lower[:, :, 0] * side + lower[:, :, 1] + chosen[:, None] * side**2
    down, right = np.moveaxis(points - lower.astype(np.float32), 2, 0)
    pixels = images.reshape(-1)
    top = pixels[index] * (1 - right) + pixels[index + 1] * right
    bottom = pixels[index + side] * (1 - right) + pixels[index + side + 1] * right
    return top * (1 - down) + bottom * down, is_inside


def _sample_whole(images: _Images, num_samples: int) -> _Images:
    """Sample *images* (N, S, S) as a whole, at *num_samples* points per side, (N, T, T)."""
    side = images.shape[1]
    points_K2 = _grid(num_samples) * (side / 2) + (side - 1) / 2
    points_NK2 = np.broadcast_to(points_K2, (len(images), *points_K2.shape))
    samples, _ = _sample(images, np.arange(len(images)), points_NK2)
    return samples.reshape(len(images), num_samples, num_samples)


def _remove_low(images: _Images, blur: float) -> _Images:
    """Subtract the *images* (N, S, S) blurred by a Gaussian: smooth shades are alike in many photographs."""
    pixels = np.arange(images.shape[1])
    weights = np.exp(-0.5 * ((pixels[:, None] - pixels) / blur) ** 2)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return images - weights @ images @ weights.T


def _normalize(rows: _Images) -> _Images:
    """Remove the means of *rows* (..., K), and scale them to norm 1."""
    rows = rows - rows.mean(axis=-1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-3)


def _grid(side: int) -> _Images:
    """List rows and columns of -1 to 1 of a square of *side* pixels, (side**2, 2)."""
    steps = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    return np.stack([np.repeat(steps, side), np.tile(steps, side)], axis=1)
