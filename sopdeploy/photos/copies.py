"""Groups of images that show one photograph: copies, crops and frames of a burst.

The images most similar to each, by vectors, are candidates; their pixels decide
(`crops.compare_pixels`). The vectors of all images are centered, their parts scaled to equal
norms, and the principal components divided by the root of their variance plus the mean
variance. This removes what the images of a class have in common: the cosine of two copies stays
large, that of two similar objects becomes small. Where captions cover a copy, the plain vectors
are nearer. An image has several views: the vector of the whole image, and those of parts of it,
which find its crops. Copies that are turned or mirrored are found by small gray images in eight
orientations (`find_turned`). A group is a connected component.

Where classes look alike, as parts before one camera do, pixels do not tell copies from other
images: there, nearly all tiles must be equal (`_confirm`).

Letters: N images, K images of a block, P pairs, V views, D components of a vector.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import DataError
from sopdeploy.images.metadata import NO_TIME
from sopdeploy.photos.compared import compare_new
from sopdeploy.photos.crops import MOSTLY, NEARLY, PLAIN, are_mostly_plain
from sopdeploy.photos.file_checks import UNREADABLE, map_threaded
from sopdeploy.photos.photo import LabeledImages

Groups = NDArray[np.int64]  # a number per image
_Parts = Sequence[NDArray[np.float32]]  # vectors (N, D_i) of N images, in one or several parts
# Share of equal tiles of pairs that are no copies, which a tenth of the images of a class reach
# if they look alike: 0 to 0.2 for scenes, clothing and flowers, 0.37 for coins, 0.5 for hand
# signs and solar cells. Two or three photographs of any kind do, on one cloth: so a tenth of the
# photographs of all classes must, and at least six. So do copies that are not confirmed: so there
# must be more than photographs with confirmed copies.
ALIKE = 0.45
SHARE_ALIKE = 0.1
MIN_ALIKE = 6
# Share of a class that no group may reach, and the number of its images
ONE_GROUP = 0.9
MIN_ONE_GROUP = 8
_BLOCK = 1024  # images whose similarities are computed at once
_COSINES = 2**25  # similarities that are computed at once: 128 MiB
# Among more images, only equal files are found without features, and no turned ones
MAX_SIGNATURES = 20_000
NO_PAIRS = np.zeros((2, 0), np.intp)
NO_VECTORS = np.zeros((0, 0), np.float32)
SMALL = 64  # pixels of a side of the gray images that are kept of photographs
# pixels of a side, and cosine of equal images
TURNED_SIDE = 16
TURNED = 0.96
# cells of 8 x 8 pixels, and directions of a signature
CELLS = 8
DIRECTIONS = 8
DECIMALS = 4  # of a signature; float32 differs between processors from the seventh decimal on


class Nearest(NamedTuple):
    """Which images are compared with an image: the *num_others* nearest, if they are near enough.

    These are the nearest by whitened, and by plain vectors. Of an image that is compared, one of
    the cosines is at least that of its kind.
    """

    num_others: int
    whitened: float = -np.inf
    plain: float = -np.inf


# Of confirmed copies of all kinds in folders of 40 to 1,080 photographs, the whitened cosine was
# 0.29 or more, of a third to nine tenths of the other pairs below 0.2. Where classes look alike,
# so that pixels must be compared, plain vectors are alike, too (docs/decisions.md).
BY_FEATURES = Nearest(8, whitened=0.2, plain=0.8)
BY_EDGES = Nearest(20)


class NearDuplicates(NamedTuple):
    """The `pairs` (2, P) of near-duplicates among N images, which images (N,) are `alike`, and `vectors`.

    Alike are the images of a class in which images that are no copies resemble each other, too,
    as frames of one clip do, or parts before one camera. The vectors are those of the whole images
    (N, D), whitened, of length 1.
    """

    pairs: NDArray[np.intp]
    alike: NDArray[np.bool_]
    vectors: NDArray[np.float32] = NO_VECTORS


class Turned(NamedTuple):
    """The `pairs` (2, P) of images that are nearly equal if the second one is turned or mirrored.

    The `ways` (P,) of it are 0 to 3 quarter turns, mirrored 4 to 7. Those that are `is_doubtful`
    (P,) are copies only if their tiles are equal (`compare_pixels`).
    """

    pairs: NDArray[np.intp]
    ways: NDArray[np.intp]
    is_doubtful: NDArray[np.bool_]

    def select(self, mask: NDArray[np.bool_]) -> "Turned":
        """Keep the pairs where *mask* (P,) is true."""
        return Turned(self.pairs[:, mask], self.ways[mask], self.is_doubtful[mask])

    def orient(self, small: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn the second images of the pairs, of *small* ones (N, S, S), as the first ones are, (P, S, S)."""
        oriented = np.empty((len(self.ways), *small.shape[1:]), np.uint8)
        for position, (other, way) in enumerate(zip(self.pairs[1], self.ways, strict=True)):
            image = small[other] if way < 4 else small[other, :, ::-1]
            oriented[position] = np.rot90(image, way % 4)
        return oriented


