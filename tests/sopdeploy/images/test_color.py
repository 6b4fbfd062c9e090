"""Colours a tile at a time are those of the whole picture, and every transparent colour is found."""

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
from sopdeploy.images import color as colours
from sopdeploy.images.color import SIXTEEN_BIT, in_rgb, is_transparent, match_transparency, tile_boxes

FUZZ = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
GREEN = (0, 200, 0)
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 70)) | st.sampled_from([(1, 300), (300, 1), (1, 1)])


def whole_in_rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The same in one piece: every step on the whole picture."""
    if picture.mode in SIXTEEN_BIT:
        values = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray(np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(canvas, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def noise(kind: str, size: tuple[int, int], seed: int) -> Image.Image:
    """A picture whose values are drawn from few, so that a transparent colour is met."""
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
    if mode == "1":
        picture = layers[0].convert("1")
    else:
        picture = layers[0] if mode == "P" else Image.merge(mode, layers)
    if mode in {"P", "PA"}:
        picture.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    if extra:
        picture.info["transparency"] = {
            "index": 170,
            "grey": 255,
            "colour": (85, 0, 170),
            "partial": bytes([0] * 85 + [90] + [255] * 84 + [128]),
        }[extra]
    return picture


KINDS = ["1", "1 grey", "L", "L grey", "LA", "P", "P index", "P partial", "PA", "RGB", "RGB colour", "RGBA"]
KINDS += ["RGBa", "CMYK", *sorted(SIXTEEN_BIT)]


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(
    size=SIZES,
    tile=st.integers(1, 400),
    seed=st.integers(0, 999),
    background=st.sampled_from([GREEN, (255,) * 3]),
)
def test_a_tile_at_a_time_gives_the_pixels_of_the_whole(kind, size, tile, seed, background):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colours, "TILE", tile)
        found = in_rgb(noise(kind, size, seed), background)
        clear = is_transparent(noise(kind, size, seed))
    expected = whole_in_rgb(noise(kind, size, seed), background)
    assert (found.mode, found.size) == ("RGB", size)
    assert found.tobytes() == expected.tobytes()
    picture = noise(kind, size, seed)
    alpha = (
        picture.convert("RGBA").getchannel("A")
        if picture.has_transparency_data
        else Image.new("L", size, 255)
    )
    assert clear == (alpha.getextrema()[0] < 255)


def test_every_16_bit_value_becomes_the_nearest_of_8_bits():
    every = np.arange(65_536, dtype=np.uint16)
    assert np.array_equal(colours.scale_to_8_bits(every), np.rint(every / 257.0))


@FUZZ
@given(
    size=st.tuples(st.integers(1, 300_000), st.integers(1, 300_000)).filter(lambda s: s[0] * s[1] < 3_000_000)
)
def test_boxes_cover_a_picture_once_and_are_never_larger_than_a_tile(size):
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in tile_boxes(size)]
    assert sum(areas) == size[0] * size[1]
    assert max(areas) <= colours.TILE


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, row: bytes, width: int, *extra: bytes) -> bytes:
    """A PNG of one row, made by hand, since Pillow writes not every depth."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
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
GREYS = [(n, n, n) for n in range(256)]

# A row of pixels with a transparent colour in each depth, and what is seen of it on green.
TRANSPARENT = {
    "16-bit grey": (
        png(16, 0, words(1000, 1001, 999, 1257, 65535), 5, trns(1000)),
        [GREEN, GREYS[4], GREYS[4], GREYS[5], GREYS[255]],
    ),
    "16-bit grey, white transparent": (png(16, 0, words(65535, 65534), 2, trns(65535)), [GREEN, GREYS[255]]),
    "8-bit grey": (png(8, 0, bytes([100, 101, 0]), 3, trns(100)), [GREEN, GREYS[101], GREYS[0]]),
    "4-bit grey": (png(4, 0, bytes([0x5F, 0x05]), 4, trns(5)), [GREEN, GREYS[255], GREYS[0], GREEN]),
    "2-bit grey": (png(2, 0, bytes([0b10110100]), 4, trns(2)), [GREEN, GREYS[255], GREYS[85], GREYS[0]]),
    "1-bit grey": (png(1, 0, bytes([0b10000000]), 2, trns(1)), [GREEN, GREYS[0]]),
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
def test_the_transparent_colour_of_a_png_shows_the_background_in_every_depth(kind):
    body, expected = TRANSPARENT[kind]
    picture = open_image(body, Path("a.png"))
    assert list(map(tuple, np.asarray(in_rgb(picture, GREEN))[0])) == expected
    assert is_transparent(picture)


def test_a_png_with_two_headers_is_left_as_it_is():
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    picture = Image.open(io.BytesIO(png(8, 0, words(1, 2, 3), 1, trns(5), second)))
    match_transparency(picture)
    assert picture.info["transparency"] == 5
