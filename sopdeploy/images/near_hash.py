"""A hash of an image that its copies share up to a few bits."""

import numpy as np
from PIL import Image

from sopdeploy.images.preprocess import Pixels

# of 64; re-encoded, resized and brighter copies differ in fewer, other photographs in more
NEAR_BITS = 4
# Where nearly all images look alike, as parts before one camera do, 0.2 % of the pairs of different
# objects differ in so few bits, and 58 % of the images have such another one. In at most one bit, 0.03 %
# of the pairs do.
COPY_BITS = 1
# Of images that were taken within a minute: frames of one object differ in fewer bits.
OBJECT_BITS = 14


def near_hash(pixels: Pixels) -> str:
    """Compute a hash of *pixels* (H, W, 3) as 16 hexadecimal digits, which copies share up to `NEAR_BITS`.

    Each of its 64 bits tells whether a cell of the gray image is brighter than the cell to its
    left, in 8 rows of 9 cells (dHash; Krawetz, "Kind of Like That", hackerfactor.com, 2013).
    """
    gray = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(gray, np.int16)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes().hex()


def are_near(one: int, other: int) -> bool:
    """Tell whether two hashes, as numbers, are those of copies: they differ in at most `NEAR_BITS`."""
    return (one ^ other).bit_count() <= NEAR_BITS