NO_TURNED = Turned(NO_PAIRS, NO_PAIRS[0], NO_PAIRS[0] > 0)


def find_near_duplicates(
    views: Sequence[NDArray[np.float32]],
    small: NDArray[np.uint8],
    targets: NDArray[Any],
    hashes: Sequence[str],
    nearest: Nearest = BY_FEATURES,
    parts: NDArray[np.intp] | None = None,
) -> NearDuplicates:
    """Find the near-duplicates among N images with *targets*, (N,) or (N, C): pairs in any order.

    *views* has an array (N, V, D) for each part of the vectors: V views of an image, the whole
    one first. *small* are the gray images (N, S, S) of `shrink`. Of images with equal *hashes*
    (N,), only the first one is compared and is in pairs; `connect` adds the others by their hash.
    An image is compared with the *nearest* others. Among more than `MAX_SIGNATURES` images,
    turned copies are not found. With *parts* (N,), only pairs of two parts are compared.
    """
    # Of images with equal pixels, the first one stands for all. The result has the vectors of
    # all, and tells of all whether they are alike.
    first_N = np.sort(np.unique(hashes, return_index=True)[1])
    whole = [part[:, 0] for part in views]
    whiten = _fit_whitening([part[first_N] for part in whole])
    candidates = _find_candidates([part[first_N] for part in views], whiten, nearest)
    different = small[first_N]
    turned = find_turned(different) if len(first_N) <= MAX_SIGNATURES else NO_TURNED
    if parts is not None:
        parts_N = parts[first_N]
        candidates = candidates[:, parts_N[candidates[0]] != parts_N[candidates[1]]]
        turned = turned.select(parts_N[turned.pairs[0]] != parts_N[turned.pairs[1]])

    # Compare the candidates, and the doubtful turned copies, whose second images follow the others.
    doubtful = turned.select(turned.is_doubtful)
    oriented = doubtful.orient(different)
    follow = np.stack([doubtful.pairs[0], len(first_N) + np.arange(len(oriented))])
    shares = compare_new(
        np.concatenate([different, oriented]), np.concatenate([candidates, follow], axis=1)
    )
    shares, turned_shares = np.split(shares, [candidates.shape[1]])
    certain = turned.select(~turned.is_doubtful)
    copies = [certain.pairs, doubtful.pairs[:, turned_shares >= MOSTLY]]

    class_N = number_classes(targets)
    pairs, is_alike_N = _confirm(
        candidates, shares, np.concatenate(copies, axis=1), class_N[first_N]
    )
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


