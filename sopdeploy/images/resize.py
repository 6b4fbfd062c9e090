"""Resize a decoded image as the rules say: with antialiasing as Pillow does, or without as OpenCV does.

Without antialiasing, a pixel is interpolated between its two ("bilinear") or four ("bicubic", a = -0.75)
nearest source pixels in each direction, also where the image becomes smaller. These are OpenCV's
`INTER_LINEAR` and `INTER_CUBIC`, and `torch.nn.functional.interpolate(antialias=False)`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.images.preprocess import Box, Preprocess

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Rows that are computed at once: they need few rows of the source, which are the only ones copied
BAND = 16
CUBIC = -0.75  # the slope of OpenCV's and torch's cubic kernel; Pillow's is -0.5


class _Taps(NamedTuple):
    """Of each new pixel along one side, K source pixels and their weights, both (K, new side)."""

    position: NDArray[np.intp]
    weight: NDArray[np.float32]


def resize_by_rules(
    image: Image.Image, size: tuple[int, int], rules: Preprocess, box: Box | None = None
) -> Image.Image:
    """Resize *box* of the RGB *image*, by default all of it, to *size*, (width, height), as *rules* say."""
    if rules.antialias:
        return image.resize(size, RESAMPLING[rules.interpolation], box)
    return _sample(image, size, rules.interpolation, box or (0, 0, *image.size))


def _sample(
    image: Image.Image, size: tuple[int, int], interpolation: str, box: Box
) -> Image.Image:
    """Interpolate *box* of the RGB *image* at the centers of the pixels of an image of *size*."""
    width, height = size
    left, top, right, bottom = box
    columns = _taps(left, right, width, image.width, interpolation)
    rows = _taps(top, bottom, height, image.height, interpolation)
    sampled = np.empty((height, width, 3), np.uint8)

    for start in range(0, height, BAND):
        band = slice(start, start + BAND)
        first = int(rows.position[:, band].min())
        last = int(rows.position[:, band].max())
        source = np.asarray(image.crop((0, first, image.width, last + 1)))

        total = np.zeros(sampled[band].shape, np.float32)
        for row, row_weight in zip(
            rows.position[:, band] - first, rows.weight[:, band], strict=True
        ):
            for column, weight in zip(columns.position, columns.weight, strict=True):
                total += source[np.ix_(row, column)] * (row_weight[:, None] * weight)[..., None]
        sampled[band] = np.rint(total).clip(0, 255)
    return Image.fromarray(sampled)


def _taps(start: float, end: float, count: int, side: int, interpolation: str) -> _Taps:
    """Find the source pixels of *count* new ones that divide *start* to *end*, of *side* source pixels."""
    center = start + (np.arange(count) + 0.5) * ((end - start) / count) - 0.5
    nearest = np.floor(center)
    offset = center - nearest

    if interpolation == "bilinear":
        numbers = np.arange(0, 2)
        weights = [1 - offset, offset]
    else:
        numbers = np.arange(-1, 3)
        inner = [(CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1 for x in (offset, 1 - offset)]
        outer = [CUBIC * (x**3 - 5 * x**2 + 8 * x - 4) for x in (1 + offset, 2 - offset)]
        weights = [outer[0], inner[0], inner[1], outer[1]]

    # Beyond its border, an image repeats its last pixel.
    position = (nearest + numbers[:, None]).clip(0, side - 1).astype(np.intp)
    return _Taps(position, np.stack(weights).astype(np.float32))
