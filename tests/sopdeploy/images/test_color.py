"""Conversion of every color mode to RGB in tiles, and transparent colors of PNG files."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sopdeploy.data.image_files import open_image
from sopdeploy.images import color as colors
from sopdeploy.images.color import SIXTEEN_BIT, in_rgb, is_transparent, match_transparency, tile_boxes

FUZZ = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
GREEN = (0, 200, 0)
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 70)) | st.sampled_from([(1, 300), (300, 1), (1, 1)])


def whole_in_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert the whole image at once."""
    if image.mode in SIXTEEN_BIT:
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def noise(kind: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Make an image with few different values, so that it contains the transparent color."""
    rng = np.random.default_rng(seed)
    mode, _, extra = kind.partition(" ")
    if mode in SIXTEEN_BIT:
        low, high = (-70_000, 140_000) if mode == "I" else (0, 65_536)
        values = rng.integers(low, high, (size[1], size[0]))
        depth = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
        return Image.frombytes(mode, size, values.astype(depth).tobytes())
    bands = len(Image.new(mode, (1, 1)).getbands())
    layers = [
        Image.fromarray(layer) for layer in rng.integers(0, 4, (bands, *size[::-1]), dtype=np.uint8) * 85
    ]
    image = layers[0] if mode in {"1", "P"} else Image.merge(mode, layers)
    if mode == "1":
        image = image.convert("1")
    if mode in {"P", "PA"}:
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    if extra:
        image.info["transparency"] = {
            "index": 170,
            "gray": 255,
            "color": (85, 0, 170),
            "partial": bytes([0] * 85 + [90] + [255] * 84 + [128]),
        }[extra]
    return image


KINDS = ["1", "1 gray", "L", "L gray", "LA", "P", "P index", "P partial", "PA", "RGB", "RGB color", "RGBA"]
KINDS += ["RGBa", "CMYK", *sorted(SIXTEEN_BIT)]


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(
    size=SIZES,
    tile=st.integers(1, 400),
    seed=st.integers(0, 999),
    background=st.sampled_from([GREEN, (255,) * 3]),
)
def test_tiled_conversion_equals_conversion_of_the_whole_image(kind, size, tile, seed, background):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colors, "TILE", tile)
        found = in_rgb(noise(kind, size, seed), background)
        clear = is_transparent(noise(kind, size, seed))
    expected = whole_in_rgb(noise(kind, size, seed), background)
    assert (found.mode, found.size) == ("RGB", size)
    assert found.tobytes() == expected.tobytes()
    image = noise(kind, size, seed)
    alpha = (
        image.convert("RGBA").getchannel("A") if image.has_transparency_data else Image.new("L", size, 255)
    )
    assert clear == (alpha.getextrema()[0] < 255)


def test_every_16_bit_value_is_rounded_to_8_bits():
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(in_rgb(Image.fromarray(values), GREEN))[..., 0], np.rint(values / 257.0))


@FUZZ
@given(
    size=st.tuples(st.integers(1, 300_000), st.integers(1, 300_000)).filter(lambda s: s[0] * s[1] < 3_000_000)
)
def test_tile_boxes_cover_an_image_once_within_the_tile_size(size):
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in tile_boxes(size)]
    assert sum(areas) == size[0] * size[1]
    assert max(areas) <= colors.TILE


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, color: int, row: bytes, width: int, *extra: bytes) -> bytes:
    """Make a PNG of one row; Pillow does not write every depth."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", words(*values))


PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255, 9, 9, 9]))
GRAYS = [(n, n, n) for n in range(256)]

# A row of pixels with a transparent color at each depth, and its pixels on a green background.
TRANSPARENT = {
    "16-bit gray": (
        png(16, 0, words(1000, 1001, 999, 1257, 65535), 5, trns(1000)),
        [GREEN, GRAYS[4], GRAYS[4], GRAYS[5], GRAYS[255]],
    ),
    "16-bit gray, white transparent": (png(16, 0, words(65535, 65534), 2, trns(65535)), [GREEN, GRAYS[255]]),
    "8-bit gray": (png(8, 0, bytes([100, 101, 0]), 3, trns(100)), [GREEN, GRAYS[101], GRAYS[0]]),
    "4-bit gray": (png(4, 0, bytes([0x5F, 0x05]), 4, trns(5)), [GREEN, GRAYS[255], GRAYS[0], GREEN]),
    "2-bit gray": (png(2, 0, bytes([0b10110100]), 4, trns(2)), [GREEN, GRAYS[255], GRAYS[85], GRAYS[0]]),
    "1-bit gray": (png(1, 0, bytes([0b10000000]), 2, trns(1)), [GREEN, GRAYS[0]]),
    "8-bit RGB": (png(8, 2, bytes([1, 2, 3, 1, 2, 4]), 2, trns(1, 2, 3)), [GREEN, (1, 2, 4)]),
    "16-bit RGB": (
        png(16, 2, words(1000, 2000, 3000, 1000, 2000, 9000), 2, trns(1000, 2000, 3000)),
        [GREEN, (3, 7, 35)],
    ),
    "palette, half transparent": (
        png(8, 3, bytes([0, 1, 2]), 3, PALETTE, chunk(b"tRNS", bytes([128, 0]))),
        [(128, 100, 0), GREEN, (9, 9, 9)],
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_the_transparent_color_of_a_png_is_found_at_every_depth(kind):
    body, expected = TRANSPARENT[kind]
    image = open_image(body, Path("a.png"))
    assert list(map(tuple, np.asarray(in_rgb(image, GREEN))[0])) == expected
    assert is_transparent(image)


def test_a_png_with_two_headers_is_left_unchanged():
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    image = Image.open(io.BytesIO(png(8, 0, words(1, 2, 3), 1, trns(5), second)))
    match_transparency(image)
    assert image.info["transparency"] == 5
