"""Groups of images that show one photograph: copies, crops and frames of a burst.

The vectors of all images are centered, their parts scaled to equal norms, and the principal components
divided by the root of their variance plus the mean variance. This removes what the images of a class have in
common: the cosine of two copies stays large, that of two similar objects becomes small. An image has several
views: the vector of the whole image, and those of parts of it, which find its crops. Two images are connected
if the whole of one and a view of the other reach a threshold, and a group is a connected component.

The threshold is measured on the given images and vectors. It is halfway between what different images reach
and what copies reach: four fifths of `Copies` of a sample of the images, or, if most images are frames of
clips and reach more, four fifths of the frames with the most similar one (`_reached_by_frames`). Different
images reach four standard deviations above the median cosine of the images of a class, or above the median of
the largest cosine with images of other classes; its upper tail is not used if it reaches what copies do,
because classes that look alike and copies with other labels make it heavy. If most pairs of a class are
copies, as in a clip, those that chains of copies connect do not count (`_threshold_between_chains`).

Where classes look alike, the threshold is above what copies reach. The images most similar to each are then
`candidates`, which `crops.find_crops` compares by their pixels. Copies that are turned or mirrored are found
by small gray images in eight orientations (`find_turned`).

Letters: N images, M copies, V views, D components of a vector.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from sopdeploy.errors import DataError
from sopdeploy.images.metadata import NO_TIME
from sopdeploy.photos.photo import UNREADABLE, LabeledImages, map_threaded

Groups = NDArray[np.int64]  # a number per image
_Parts = Sequence[NDArray[np.float32]]  # vectors (N, D_i) of N images, in one or several parts
CROPS = (0.85, 0.7)  # shares of each side of copies, in turn; 0.7 is half of the photograph
COPY_SIDES, COPY_BRIGHTNESS, COPY_QUALITY = 0.6, 1.15, 60  # relative to the photograph; quality of the JPEG
MISSED = 0.2  # share of the copies that may have a lower cosine
MOST = 0.5  # share of the images from which on frames of clips determine what copies reach
DEVIATIONS, QUARTILE = 4.0, 0.6745  # standard deviations, of which the upper quartile of a Gaussian is 0.6745
MAX_OTHER_LABELS = 3  # copies of an image with other labels, beyond which classes look alike
SHARE_UNLIKE = 0.05  # of the pairs of a class that reach less than copies if the class holds clips
MAX_COMPARED = 500  # images that are compared with those of other classes
_BLOCK = 1024  # images whose similarities are computed at once
_COSINES = 2**25  # similarities that are computed at once: 128 MiB
MAX_SIGNATURES = 20_000  # among more images, only equal files are found
NO_PAIRS, NO_VECTORS = np.zeros((2, 0), np.intp), np.zeros((0, 0), np.float32)
SMALL = 64  # pixels of a side of the gray images that are kept of photographs
TURNED_SIDE, TURNED = 16, 0.96  # pixels of a side, and cosine of equal images
CANDIDATES = 8  # images that may be crops of an image, where classes look alike
PLAIN = 2.0  # standard deviation of the gray levels of an image that shows nothing
THUMBNAIL, CELLS, DIRECTIONS = 64, 8, 8  # pixels, cells of 8 x 8 pixels, and directions of a signature
DECIMALS = 4  # of a signature; float32 differs between processors from the seventh decimal on


@dataclass(frozen=True, slots=True)
class Copies(LabeledImages):
    """Re-encoded, smaller, brighter copies of the `images` at `originals` (M,), cropped.

    `seeds` (M,) determine how: one of `crops`, the shares of each side that remain, and where.
    """

    labels: tuple[str, ...]
    targets: NDArray[Any]
    images: LabeledImages
    originals: NDArray[np.intp]
    seeds: NDArray[np.int64]
    crops: tuple[float, ...] = CROPS
    PER_IMAGE: ClassVar = ("targets", "originals", "seeds")

    @classmethod
    def choose(cls, images: LabeledImages, keys: Sequence[str], crops: tuple[float, ...] = CROPS) -> "Copies":
        """Choose what to copy: an eighth of *images*, 8 to 32 if possible, as many for each of *crops*.

        The hashes of the *keys* of the images choose images and crops: added images change few copies.
        """
        num_per_crop = int(np.clip(len(images) // 8, 8, 32)) // len(crops)
        seeds = np.asarray([crc32(key.encode()) for key in keys], np.int64)
        by_seed = np.argsort(seeds, kind="stable")  # indices of the images, the lowest hash first
        crop_numbers = seeds[by_seed] % len(crops)  # in the same order: the crop that each hash selects
        # An array for each crop: of the images whose hash selects it, those with the lowest hashes.
        chosen = [by_seed[crop_numbers == number][:num_per_crop] for number in range(len(crops))]
        originals = np.concatenate(chosen)
        return cls(images.labels, images.targets[originals], images, originals, seeds[originals], crops)

    def read(self, index: int) -> bytes:
        """Crop, shrink and brighten an image, as its seed says, and encode it as JPEG."""
        pixels = self.images.photo(int(self.originals[index])).pixels
        seed, sides = int(self.seeds[index]), np.asarray(pixels.size, np.float64)
        crop = self.crops[seed % len(self.crops)]  # the share of each side that remains
        corner = np.random.default_rng(seed).random(2) * (1 - crop) * sides  # left and top
        box = (*corner.tolist(), *(corner + crop * sides).tolist())  # left, top, right and bottom
        width, height = np.maximum(COPY_SIDES * sides, 1).astype(int).tolist()  # at least one pixel
        small = pixels.resize((width, height), Image.Resampling.BILINEAR, box)
        file = BytesIO()
        ImageEnhance.Brightness(small).enhance(COPY_BRIGHTNESS).save(file, "JPEG", quality=COPY_QUALITY)
        return file.getvalue()

    def identity(self, index: int) -> str:
        """Return the identity of the original."""
        return self.images.identity(int(self.originals[index]))


class NearDuplicates(NamedTuple):
    """The `pairs` (2, P) of near-duplicates among N images, which images (N,) are `alike`, and `vectors`.

    `certain` (2, Q) are those of the pairs that reach what half of the copies reach, and that would be copies
    within a class, too. `candidates` (2, R) are pairs of an image and another one that may be a crop of it,
    if cosines miss them.

    Alike are the images of classes whose images nearly all resemble each other as copies do: frames of one
    clip, or images of one kind, such as parts before one camera. The vectors do not tell which; they are
    those of the whole images (N, D), whitened, of length 1.
    """

    pairs: NDArray[np.intp]
    alike: NDArray[np.bool_]
    vectors: NDArray[np.float32] = NO_VECTORS
    certain: NDArray[np.intp] = NO_PAIRS
    candidates: NDArray[np.intp] = NO_PAIRS


def find_pairs(
    views: Sequence[NDArray[np.float32]],
    copies: _Parts,
    originals: NDArray[np.intp],
    targets: NDArray[Any],
    hashes: Sequence[str],
    num_candidates: int = CANDIDATES,
) -> NearDuplicates:
    """Find the near-duplicates among N images with *targets*, (N,) or (N, C): pairs in any order.

    An image may pair with itself. *views* has an array (N, V, D) for each part of the vectors: V views of an
    image, the whole one first. *copies* has (M, D) for each part, of copies of the images *originals* (M,).
    Images with equal *hashes* (N,) are exact copies, which `connect` groups by the hashes. Where cosines miss
    copies, each image has *num_candidates*.
    """
    count, num_views = len(targets), views[0].shape[1]
    class_N = number_classes(targets)
    photograph_N = np.unique(hashes, return_inverse=True)[1]  # equal for exact copies
    parts_by_view = [[part[:, view] for part in views] for view in range(num_views)]  # lists of (N, D)
    whole_parts = parts_by_view[0]
    # The whitening is fitted to the whole images and their copies together: (N + M, D) for each part.
    apply_whitening = _fit_whitening([np.concatenate(pair) for pair in zip(whole_parts, copies, strict=True)])
    whole_ND = apply_whitening(whole_parts)

    def largest_cosines(indices: NDArray[np.intp], others_LD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute cosines (K, L) of the images at *indices* (K,) with others: the largest of all views."""
        largest_KL = np.full((len(indices), len(others_LD)), -np.inf, np.float32)
        for parts in parts_by_view:  # one after another, because those of many images are large
            view_KD = apply_whitening([part[indices] for part in parts])
            np.maximum(largest_KL, view_KD @ others_LD.T, out=largest_KL)
        return largest_KL

    step = -(-count // MAX_COMPARED)  # rounded up
    compared = np.arange(0, count, step)  # evenly spaced, at most `MAX_COMPARED`
    cosines = largest_cosines(compared, whole_ND)
    with_original_M = np.diagonal(largest_cosines(originals, apply_whitening(copies)))  # of each copy
    # The cosines that most copies, and half of them, have with their originals.
    reached_by_copies, reached_by_half = np.quantile(with_original_M, [MISSED, 0.5]).tolist()
    found = _find_threshold(cosines, compared, class_N, photograph_N, reached_by_copies)
    # The largest rounding error of a cosine. Cosines that are equal but for it are on one side: those of
    # identical images above the threshold, those of different images that determine it below.
    rounding = float(np.finfo(np.float32).eps) * whole_ND.shape[1]
    threshold = min(found.cosine + rounding, 1 - rounding)
    certain_threshold = max(found.cosine_in_class, reached_by_half)
    misses_copies = threshold > reached_by_copies
    num_candidates = min(num_candidates, count - 1) if misses_copies else 0
    pairs, are_certain, candidates = [], [], [NO_PAIRS]
    size = max(1, min(_BLOCK, _COSINES // count))
    for start in range(0, count, size):  # to save memory
        block = np.arange(start, min(start + size, count))
        cosines = largest_cosines(block, whole_ND)
        row, second = np.nonzero(cosines >= threshold)
        pairs.append(np.stack([block[row], second]))
        are_certain.append(cosines[row, second] >= certain_threshold)
        if num_candidates > 0:
            candidates.append(_pair_with_nearest(block, cosines, num_candidates))
    all_pairs = np.concatenate(pairs, axis=1)
    certain = all_pairs[:, np.concatenate(are_certain)]
    is_alike_N = np.isin(class_N, found.alike_classes)
    return NearDuplicates(all_pairs, is_alike_N, whole_ND, certain, np.concatenate(candidates, axis=1))


def number_classes(targets: NDArray[Any]) -> NDArray[np.int64]:
    """Number the classes (N,) of images with *targets* (N,) or (N, C); equal rows are one class."""
    return np.unique(targets, axis=0, return_inverse=True)[1].reshape(len(targets)).astype(np.int64)


def _pair_with_nearest(
    block: NDArray[np.intp], cosines: NDArray[np.float32], num_others: int
) -> NDArray[np.intp]:
    """Pair each image of *block* (K,) with the *num_others* of largest *cosines* (K, N).

    Overwrites the cosines of the images with themselves.
    """
    cosines[np.arange(len(block)), block] = -np.inf  # not the image itself
    nearest = np.argpartition(cosines, -num_others, axis=1)[:, -num_others:]
    return np.stack([np.repeat(block, num_others), nearest.ravel()])


class _Threshold(NamedTuple):
    """The `cosine` that copies reach and different images do not, and the numbers of `alike_classes`.

    Nearly all images of these resemble each other as copies do. `cosine_in_class` is the threshold by images
    of one class alone, without those of other classes.
    """

    cosine: float
    alike_classes: list[int]
    cosine_in_class: float


def _find_threshold(
    cosines: NDArray[np.float32],
    compared: NDArray[np.intp],
    class_N: NDArray[np.intp],
    photograph_N: NDArray[np.intp],
    reached_by_copies: float,
) -> _Threshold:
    """Find the cosine that copies reach and different images do not.

    *cosines* (K, N) are of the images *compared* with all. Images with equal *photograph_N* are exact copies,
    whose cosines do not count. Both the cosines of two images of a class, and the largest cosine of each
    image with other classes, give a bound of what different images reach. The threshold is halfway between
    the higher one and what copies reach, or the bound if copies do not reach it.

    If the pairs of a class reach more than copies, they may be mostly copies themselves
    (`_threshold_between_chains`).
    """
    different_KN = photograph_N[compared, None] != photograph_N
    same_class_KN = (class_N[compared, None] == class_N) & different_KN
    other_class_KN = (class_N[compared, None] != class_N) & different_KN
    in_class = cosines[same_class_KN]  # one-dimensional
    reached_in_class = _upper_bound(in_class)
    reached_by_others, with_others_K = _reached_by_others(
        cosines, other_class_KN, reached_by_copies, may_be_copies=reached_in_class < reached_by_copies
    )
    bound = max(reached_by_others, reached_in_class)
    cosine_in_class = _halfway(reached_in_class, reached_by_copies)
    second = max(0, len(class_N) - 2)
    # The second largest and the largest cosine of each image in its class; the copy frees the others.
    most_similar_K2 = np.partition(np.where(same_class_KN, cosines, -1.0), second, axis=1)[:, second:].copy()
    if bound < reached_by_copies or not len(in_class):  # different images reach less than copies
        reached_by_frames = _reached_by_frames(most_similar_K2, bound, reached_by_copies)
        return _Threshold(_halfway(bound, reached_by_frames), [], cosine_in_class)
    # Nearly all images of a class resemble each other as copies do.
    if np.quantile(in_class, SHARE_UNLIKE) >= reached_by_copies:
        alike_classes = [
            number
            for number in np.unique(class_N[compared]).tolist()
            if len(of_class := cosines[same_class_KN & (class_N == number)])
            and np.quantile(of_class, SHARE_UNLIKE) >= reached_by_copies
        ]
        return _Threshold(bound, alike_classes, cosine_in_class)
    reached_by_frames = _reached_by_frames(most_similar_K2, reached_by_others, reached_by_copies)
    if reached_by_copies <= np.median(with_others_K) and reached_by_frames <= reached_by_others:
        return _Threshold(bound, [], cosine_in_class)
    cosines_KK, same_class_KK = cosines[:, compared], same_class_KN[:, compared]
    threshold = _threshold_between_chains(
        cosines_KK, same_class_KK, most_similar_K2, reached_by_others, reached_by_frames
    )
    return _Threshold(threshold, [], threshold)


def _halfway(bound: float, reached: float) -> float:
    """Return the cosine halfway between *bound* and *reached*, or *bound* if that is higher."""
    return max(bound, (bound + reached) / 2)


def _reached_by_others(
    cosines: NDArray[np.float32],
    other_class_KN: NDArray[np.bool_],
    reached_by_copies: float,
    *,
    may_be_copies: bool,
) -> tuple[float, NDArray[np.float32]]:
    """Return what images reach with those of other classes, and the cosine of each (K,) that tells it.

    That is its largest one. If these pairs *may_be_copies* with other labels, and many reach what copies do,
    it is the fourth largest.
    """
    cosines_with_others_KN = np.where(other_class_KN, cosines, -1.0)
    cosine_K = cosines_with_others_KN.max(axis=1)
    if may_be_copies and np.quantile(cosine_K, 0.75) >= reached_by_copies:
        # Many images have copies with other labels, or classes look alike: then even the fourth image does.
        fourth = max(0, cosines.shape[1] - 1 - MAX_OTHER_LABELS)  # its position in ascending order
        cosine_K = np.partition(cosines_with_others_KN, fourth, axis=1)[:, fourth]
    reached = _upper_bound(cosine_K)
    if may_be_copies and reached >= reached_by_copies:
        reached = _upper_bound(cosine_K, has_heavy_tail=True)
    return reached, cosine_K


def _threshold_between_chains(
    cosines_KK: NDArray[np.float32],
    same_class_KK: NDArray[np.bool_],
    most_similar_K2: NDArray[np.float32],
    reached_by_others: float,
    reached_by_frames: float,
) -> float:
    """Find the threshold if most pairs of a class may be copies.

    Only pairs of a class that no chain of pairs above the threshold connects count as different images. From
    *reached_by_others*, the bound increases until these reach no more.
    """
    reached_in_clips: Any = max(reached_by_frames, np.median(most_similar_K2[:, -1]))
    bound, higher = -math.inf, reached_by_others
    while higher > bound:  # a higher threshold connects fewer images, so that more pairs count
        bound = higher
        threshold = _halfway(bound, reached_by_frames)
        chain_K = connect(len(cosines_KK), np.stack(np.nonzero(cosines_KK >= threshold)))
        in_other_chain_KK = chain_K[:, None] != chain_K
        higher = max(bound, _upper_bound(cosines_KK[same_class_KK & in_other_chain_KK]))
        if higher > reached_in_clips:
            break  # pairs of frames count, because the chains divide clips
    return threshold


def _reached_by_frames(most_similar_K2: NDArray[np.float32], bound: float, reached_by_copies: float) -> float:
    """Return the cosine that frames of a clip reach; *reached_by_copies* if that is more or they are few.

    *most_similar_K2* are the second largest and the largest cosine of each image in its class. An image is a
    frame if both exceed the threshold between *bound* and *reached_by_copies*. All but a share `MISSED` of
    the frames have a neighbor with the returned cosine.
    """
    are_frames_K = most_similar_K2[:, 0] >= _halfway(bound, reached_by_copies)
    if are_frames_K.mean() < MOST:
        return reached_by_copies
    return max(reached_by_copies, float(np.quantile(most_similar_K2[are_frames_K, -1], MISSED)))


def _upper_bound(cosines: NDArray[np.float32], *, has_heavy_tail: bool = False) -> float:
    """Return `DEVIATIONS` standard deviations above the median of *cosines*, at most 1, -1 if there are none.

    The upper quartile estimates the deviation, because a few copies or wrong labels do not change it; if many
    may (*has_heavy_tail*), the nearer quartile does.
    """
    if not len(cosines):  # there are no pairs in a class if each class has one image
        return -1.0
    lower, median, upper = np.quantile(cosines, [0.25, 0.5, 0.75]).tolist()
    distance = min(upper - median, median - lower) if has_heavy_tail else upper - median
    return min(1.0, float(median + DEVIATIONS * distance / QUARTILE))


def connect(count: int, pairs: NDArray[np.intp], *keys: Any) -> Groups:
    """Group *count* images: *pairs* (2, P) and images with equal values in one of *keys* (N,) are connected.

    A key may be None. Returns the group of each image (N,), numbered in the order of their first images.
    """
    edges = [pairs]  # (2, E) each: two connected images per column
    for key in keys:
        if key is not None:  # an edge from each image to the first one with its value
            _, first_of_value, value_N = np.unique(key, return_index=True, return_inverse=True)
            edges.append(np.stack([np.arange(count), first_of_value[value_N]]))
    one, other = np.concatenate(edges, axis=1)
    # Label propagation: each image takes over the lowest index among its neighbors until no index changes.
    lowest_N, has_changed = np.arange(count), True
    while has_changed:
        before = lowest_N.copy()
        np.minimum.at(lowest_N, one, before[other])
        np.minimum.at(lowest_N, other, before[one])
        lowest_N = lowest_N[lowest_N]  # the lowest index of that image, too: long chains need few rounds
        has_changed = not np.array_equal(lowest_N, before)
    _, groups = np.unique(lowest_N, return_inverse=True)  # without gaps in the numbers
    return groups.astype(np.int64)


def _fit_whitening(parts: _Parts) -> Callable[[_Parts], NDArray[np.float32]]:
    """Fit a whitening to vectors, given in *parts*; returns the function that whitens any vectors in parts.

    It scales the parts to equal norms, divides the principal components by their damped standard deviations,
    and returns rows of norm 1.
    """
    means = [part.mean(axis=0) for part in parts]
    squares = [np.square(part - mean).sum(axis=1).mean() for part, mean in zip(parts, means, strict=True)]
    norms = [max(float(np.sqrt(square)), 1e-12) for square in squares]  # not 0 if all vectors are equal

    def center_and_join(given: _Parts) -> NDArray[np.float32]:
        scaled = [(part - mean) / norm for part, mean, norm in zip(given, means, norms, strict=True)]
        return np.concatenate(scaled, axis=1)

    rows_ND = center_and_join(parts)
    # The components are the eigenvectors of rows.T @ rows (D, D). Its eigenvalues are N times the variances;
    # the norm in `apply` removes this factor. If N <= D, rows @ rows.T (N, N) is decomposed: it has the same
    # eigenvalues above 0, and for each of its eigenvectors v, rows.T @ v / sqrt(eigenvalue) is a component.
    is_wide = rows_ND.shape[0] <= rows_ND.shape[1]
    product = rows_ND @ rows_ND.T if is_wide else rows_ND.T @ rows_ND
    eigenvalues, vectors = np.linalg.eigh(product.astype(np.float64))
    damping = max(float(eigenvalues.mean()), 1e-12)  # the mean over min(N, D) components
    kept = eigenvalues > 1e-6 * damping  # the others are rounding errors
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    components = rows_ND.T @ (vectors / np.sqrt(eigenvalues)) if is_wide else vectors  # (D, K), norm 1
    projection = (components / np.sqrt(eigenvalues + damping)).astype(np.float32)

    def apply(given: _Parts) -> NDArray[np.float32]:
        whitened = center_and_join(given) @ projection
        length = np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-12)
        return (whitened / length).astype(np.float32)

    return apply


def fit_and_whiten(parts: _Parts) -> NDArray[np.float32]:
    """Whiten the vectors that are given in *parts*, by these vectors alone; returns rows of length 1."""
    return _fit_whitening(parts)(parts)


def shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Compute the small gray image (`SMALL`, `SMALL`) of the square *pixels* (S, S, 3)."""
    small = Image.fromarray(pixels).convert("L").resize((SMALL, SMALL), Image.Resampling.BOX)
    return np.asarray(small)


def find_turned(small: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Find the pairs (2, P) of equal images in any of eight orientations, by their *small* ones (N, S, S).

    They are compared after whitening, as other vectors are. Copies that are turned, smaller and re-encoded
    reach 0.97, different photographs up to 0.94, also of classes that look alike.
    """
    count, width = len(small), SMALL // TURNED_SIDE
    small = small.reshape(count, TURNED_SIDE, width, TURNED_SIDE, width).mean(axis=(2, 4), dtype=np.float32)
    sides = [small, small[:, :, ::-1]]  # also mirrored
    turned = [np.rot90(side, turns, axes=(1, 2)) for side in sides for turns in range(4)]
    rows = np.stack(turned, axis=1).reshape(count, 8, -1)
    rows -= rows.mean(axis=2, keepdims=True)
    lengths = np.linalg.norm(rows, axis=2, keepdims=True)
    is_plain_N = lengths[:, 0, 0] < PLAIN * small[0].size ** 0.5  # which all plain images would equal
    units = (rows / np.maximum(lengths, 1.0)).reshape(count * 8, -1)
    whitened = fit_and_whiten([units]).reshape(count, 8, -1)
    pairs = []
    size = max(1, _COSINES // (8 * count))
    for start in range(0, count, size):
        cosines = whitened[start : start + size, 0] @ whitened.reshape(count * 8, -1).T
        row, column = np.nonzero(cosines.reshape(len(cosines), count, 8).max(axis=2) >= TURNED)
        pairs.append(np.stack([row + start, column]))
    found = np.concatenate(pairs, axis=1)
    return found[:, (found[0] < found[1]) & ~is_plain_N[found].any(axis=0)]


def signature(image: Image.Image) -> NDArray[np.float32]:
    """Compute a histogram of the directions of edges in 8 x 8 cells of an RGB *image*, (512,).

    It finds re-encoded, resized and slightly cropped copies, and about half of those cropped to 90 %.
    """
    small = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    down, right = np.gradient(np.asarray(small, np.float32))  # (64, 64) each, as all arrays of pixels below
    strength = np.hypot(down, right)  # of the edge at each pixel
    turns = np.arctan2(down, right) / (2 * np.pi)  # its direction, -0.5 to 0.5
    direction = (turns % 1) * DIRECTIONS  # in bins, 0 to 8
    lower_bin = direction.astype(int)
    share_of_next = direction - lower_bin  # an edge between two directions counts in both, in shares
    cell_of_row = np.arange(THUMBNAIL) * CELLS // THUMBNAIL  # (64,), 0 to 7; the same for columns
    cell_of_pixel = cell_of_row[:, None] * CELLS + cell_of_row  # (64, 64), 0 to 63
    first_bin = cell_of_pixel * DIRECTIONS  # position in the histogram, where a cell has 8 bins
    histogram = np.zeros(CELLS * CELLS * DIRECTIONS)
    for shift, share in ((0, 1 - share_of_next), (1, share_of_next)):
        bins = first_bin + (lower_bin + shift) % DIRECTIONS  # after the last direction comes the first one
        histogram += np.bincount(bins.ravel(), (strength * share).ravel(), minlength=len(histogram))
    root = np.sqrt(histogram)  # a few strong edges then do not determine the cosine
    return (root / max(float(np.linalg.norm(root)), 1e-12)).round(DECIMALS).astype(np.float32)


def group_by_edges(
    images: LabeledImages, hashes: Sequence[str], signatures: Sequence[NDArray[np.float32]]
) -> tuple[Groups, NDArray[np.float32]]:
    """Group *images* by the *hashes* of their pixels, their *signatures*, and the groups that are known.

    Also returns the vectors (N, D) that tell how similar the images are.
    """
    identities = [images.identity(index) for index in range(len(images))]
    copies = Copies.choose(images, identities, crops=(0.95,))  # signatures miss most smaller crops
    of_copies = np.stack([signature(copies.photo(index).pixels) for index in range(len(copies))])  # (M, 512)
    views = np.stack(signatures)[:, None]  # (N, 1, 512): the whole image is the only view
    # One part per vector; the images of candidates are not kept, so that their pixels are not compared.
    found = find_pairs([views], [of_copies], copies.originals, images.targets, hashes, 0)
    return connect(len(images), found.pairs, hashes, images.groups), found.vectors


class Grouped(NamedTuple):
    """Groups (N,) of photographs that belong together, hashes of their files, and the times they were taken.

    `vectors` (N, D) of their edges tell how similar they are; they are empty if only files were compared.
    """

    groups: Groups
    file_hashes: NDArray[np.int64]
    times: NDArray[np.int64]
    vectors: NDArray[np.float32] = NO_VECTORS


class _Inspected(NamedTuple):
    """Hash and time of a file; if its pixels are compared, their hash and the signature of their edges."""

    file_hash: int = UNREADABLE
    taken: int = NO_TIME
    pixel_hash: str = ""
    edges: NDArray[np.float32] | None = None


def group_photographs(images: LabeledImages) -> Grouped:
    """Group *images* by their known groups and by near-duplicates; each image is read once.

    Near-duplicates have equal pixels or similar edges. If an image cannot be decoded, or there are more than
    `MAX_SIGNATURES`, they are equal files.
    """
    by_edges = len(images) <= MAX_SIGNATURES

    def inspect(index: int) -> _Inspected:
        found = _Inspected()
        with suppress(DataError):  # whoever uses the image names it
            photo = images.photo(index)
            found = _Inspected(photo.file_hash)
            if by_edges:
                found = _Inspected(photo.file_hash, photo.taken, photo.pixel_hash, signature(photo.pixels))
        return found

    inspected = list(map_threaded(inspect, len(images)))
    file_hashes = np.asarray([one.file_hash for one in inspected], np.int64)
    times = np.asarray([one.taken for one in inspected], np.int64)
    signatures = [one.edges for one in inspected if one.edges is not None]
    if by_edges and len(signatures) == len(images):
        groups, vectors = group_by_edges(images, [one.pixel_hash for one in inspected], signatures)
        return Grouped(groups, file_hashes, times, vectors)
    known = connect(len(images), NO_PAIRS, images.groups)
    files = np.where(file_hashes == UNREADABLE, known, file_hashes)  # unreadable files are no equal files
    return Grouped(connect(len(images), NO_PAIRS, known, files), file_hashes, times)
