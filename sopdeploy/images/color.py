"""A picture of any colour mode in RGB: 16 bits scaled to 8, transparency laid onto a background.

What needs steps in between is done a tile at a time. Whole, those steps would hold six times the memory of
the RGB picture, and a PNG of 100 kB can have 50 megapixels.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L"}
TILE = 2**16  # pixels
LEVELS = {"L;2": 85, "L;4": 17}  # grey levels between two values of such a PNG

Box = tuple[int, int, int, int]  # left, top, right, bottom


def in_rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return *picture* in RGB, *background* behind what is transparent.

    16-bit grey is scaled to 8 bits; Pillow's own conversion would clip it to white.
    """
    picture.load()
    if picture.mode not in SIXTEEN_BIT and not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    whole = Image.new("RGB", picture.size)
    for box in boxes(picture.size):
        tile = translucent(picture.crop(box))
        canvas = Image.new("RGBA", tile.size, (*background, 255))
        whole.paste(Image.alpha_composite(canvas, tile).convert("RGB"), box)
    return whole


def is_transparent(picture: Image.Image) -> bool:
    """Say whether any pixel of *picture* is not opaque."""
    if not picture.has_transparency_data:
        return False
    tiles = (translucent(picture.crop(box)) for box in boxes(picture.size))
    return any(tile.getchannel("A").histogram()[255] < tile.width * tile.height for tile in tiles)


def boxes(size: tuple[int, int]) -> Iterator[Box]:
    """Yield boxes of at most `TILE` pixels that cover a picture of *size*, be it one pixel high."""
    width, height = size
    columns = min(width, TILE)
    rows = TILE // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def translucent(tile: Image.Image) -> Image.Image:
    """Return *tile* in RGBA."""
    if tile.mode not in SIXTEEN_BIT:
        return tile if tile.mode == "RGBA" else tile.convert("RGBA")
    values = np.asarray(tile)
    grey = Image.fromarray(scaled_to_8_bits(values)).convert("RGBA")
    clear = tile.info.get("transparency")
    if isinstance(clear, int):  # one of 65536 greys: to be found before they are scaled
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def scaled_to_8_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return 16-bit *values* of any integer type as 8 bits, rounded to the nearest: 65535 becomes 255."""
    sixteen: NDArray[np.uint32] = np.clip(values, 0, 65535).astype(np.uint32)
    return ((sixteen + np.uint32(128)) // np.uint32(257)).astype(np.uint8)


def match_transparency(picture: Image.Image) -> None:
    """Bring the transparent colour of an opened PNG to 8 bits, as its pixels will be.

    Pillow leaves it in the depth of the file, in which no pixel, or a wrong one, is found after decoding.
    Of 48-bit colours Pillow keeps the upper bytes, so those decide. Nothing is decoded.
    """
    tiles = getattr(picture, "tile", None)
    if picture.format != "PNG" or not tiles:
        return
    coding, clear = tiles[0][3], picture.info.get("transparency")
    if coding in LEVELS and isinstance(clear, int):
        picture.info["transparency"] = clear * LEVELS[coding]
    elif coding == "RGB;16B" and isinstance(clear, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
