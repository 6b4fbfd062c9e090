"""Photos that an export draws, to compare the pixels of two programs: files as users have them."""

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from sopdeploy.images.pixels import ORIENTATION

_SEED = 7
TURNED = 6  # an orientation of EXIF: turned by a quarter
# Photos by what they are: width and height relative to the side of the network's input, color mode. All have
# the ratio 1 : 2, because programs round the longer side of other ones in different ways.
LARGE, WIDE, TALL, SMALL = "a large photo", "a wide photo", "a tall photo", "a small photo"
EXIF, GRAY, ALPHA, CMYK = (
    *("a photo turned by EXIF", "a gray photo", "a photo with transparency", "a photo in CMYK"),
)
KINDS: dict[str, tuple[float, float, str]] = {
    LARGE: (5.0, 2.5, "RGB"),
    WIDE: (3.0, 1.5, "RGB"),
    TALL: (1.25, 2.5, "RGB"),
    SMALL: (0.75, 0.375, "RGB"),
    EXIF: (2.5, 1.25, "RGB"),
    GRAY: (1.25, 2.5, "L"),
    ALPHA: (2.5, 1.25, "RGBA"),
    CMYK: (2.5, 1.25, "CMYK"),
}
# They differ only in how their size becomes a square, and are the same for every loader
UPRIGHT = (LARGE, WIDE, TALL, SMALL)
_EDGES = 40  # of rectangles, which give a photo sharp edges


@cache
def draw_photo(kind: str, side: int) -> bytes:
    """Draw the file of *kind*, of `KINDS`, for networks with images of *side* pixels, always the same one."""
    return _draw([*KINDS].index(kind), kind, side)


def draw_plain(color: tuple[int, int, int], side: int) -> bytes:
    """Draw a PNG of 2 *side* x 2 *side* pixels of one *color*."""
    return _encoded(Image.new("RGB", (2 * side, 2 * side), color), "PNG")


def _draw(number: int, kind: str, side: int) -> bytes:
    """Draw the photo *number* of *kind*."""
    relative_width, relative_height, mode = KINDS[kind]
    shorter = max(2, round(min(relative_width, relative_height) * side))
    is_wide = relative_width > relative_height
    size = (2 * shorter, shorter) if is_wide else (shorter, 2 * shorter)
    image = _scene(size, np.random.default_rng((_SEED, number)))

    if mode == "RGBA":
        # Transparent at the left, opaque at the right, above a color that nobody sees.
        alpha = np.linspace(0, 255, size[0]).astype(np.uint8)
        image.putalpha(Image.fromarray(np.broadcast_to(alpha, size[::-1]).copy()))
        return _encoded(image, "PNG")
    exif = Image.Exif()
    if kind == EXIF:
        exif[ORIENTATION] = TURNED
    return _encoded(image.convert(mode), "JPEG", quality=92, exif=exif)


def _scene(size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """Draw something like a photo of *size*: noise whose power falls with its frequency, and sharp edges."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.float32)

    # Octaves of enlarged noise. The finest cells have the size of a pixel.
    cell = 1
    amplitude = 12.0
    while cell < max(size):
        cells = (height // cell + 2, width // cell + 2, 3)
        coarse = random.integers(0, 256, cells, dtype=np.uint8)
        octave = Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)
        pixels += (np.asarray(octave, np.float32) - 127.5) * (amplitude / 74)
        cell *= 2
        amplitude *= 1.3

    for _ in range(_EDGES):
        left, top = random.integers(0, (width, height))
        box = (slice(top, top + height // 8 + 1), slice(left, left + width // 8 + 1))
        pixels[box] += random.uniform(-60, 60, 3).astype(np.float32)
    return Image.fromarray((pixels + 127.5).clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
