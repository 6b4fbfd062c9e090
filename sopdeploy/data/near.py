"""Groups of images that show one photograph: copies, crops and frames of a burst.

The vectors of all images are centered, their parts scaled to equal norms, and the principal components
divided by the root of their variance plus the mean variance. This removes what the images of a class have in
common: the cosine of two copies stays large, that of two similar objects becomes small. Images whose cosine
reaches a threshold are connected, and a group is a connected component.

The threshold is measured on the given images and vectors. Four fifths of `Copies` of a sample of the images
reach it, unless different images reach that, too: it is at least four standard deviations above the median
cosine of the images of a class, and above the median of the largest cosine with images of other classes.

Letters: N images, M copies, D components of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from sopdeploy.data.base import LabeledImages, Split, hold_out, map_threaded
from sopdeploy.errors import DataError
from sopdeploy.images.pixels import to_rgb
from sopdeploy.images.preprocess import Preprocess

Groups = NDArray[np.int64]  # a number per image
_RULES = Preprocess()  # for the conversion to upright RGB
CROPS = (0.85, 0.7)  # shares of each side of copies, in turn; 0.7 is half of the photograph
MISSED = 0.2  # share of the copies below the threshold
DEVIATIONS, QUARTILE = 4.0, 0.6745  # standard deviations, of which the upper quartile of a Gaussian is 0.6745
MAX_COMPARED = 500  # images that are compared with those of other classes
_BLOCK = 1024  # images whose similarities are computed at once
MAX_COMPARED_PIXELS = 20_000  # with more images, pixels are not compared
THUMBNAIL, CELLS, DIRECTIONS = 64, 8, 8  # pixels, cells of 8 x 8 pixels, and directions of a signature


@dataclass(frozen=True, slots=True)
class Copies(LabeledImages):
    """Re-encoded, smaller, brighter copies of the `images` at `originals` (M,), cropped.

    The shares of each side that remain are `crops`, in turn.
    """

    labels: tuple[str, ...]
    targets: NDArray[Any]
    images: LabeledImages
    originals: NDArray[np.intp]
    crops: tuple[float, ...] = CROPS

    @classmethod
    def of(cls, images: LabeledImages, crops: tuple[float, ...] = CROPS) -> "Copies":
        """Copy an eighth of *images*, at least 8 and at most 32."""
        count = int(np.clip(len(images) // 8, 8, 32))
        originals = np.random.default_rng(0).permutation(len(images))[:count]
        return cls(images.labels, images.targets[originals], images, originals, crops)

    def read(self, index: int) -> bytes:
        """Copy an image and encode it as JPEG."""
        pixels = to_rgb(self.images[int(self.originals[index])][0], _RULES)
        sides, crop = np.asarray(pixels.size, np.float64), self.crops[index % len(self.crops)]
        corner = np.random.default_rng(index).random(2) * (1 - crop) * sides
        box = (*corner.tolist(), *(corner + crop * sides).tolist())
        width, height = np.maximum(0.6 * sides, 1).astype(int).tolist()
        small = pixels.resize((width, height), Image.Resampling.BILINEAR, box)
        file = BytesIO()
        ImageEnhance.Brightness(small).enhance(1.15).save(file, "JPEG", quality=60)
        return file.getvalue()

    def identity(self, index: int) -> str:
        """Return the identity of the original."""
        return self.images.identity(int(self.originals[index]))

    def select(self, mask: NDArray[np.bool_]) -> "Copies":
        """Keep the copies where *mask* (M,) is true."""
        return replace(self, targets=self.targets[mask], originals=self.originals[mask])


def find_pairs(
    parts: Sequence[NDArray[np.float32]], originals: NDArray[np.intp], targets: NDArray[Any]
) -> NDArray[np.intp]:
    """Find the pairs (2, P) of near-duplicates among N images with *targets*, (N,) or (N, C).

    *parts* (N + M, D) of the vectors are those of the images, then those of copies of *originals* (M,).
    """
    count = len(targets)
    classes = np.unique(targets, axis=0, return_inverse=True)[1].reshape(count)
    rows = _whiten(parts)
    images, copies = rows[:count], rows[count:]
    compared = np.arange(0, count, -(-count // MAX_COMPARED))
    cosines = images[compared] @ images.T
    same_class = classes[compared, None] == classes
    nearest_other = np.where(same_class, -1.0, cosines).max(axis=1)
    in_class = cosines[same_class & (compared[:, None] != np.arange(count))]
    levels = [np.quantile((images[originals] * copies).sum(axis=1), MISSED)]
    for different in filter(len, (nearest_other, in_class)):
        median, upper = np.quantile(different, [0.5, 0.75])  # a few copies or wrong labels do not change them
        levels.append(median + DEVIATIONS * (upper - median) / QUARTILE)
    threshold = max(levels)
    pairs = []
    for start in range(0, count, _BLOCK):
        first, second = np.nonzero(images[start : start + _BLOCK] @ images.T >= threshold)
        pairs.append(np.stack([first + start, second]))
    return np.concatenate(pairs, axis=1)


def connect(count: int, pairs: NDArray[np.intp], *keys: Any) -> Groups:
    """Group *count* images: *pairs* (2, P) and images with equal values in one of *keys* (N,) are connected.

    A key may be None. The groups are numbered by their first image.
    """
    equal = [np.stack([np.arange(count), _first_equal(key)]) for key in keys if key is not None]
    one, other = np.concatenate([pairs, *equal], axis=1)
    lowest, before = np.arange(count), np.zeros(0, int)  # the lowest index of a connected image, so far
    while not np.array_equal(lowest, before):
        before = lowest.copy()
        np.minimum.at(lowest, one, before[other])
        np.minimum.at(lowest, other, before[one])
        lowest = lowest[lowest]
    return np.unique(lowest, return_inverse=True)[1].astype(np.int64)


def _whiten(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Join *parts* (N, D) to rows of norm 1, with equal norms of the parts and damped variances."""
    scaled = []
    for part in parts:
        centered = part - part.mean(axis=0)
        norm = float(np.sqrt(np.square(centered).sum(axis=1).mean()))
        scaled.append(centered / max(norm, 1e-12))
    rows = np.concatenate(scaled, axis=1)
    # Both products have the same eigenvalues above 0; with fewer rows than columns, (N, N) is smaller.
    wide = rows.shape[0] <= rows.shape[1]
    product = rows @ rows.T if wide else rows.T @ rows
    variances, vectors = np.linalg.eigh(product.astype(np.float64))
    variances = np.maximum(variances, 0)
    damped = variances + max(float(variances.mean()), 1e-12)
    whitened = vectors * np.sqrt(variances / damped) if wide else rows @ (vectors / np.sqrt(damped))
    norms = np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-12)
    unit: NDArray[np.float32] = (whitened / norms).astype(np.float32)
    return unit


