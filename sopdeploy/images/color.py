"""Conversion of any image mode to RGB: 16 bits scaled to 8, transparency composited onto a background.

Conversions with intermediate results run in tiles. On the whole image they would need six times the memory of
the RGB image, and a PNG of 100 kB can have 50 megapixels.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L"}
TILE = 2**16  # pixels
GRAY_STEPS = {"L;2": 85, "L;4": 17}  # distance of two gray values of such a PNG, in 8-bit levels


def in_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert *image* to RGB with *background* behind transparent pixels.

    16-bit gray is scaled to 8 bits; Pillow's own conversion would clip it to white.
    """
    image.load()
    if image.mode not in SIXTEEN_BIT and not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for box in tile_boxes(image.size):
        tile = _to_rgba(image.crop(box))
        canvas = Image.new("RGBA", tile.size, (*background, 255))
        rgb.paste(Image.alpha_composite(canvas, tile).convert("RGB"), box)
    return rgb


def is_transparent(image: Image.Image) -> bool:
    """Check whether any pixel of *image* is not opaque."""
    if not image.has_transparency_data:
        return False
    tiles = (_to_rgba(image.crop(box)) for box in tile_boxes(image.size))
    return any(tile.getchannel("A").histogram()[255] < tile.width * tile.height for tile in tiles)


def tile_boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (left, top, right, bottom) boxes of at most `TILE` pixels that cover an image of *size*."""
    width, height = size
    columns = min(width, TILE)
    rows = TILE // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def _to_rgba(tile: Image.Image) -> Image.Image:
    if tile.mode not in SIXTEEN_BIT:
        return tile if tile.mode == "RGBA" else tile.convert("RGBA")
    values = np.asarray(tile)
    clipped: NDArray[np.uint32] = np.clip(values, 0, 65535).astype(np.uint32)
    scaled = ((clipped + np.uint32(128)) // np.uint32(257)).astype(np.uint8)  # nearest; 65535 becomes 255
    gray = Image.fromarray(scaled).convert("RGBA")
    transparent = tile.info.get("transparency")
    if isinstance(transparent, int):  # one of 65536 gray levels: compare before scaling
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def match_transparency(image: Image.Image) -> None:
    """Convert the transparent color of an opened PNG to 8 bits, as its decoded pixels will be.

    Pillow keeps that color at the file's bit depth, which matches no pixel or a wrong one after decoding. Of
    48-bit colors Pillow keeps the upper bytes of the pixels, so these are compared. Decodes nothing.
    """
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or not tiles:
        return
    coding, color = tiles[0][3], image.info.get("transparency")
    if coding in GRAY_STEPS and isinstance(color, int):
        image.info["transparency"] = color * GRAY_STEPS[coding]
    elif coding == "RGB;16B" and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)
