"""Groups of images that show one photograph: copies, crops and frames of a burst.

Two images are copies if the cosine of their whitened vectors is large. The vectors of all images
are centered, their parts scaled to equal norms, and the principal components divided by the root
of their variance plus the mean variance. This removes what the images of a class have in common:
the cosine of two copies stays large, that of two similar objects becomes small. An image has
several views: the vector of the whole image, and those of parts of it, which find its crops.
Copies that are turned by quarters are found by small gray images in eight orientations
(`find_turned`). A group is a connected component.

Letters: N images, K images of a block, P pairs, V views, D components of a vector.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.data.photos.file_checks import UNREADABLE, map_threaded
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import DataError
from sopdeploy.images.metadata import NO_TIME

Groups = NDArray[np.int64]  # a number per image
_Parts = Sequence[NDArray[np.float32]]  # vectors (N, D_i) of N images, in one or several parts
COPY = 0.5  # whitened cosine of copies (`sopdeploy/training/README.md`)
# Share of a class that no group may reach, and the number of its images
ONE_GROUP = 0.9
MIN_ONE_GROUP = 8
_BLOCK = 1024  # images whose similarities are computed at once
_COSINES = 2**25  # similarities that are computed at once: 128 MiB
# Among more images, only equal files are found without features, and no turned ones
MAX_COMPARED = 20_000
NO_PAIRS = np.zeros((2, 0), np.intp)
NO_VECTORS = np.zeros((0, 0), np.float32)
SMALL = 64  # pixels of a side of the gray images that are kept of photographs
# pixels of a side, and cosine of equal images
TURNED_SIDE = 16
TURNED = 0.96
PLAIN = 2.0  # standard deviation of the gray levels of an image that shows nothing


class NearDuplicates(NamedTuple):
    """The `pairs` (2, P) of near-duplicates among N images, which images (N,) are `alike`, and `vectors`.

    Alike are the images of a class of which nearly all would be one group. The vectors are those of
    the whole images (N, D), whitened, of length 1.
    """

    pairs: NDArray[np.intp]
    alike: NDArray[np.bool_]
    vectors: NDArray[np.float32] = NO_VECTORS


def find_near_duplicates(
    views: Sequence[NDArray[np.float32]],
    small: NDArray[np.uint8],
    targets: NDArray[Any],
    hashes: Sequence[str],
    parts: NDArray[np.intp] | None = None,
) -> NearDuplicates:
    """Find the near-duplicates among N images with *targets*, (N,) or (N, C): pairs in any order.

    *views* has an array (N, V, D) for each part of the vectors: V views of an image, the whole
    one first. *small* are the gray images (N, S, S) of `shrink`. Of images with equal *hashes*
    (N,), only the first one is compared and is in pairs; `connect` adds the others by their hash.
    Among more than `MAX_COMPARED` images, turned copies are not found. With *parts* (N,), only
    pairs of two parts are compared.
    """
    # Of images with equal pixels, the first one stands for all. The result has the vectors of
    # all, and tells of all whether they are alike.
    first_N = np.sort(np.unique(hashes, return_index=True)[1])
    whole = [part[:, 0] for part in views]
    whiten = _fit_whitening([part[first_N] for part in whole])
    pairs = _find_similar([part[first_N] for part in views], whiten)
    if len(first_N) <= MAX_COMPARED:
        pairs = np.concatenate([pairs, find_turned(small[first_N])], axis=1)
    if parts is not None:
        parts_N = parts[first_N]
        pairs = pairs[:, parts_N[pairs[0]] != parts_N[pairs[1]]]

    # The images of a class of which nearly all would be one group look alike; none are copies.
    class_N = number_classes(targets)
    is_alike_N = _are_one_group(connect(len(first_N), pairs), class_N[first_N])
    pairs = pairs[:, ~is_alike_N[pairs].any(axis=0)]

    return NearDuplicates(
        first_N[pairs], np.isin(class_N, class_N[first_N[is_alike_N]]), whiten(whole)
    )


def number_classes(targets: NDArray[Any]) -> NDArray[np.int64]:
    """Number the classes (N,) of images with *targets* (N,) or (N, C); equal rows are one class."""
    return (
        np.unique(targets, axis=0, return_inverse=True)[1]
        .reshape(len(targets))
        .astype(np.int64)
    )


def _find_similar(
    views: Sequence[NDArray[np.float32]], whiten: Callable[[_Parts], NDArray[np.float32]]
) -> NDArray[np.intp]:
    """Pair the images (2, P) of which any view has the cosine `COPY` with the whole of the other one.

    *views* has an array (N, V, D) for each part of the vectors, which *whiten* whitens.
    """
    count, num_views = views[0].shape[:2]
    whole_ND = whiten([part[:, 0] for part in views])

    pairs = [NO_PAIRS]
    size = max(1, min(_BLOCK, _COSINES // count))
    for start in range(0, count, size):  # to save memory
        block = slice(start, start + size)
        for view in range(num_views):
            cosines_KN = whiten([part[block, view] for part in views]) @ whole_ND.T
            row, column = np.nonzero(cosines_KN >= COPY)
            pairs.append(np.sort(np.stack([row + start, column]), axis=0))

    # Each pair once, as one number, and no image with itself.
    one, other = np.concatenate(pairs, axis=1)
    numbers = np.unique(one[one < other] * count + other[one < other])
    return np.stack(np.divmod(numbers, count))


def _are_one_group(groups: Groups, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell of each image (N,) whether nearly all images of its class, *classes* (N,), are one group."""
    is_one_group_N = np.zeros(len(classes), np.bool_)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        if len(members) >= MIN_ONE_GROUP:
            largest = np.bincount(groups[members]).max()
            is_one_group_N[members] = largest >= ONE_GROUP * len(members)
    return is_one_group_N