def _first_equal(keys: Sequence[Any]) -> NDArray[np.intp]:
    """Find for each of *keys* (N,) the index of the first equal one."""
    first, inverse = np.unique(keys, return_index=True, return_inverse=True)[1:]
    return first[inverse]


def effective_count(groups: NDArray[np.integer]) -> float:
    """Compute the number of independent images among images of *groups* (N,): N^2 / sum of squared sizes.

    Equal groups count as one image each (the effective sample size of Kish, "Survey Sampling", 1965).
    """
    sizes = np.unique(groups, return_counts=True)[1]
    return float(len(groups) ** 2 / max(1, np.square(sizes).sum()))


def signature(image: Image.Image) -> NDArray[np.float32]:
    """Compute a histogram of the directions of edges in 8 x 8 cells of *image*, (512,), without a network.

    It finds re-encoded, resized and slightly shifted copies, but hardly any that are cropped by a tenth.
    """
    small = to_rgb(image, _RULES).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    down, right = np.gradient(np.asarray(small, np.float32))
    position = np.arctan2(down, right) / (2 * np.pi) % 1 * DIRECTIONS
    lower = position.astype(int)
    share, cell = position - lower, np.arange(THUMBNAIL) * CELLS // THUMBNAIL
    bins = (cell[:, None] * CELLS + cell) * DIRECTIONS
    length, size = np.hypot(down, right), CELLS * CELLS * DIRECTIONS
    histogram = sum(
        np.bincount((bins + (lower + shift) % DIRECTIONS).ravel(), (length * weight).ravel(), size)
        for shift, weight in ((0, 1 - share), (1, share))
    )
    root = np.sqrt(histogram)
    found: NDArray[np.float32] = (root / max(float(np.linalg.norm(root)), 1e-12)).astype(np.float32)
    return found


def group_by_signatures(images: LabeledImages, signatures: NDArray[np.float32]) -> Groups:
    """Group *images* by their *signatures* (N, 512) and by the groups that are known."""
    copies = Copies.of(images, crops=(0.95,))
    of_copies = np.stack([signature(copies[index][0]) for index in range(len(copies))])
    pairs = find_pairs([np.concatenate([signatures, of_copies])], copies.originals, images.targets)
    return connect(len(images), pairs, images.groups)


def hold_out_images(split: Split, fraction: float, seed: int) -> Split:
    """Hold out *fraction* of the images of every class if *split* has no held-out images.

    *seed* and the identities of the images determine which. Near-duplicates and images of one group are on
    one side; a class that is one group has no held-out image.
    """
    images = split.train
    if len(split.held_out):
        return split
    if len(images) <= MAX_COMPARED_PIXELS:
        try:
            signatures = np.stack(list(map_threaded(lambda index: signature(images[index][0]), len(images))))
            groups = group_by_signatures(images, signatures)
        except DataError:  # the run names all unreadable files
            pass
        else:
            images = images if groups.max() + 1 == len(images) else images.replaced(groups=groups)
    mask = _hold_out_groups(images, fraction, seed)
    return replace(split, train=images.select(~mask), held_out=images.select(mask))


def _hold_out_groups(images: LabeledImages, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Select *fraction* of the groups of every class by *seed*; returns a mask (N,)."""
    groups = np.arange(len(images)) if images.groups is None else images.groups
    # Of G groups, the first image stands for the others; N is the number of images.
    _, first_G, group_N = np.unique(groups, return_index=True, return_inverse=True)
    keys_G = [images.identity(index) for index in first_G.tolist()]
    held_out_G: NDArray[np.bool_] = hold_out(keys_G, images.targets[first_G], fraction, seed)
    mask: NDArray[np.bool_] = held_out_G[group_N]
    return mask