def _find_candidates(
    views: Sequence[NDArray[np.float32]],
    whiten: Callable[[_Parts], NDArray[np.float32]],
    nearest: Nearest,
) -> NDArray[np.intp]:
    """Pair each image with the *nearest* others by whitened, and by plain vectors.

    *views* has an array (N, V, D) for each part of the vectors. By whitened vectors, any view of
    an image is compared with the whole of the others; by plain ones, the whole image is.
    """
    count, num_views = views[0].shape[:2]
    num_others = min(nearest.num_others, count - 1)
    if num_others < 1:
        return NO_PAIRS

    # For each view, the parts of the vectors, (N, D) each.
    parts_by_view = [[part[:, view] for part in views] for view in range(num_views)]
    whole_ND = whiten(parts_by_view[0])

    plain = [
        part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
        for part in parts_by_view[0]
    ]
    plain_ND = np.concatenate(plain, axis=1) / np.sqrt(len(plain), dtype=np.float32)

    # The nearest images of each block: by the best view, then by plain vectors.
    neighbors = []  # (2, P) each: an image, and one that is near it
    size = max(1, min(_BLOCK, _COSINES // count))
    for start in range(0, count, size):  # to save memory
        block = np.arange(start, min(start + size, count))
        largest_KN = np.full((len(block), count), -np.inf, np.float32)
        for parts in parts_by_view:  # one after another, because those of many images are large
            np.maximum(
                largest_KN, whiten([part[block] for part in parts]) @ whole_ND.T, out=largest_KN
            )
        plain_KN = plain_ND[block] @ plain_ND.T
        is_near_KN = (largest_KN >= nearest.whitened) | (plain_KN >= nearest.plain)
        for cosines_KN in (largest_KN, plain_KN):
            cosines_KN[np.arange(len(block)), block] = -np.inf  # not the image itself
            others = np.argpartition(cosines_KN, -num_others, axis=1)[:, -num_others:]
            is_near = np.take_along_axis(is_near_KN, others, axis=1).ravel()
            pairs = np.stack([np.repeat(block, num_others), others.ravel()])
            neighbors.append(pairs[:, is_near])

    # Each pair once, as one number.
    pairs = np.sort(np.concatenate(neighbors, axis=1), axis=0)
    numbers = np.unique(pairs[0] * count + pairs[1])
    return np.stack(np.divmod(numbers, count))


def _confirm(
    candidates: NDArray[np.intp],
    shares: NDArray[np.float32],
    turned: NDArray[np.intp],
    classes: NDArray[np.int64],
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Select the *candidates* (2, P) that are copies by their *shares* (P,) of equal tiles, and *turned*.

    Also tells for each image (N,) whether the images of its class, *classes* (N,), look alike.
    If nearly all images of a class, of `MIN_ONE_GROUP` or more, would be one group, they look
    alike, and no pairs of them are selected.
    """
    members_of_classes = np.split(
        np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1]
    )
    is_alike_N = _find_alike(candidates, shares, members_of_classes, len(classes))

    # Copies. In a class whose images look alike, nearly all of their tiles are equal.
    are_copies = shares >= np.where(is_alike_N[candidates].any(axis=0), NEARLY, MOSTLY)
    pairs = np.concatenate([candidates[:, are_copies], turned], axis=1)
    groups = connect(len(classes), pairs)

    # Classes of which nearly all images would be one group.
    is_one_group_N = np.zeros(len(classes), np.bool_)
    for members in members_of_classes:
        if len(members) >= MIN_ONE_GROUP:
            largest = np.bincount(groups[members]).max()
            is_one_group_N[members] = largest >= ONE_GROUP * len(members)

    return pairs[:, ~is_one_group_N[pairs].any(axis=0)], is_alike_N | is_one_group_N


def _find_alike(
    candidates: NDArray[np.intp],
    shares: NDArray[np.float32],
    members_of_classes: Sequence[NDArray[np.intp]],
    count: int,
) -> NDArray[np.bool_]:
    """Tell of *count* images whether those of their class look alike, by the *shares* of *candidates*.

    A tenth of the images of such a class are like an image of another group, and enough
    photographs of all classes are, whatever the number of their copies: more than have copies.
    """
    # For each image the largest share with another one; pairs of two copies do not count.
    groups = connect(count, candidates[:, shares >= MOSTLY])
    is_outside = groups[candidates[0]] != groups[candidates[1]]
    largest_N = np.zeros(count, np.float32)
    for images in candidates[:, is_outside]:
        np.maximum.at(largest_N, images, shares[is_outside])

    # The photographs of all classes; of the copies of one, the largest share counts.
    num_groups = groups.max(initial=-1) + 1
    largest_G = np.zeros(num_groups, np.float32)
    np.maximum.at(largest_G, groups, largest_N)
    num_alike = np.count_nonzero(largest_G >= ALIKE)
    num_copied = np.count_nonzero(np.bincount(groups) > 1)

    is_alike_N = np.zeros(count, np.bool_)
    if num_alike < max(MIN_ALIKE, SHARE_ALIKE * num_groups, num_copied + 1):
        return is_alike_N
    for members in members_of_classes:
        if len(members):
            high_share = np.quantile(largest_N[members], 1 - SHARE_ALIKE)
            is_alike_N[members] = high_share >= ALIKE
    return is_alike_N


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


def find_turned(small: NDArray[np.uint8]) -> Turned:
    """Find the pairs of nearly equal images in any of eight orientations, by *small* ones (N, S, S).

    Their cosine is `TURNED` or more. Copies that are turned, smaller and re-encoded reach 0.97,
    different photographs up to 0.94. Images without contrast are in no pair. Small images of parts
    of one shape on white are nearly equal, so that pairs of mostly plain ones are doubtful.
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
        pairs.append(np.stack([row + start, column, cosines[row, column].argmax(axis=1)]))
    pairs_3P = np.concatenate(pairs, axis=1)  # each in both orders, and images with themselves
    is_once = pairs_3P[0] < pairs_3P[1]
    pairs_3P = pairs_3P[:, is_once & ~is_plain_N[pairs_3P[:2]].any(axis=0)]
    is_doubtful_P = are_mostly_plain(small)[pairs_3P[:2]].all(axis=0)
    return Turned(pairs_3P[:2], pairs_3P[2], is_doubtful_P)


def signature(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute a histogram of the directions of edges in 8 x 8 cells of a *small* image, (512,)."""
    # Arrays of pixels are (64, 64), here and below.
    down, right = np.gradient(small.astype(np.float32))
    strength = np.hypot(down, right)  # of the edge at each pixel
    turns = np.arctan2(down, right) / (2 * np.pi)  # its direction, -0.5 to 0.5
    direction = (turns % 1) * DIRECTIONS  # in bins, 0 to 8
    lower_bin = direction.astype(int)
    # An edge between two directions counts in both, in shares.
    share_of_next = direction - lower_bin

    # Where the bins of the cell of each pixel begin.
    cell_of_row = np.arange(SMALL) * CELLS // SMALL  # (64,), 0 to 7; the same for columns
    cell_of_pixel = cell_of_row[:, None] * CELLS + cell_of_row  # (64, 64), 0 to 63
    first_bin = cell_of_pixel * DIRECTIONS  # position in the histogram, where a cell has 8 bins

    histogram = np.zeros(CELLS * CELLS * DIRECTIONS)
    for shift, share in ((0, 1 - share_of_next), (1, share_of_next)):
        # Directions are a circle: the first one follows the last one.
        bins = first_bin + (lower_bin + shift) % DIRECTIONS
        histogram += np.bincount(
            bins.ravel(), (strength * share).ravel(), minlength=len(histogram)
        )

    root = np.sqrt(histogram)  # a few strong edges then do not determine the cosine
    return (root / max(float(np.linalg.norm(root)), 1e-12)).round(DECIMALS).astype(np.float32)


def group_by_edges(
    images: LabeledImages, hashes: Sequence[str], small: Sequence[NDArray[np.uint8]]
) -> tuple[Groups, NDArray[np.float32]]:
    """Group *images* by the *hashes* of their pixels, their *small* images, and the groups that are known.

    Also returns the vectors (N, D) that tell how similar the images are.
    """
    # The views (N, 1, 512): the whole image is the only one.
    views = np.stack([signature(one) for one in small])[:, None]
    near = find_near_duplicates([views], np.stack(small), images.targets, hashes, BY_EDGES)
    return connect(len(images), near.pairs, hashes, images.groups), near.vectors


class Grouped(NamedTuple):
    """Groups (N,) of photographs, and what told them: hashes of files, times and vectors (N, D).

    If only equal files are grouped, there are no vectors, and times that were not read are
    `NO_TIME`.
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


def group_photographs(images: LabeledImages) -> Grouped:
    """Group *images* by their known groups and by near-duplicates; each image is read once.

    Near-duplicates have equal pixels, or similar edges and equal tiles. If any image cannot be
    decoded, or there are more than `MAX_SIGNATURES`, only equal files are near-duplicates.
    """
    by_edges = len(images) <= MAX_SIGNATURES

    def inspect(index: int) -> _Inspected:
        known = _Inspected()  # what is known if the next step raises an error
        with suppress(DataError):  # whoever uses the image names it
            photo = images.photo(index)
            known = _Inspected(photo.file_hash)
            if by_edges:
                known = _Inspected(
                    photo.file_hash, photo.taken, photo.pixel_hash, shrink(photo.pixels)
                )
        return known

    inspected = list(map_threaded(inspect, len(images)))
    file_hashes = np.asarray([one.file_hash for one in inspected], np.int64)
    times = np.asarray([one.taken for one in inspected], np.int64)
    small = [one.small for one in inspected if one.small is not None]
    if by_edges and len(small) == len(images):
        groups, vectors = group_by_edges(images, [one.pixel_hash for one in inspected], small)
        return Grouped(groups, file_hashes, times, vectors)

    # Unreadable files share a hash, but are not equal: their known groups count instead.
    known_groups = connect(len(images), NO_PAIRS, images.groups)
    files = np.where(file_hashes == UNREADABLE, known_groups, file_hashes)
    return Grouped(connect(len(images), NO_PAIRS, known_groups, files), file_hashes, times)