def connect(count: int, pairs: NDArray[np.intp], *keys: Any) -> Groups:
    """Group *count* images: *pairs* (2, P) and images with equal values in one of *keys* (N,) are connected.

    A key may be None. Returns the group of each image (N,), numbered in the order of their
    first images.
    """
    edges = [pairs]  # (2, E) each: two connected images per column
    for key in keys:
        if key is not None:  # an edge from each image to the first one with its value
            _, first_of_value, value_N = np.unique(key, return_index=True, return_inverse=True)
            edges.append(np.stack([np.arange(count), first_of_value[value_N]]))

    # Label propagation: each image takes over the lowest index among its neighbors until no
    # index changes.
    one, other = np.concatenate(edges, axis=1)
    lowest_N = np.arange(count)
    has_changed = True
    while has_changed:
        before = lowest_N.copy()
        np.minimum.at(lowest_N, one, before[other])
        np.minimum.at(lowest_N, other, before[one])
        # Each image also takes over what the image with its lowest index has, so that long chains
        # need few rounds.
        lowest_N = lowest_N[lowest_N]
        has_changed = not np.array_equal(lowest_N, before)

    _, groups = np.unique(lowest_N, return_inverse=True)  # without gaps in the numbers
    return groups.astype(np.int64)


def _fit_whitening(parts: _Parts) -> Callable[[_Parts], NDArray[np.float32]]:
    """Fit a whitening to vectors in *parts*; returns the function that whitens any vectors to norm 1."""
    means = [part.mean(axis=0) for part in parts]
    squares = [
        np.square(part - mean).sum(axis=1).mean()
        for part, mean in zip(parts, means, strict=True)
    ]
    # If all vectors are equal, the norm would be 0.
    norms = [max(float(np.sqrt(square)), 1e-12) for square in squares]

    def center_and_join(others: _Parts) -> NDArray[np.float32]:
        scaled = [
            (part - mean) / norm for part, mean, norm in zip(others, means, norms, strict=True)
        ]
        return np.concatenate(scaled, axis=1)

    rows_ND = center_and_join(parts)

    # The components are the eigenvectors of rows.T @ rows (D, D). Its eigenvalues are N times
    # the variances; the norm in `apply` removes this factor. If N <= D, rows @ rows.T (N, N) is
    # decomposed: it has the same eigenvalues above 0, and for each of its eigenvectors v,
    # rows.T @ v / sqrt(eigenvalue) is a component.
    is_wide = rows_ND.shape[0] <= rows_ND.shape[1]
    product = rows_ND @ rows_ND.T if is_wide else rows_ND.T @ rows_ND
    eigenvalues, vectors = np.linalg.eigh(product.astype(np.float64))

    # Components without variance are rounding errors.
    damping = max(float(eigenvalues.mean()), 1e-12)  # the mean over min(N, D) components
    kept = eigenvalues > 1e-6 * damping
    eigenvalues = eigenvalues[kept]
    vectors = vectors[:, kept]
    # The components, one per column, have norm 1.
    components = rows_ND.T @ (vectors / np.sqrt(eigenvalues)) if is_wide else vectors
    projection = (components / np.sqrt(eigenvalues + damping)).astype(np.float32)

    def apply(others: _Parts) -> NDArray[np.float32]:
        whitened = center_and_join(others) @ projection
        length = np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-12)
        return (whitened / length).astype(np.float32)

    return apply


def fit_and_whiten(parts: _Parts) -> NDArray[np.float32]:
    """Whiten the vectors that are given in *parts*, by these vectors alone; returns rows of length 1."""
    return _fit_whitening(parts)(parts)


def shrink(image: Image.Image) -> NDArray[np.uint8]:
    """Compute the small gray image (`SMALL`, `SMALL`) of an RGB *image*."""
    return np.asarray(image.convert("L").resize((SMALL, SMALL), Image.Resampling.BOX))


def find_turned(small: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Find the pairs (2, P) of nearly equal images in any of eight orientations, by *small* ones (N, S, S).

    Their cosine is `TURNED` or more. Copies that are turned, smaller and re-encoded reach 0.97,
    different photographs up to 0.94. Images without contrast are in no pair.
    """
    # Each image in eight orientations, as rows without their mean.
    count = len(small)
    width = SMALL // TURNED_SIDE
    tiles = small.reshape(count, TURNED_SIDE, width, TURNED_SIDE, width)
    smaller = tiles.mean(axis=(2, 4), dtype=np.float32)
    sides = [smaller, smaller[:, :, ::-1]]  # also mirrored
    turned = [np.rot90(side, turns, axes=(1, 2)) for side in sides for turns in range(4)]
    rows = np.stack(turned, axis=1).reshape(count, 8, -1)
    rows -= rows.mean(axis=2, keepdims=True)
    lengths = np.linalg.norm(rows, axis=2, keepdims=True)
    # All images without contrast would equal each other. `PLAIN` is a standard deviation of
    # pixels, which is this length by the root of their number.
    is_plain_N = lengths[:, 0, 0] < PLAIN * smaller[0].size ** 0.5

    # Pairs of an upright image and any orientation of another one, by whitened rows.
    units = (rows / np.maximum(lengths, 1.0)).reshape(count * 8, -1)
    whitened = fit_and_whiten([units]).reshape(count, 8, -1)
    pairs = []
    size = max(1, _COSINES // (8 * count))
    for start in range(0, count, size):
        cosines = whitened[start : start + size, 0] @ whitened.reshape(count * 8, -1).T
        cosines = cosines.reshape(len(cosines), count, 8)
        row, column = np.nonzero(cosines.max(axis=2) >= TURNED)
        pairs.append(np.stack([row + start, column]))

    # Each pair is there in both orders, and each image with itself.
    pairs_2P = np.concatenate(pairs, axis=1)
    is_once_P = pairs_2P[0] < pairs_2P[1]
    return pairs_2P[:, is_once_P & ~is_plain_N[pairs_2P].any(axis=0)]


class Grouped(NamedTuple):
    """Groups (N,) of photographs, and what told them: hashes of files, times and vectors (N, D).

    If only equal files are grouped, there are no vectors, and times that were not read are
    `NO_TIME`. Features of a network leave no vectors, either.
    """

    groups: Groups
    file_hashes: NDArray[np.int64]
    times: NDArray[np.int64]
    vectors: NDArray[np.float32] = NO_VECTORS


class _Inspected(NamedTuple):
    """Hash and time of a file; if its pixels are compared, their hash and the small image."""

    file_hash: int = UNREADABLE
    taken: int = NO_TIME
    pixel_hash: str = ""
    small: NDArray[np.uint8] | None = None


def group_photographs(
    images: LabeledImages, features: NDArray[np.float32] | None = None
) -> Grouped:
    """Group *images* by their known groups and by near-duplicates; each image is read once.

    With *features* (N, D) of a network, near-duplicates are found by them (`find_near_duplicates`). Without,
    they are nearly equal (`find_turned`): re-encoded, of another size, or turned by quarters. If any
    image cannot be decoded, or there are more than `MAX_COMPARED`, only equal files are near-duplicates.
    """
    by_pixels = len(images) <= MAX_COMPARED

    def inspect(index: int) -> _Inspected:
        known = _Inspected()  # what is known if the next step raises an error
        with suppress(DataError):  # whoever uses the image names it
            photo = images.photo(index)
            known = _Inspected(photo.file_hash)
            if by_pixels:
                known = _Inspected(
                    photo.file_hash, photo.taken, photo.pixel_hash, shrink(photo.pixels)
                )
        return known

    inspected = list(map_threaded(inspect, len(images)))
    file_hashes = np.asarray([one.file_hash for one in inspected], np.int64)
    times = np.asarray([one.taken for one in inspected], np.int64)
    small = [one.small for one in inspected if one.small is not None]
    if by_pixels and len(small) == len(images):
        pixel_hashes = [one.pixel_hash for one in inspected]
        small_NSS = np.stack(small)
        vectors = NO_VECTORS
        if features is None:
            pairs = find_turned(small_NSS)
            vectors = fit_and_whiten([small_NSS.reshape(len(small), -1).astype(np.float32)])
        else:
            views = [features[:, None]]  # of each image, only the whole one
            pairs = find_near_duplicates(views, small_NSS, images.targets, pixel_hashes).pairs

        groups = connect(len(images), pairs, pixel_hashes, images.groups)
        return Grouped(groups, file_hashes, times, vectors)

    # Unreadable files share a hash, but are not equal: their known groups count instead.
    known_groups = connect(len(images), NO_PAIRS, images.groups)
    files = np.where(file_hashes == UNREADABLE, known_groups, file_hashes)
    return Grouped(connect(len(images), NO_PAIRS, known_groups, files), file_hashes, times)
