"""Preprocessing against torchvision and whole-image conversion; formats of training and of the server."""

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from sopdeploy.data.photos.photo import Photo
from sopdeploy.errors import ConfigError, DataError, ImageError
from sopdeploy.images import formats, pixels
from sopdeploy.images.decode import decode
from sopdeploy.images.formats import open_image
from sopdeploy.images.pixels import SIXTEEN_BIT, TURNS, list_changes, preprocess_image, to_rgb
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.settings import Settings
from tests.support.counted import record_images
from tests.support.pictures import chunk, encoded

FUZZ = settings(max_examples=25)
PILLOW_MAY_WARN = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
GREEN = (0, 200, 0)
# Of an 8 x 8 image nothing is resized or cropped
WHOLE = Preprocess(resize=8, crop=8, background=GREEN)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def from_torchvision(image: Image.Image, rules: Preprocess) -> NDArray[np.uint8]:
    resized = resize(image, rules.resize, MODES[rules.interpolation])
    return np.asarray(center_crop(resized, [rules.crop, rules.crop]))


# On long strips Pillow may resize vertically first; bicubic overshoot is clipped in between.
OVERSHOOT = {"bilinear": 2, "bicubic": 40}


@pytest.mark.parametrize("interpolation", MODES)
@settings(FUZZ, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    sides=st.tuples(st.integers(1, 60), st.integers(0, 30)),
    seed=st.integers(0, 1000),
)
def test_pixels_equal_torchvision(
    interpolation: str, size: tuple[int, int], sides: tuple[int, int], seed: int
) -> None:
    crop, margin = sides
    rules = Preprocess(resize=crop + margin, crop=crop, interpolation=interpolation)
    image = noise(*size, seed)
    found = preprocess_image(image, rules)
    expected = from_torchvision(image, rules)

    assert found.shape == (crop, crop, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous is True

    if max(size) <= 15 * min(size):
        assert np.array_equal(found, expected)
    assert np.abs(found.astype(int) - expected).max() <= OVERSHOOT[interpolation]


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 15_000)])
def test_of_a_strip_only_the_cropped_part_is_resized(
    size: tuple[int, int], monkeypatch: Any
) -> None:
    strip = noise(*size)
    sizes = record_images(monkeypatch)

    assert preprocess_image(strip, Preprocess()).shape == (224, 224, 3)
    assert sizes == [(224, 224)]


def reopened(image: Image.Image, **options: Any) -> Image.Image:
    """Save *image* as PNG and open it again."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(file)


def test_every_sixteen_bit_value_is_rounded_to_eight_bits() -> None:
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for image in (Image.fromarray(values), reopened(Image.fromarray(values))):
        assert image.mode in SIXTEEN_BIT
        assert np.array_equal(np.asarray(to_rgb(image, WHOLE))[..., 0], np.rint(values / 257.0))
        assert list_changes(image, WHOLE) == ("sixteen_bit_scaled",)


# Black, with a red block at the top left, a green one at the top right
CORNERS = Image.new("RGB", (8, 8))
CORNERS.paste((255, 0, 0), (0, 0, 3, 3))
CORNERS.paste((0, 255, 0), (5, 0, 8, 3))
# A viewer turns orientation 6 clockwise, so it was turned counter-clockwise.
T = Image.Transpose
UNDO = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
UNDO |= {6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


def stored(orientation: int, image: Image.Image) -> Image.Image:
    """Store *image* like a camera that writes *orientation*."""
    if orientation in UNDO:
        image = image.transpose(UNDO[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return reopened(image, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_made_upright(orientation: int) -> None:
    image = stored(orientation, CORNERS)
    assert np.array_equal(preprocess_image(image, WHOLE), np.asarray(CORNERS))
    assert list_changes(image, WHOLE) == (("exif_rotated",) if orientation > 1 else ())

    ignoring = WHOLE.model_copy(update={"exif_orientation": False})
    assert np.array_equal(preprocess_image(image, ignoring), np.asarray(image.convert("RGB")))
    assert list_changes(image, ignoring) == ()

    tall, rules = noise(40, 60), Preprocess(resize=20, crop=16)  # resized by its upright sides
    assert np.array_equal(
        preprocess_image(stored(orientation, tall), rules), preprocess_image(tall, rules)
    )


def with_exif(body: bytes) -> Image.Image:
    file = io.BytesIO()
    CORNERS.save(file, "JPEG", exif=b"Exif\0\0" + body)
    return Image.open(file)


TIFF = b"II*\0\x08\0\0\0"


def entry(kind: int, count: int, value: int) -> bytes:
    """Make a directory of one entry: the orientation."""
    return TIFF + struct.pack("<HHHIII", 1, 0x0112, kind, count, value, 0)


BAD_EXIF = {
    "no TIFF header": b"not a header at all",
    "a directory beyond the end": b"II*\0\xff\xff\xff\x7f",
    "orientation as text": entry(2, 4, int.from_bytes(b"six\0", "little")),
    "orientation of nine": entry(3, 1, 9),
}


def test_no_warning_of_pillow_reaches_a_user() -> None:
    file = io.BytesIO()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01"  # five tags, of which two bytes are there
    Image.new("RGB", (16, 16)).save(file, "JPEG", exif=exif)
    code = "import sys; from sopdeploy.images.formats import *; open_image(sys.stdin.buffer.read())"
    command = [sys.executable, "-W", "always::UserWarning", "-c", code]
    done = subprocess.run(command, input=file.getvalue(), capture_output=True, check=True)

    assert done.stderr == b""


@PILLOW_MAY_WARN
@pytest.mark.parametrize("exif", BAD_EXIF.values(), ids=BAD_EXIF)
def test_an_image_with_damaged_exif_data_is_not_rotated(exif: bytes) -> None:
    image = with_exif(exif)
    assert np.array_equal(preprocess_image(image, WHOLE), np.asarray(image.convert("RGB")))


SIZES = st.tuples(st.integers(1, 70), st.integers(1, 70)) | st.sampled_from(
    [(1, 300), (300, 1), (1, 1)]
)


def few_values(kind: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Make an image with few different values, so that it contains the transparent color."""
    rng = np.random.default_rng(seed)
    mode, _, extra = kind.partition(" ")

    if mode in SIXTEEN_BIT:
        low, high = (-70_000, 140_000) if mode == "I" else (0, 65_536)
        values = rng.integers(low, high, (size[1], size[0]))
        depth = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
        return Image.frombytes(mode, size, values.astype(depth).tobytes())

    bands = len(Image.new(mode, (1, 1)).getbands())
    layers = list(
        map(Image.fromarray, rng.integers(0, 4, (bands, *size[::-1]), dtype=np.uint8) * 85)
    )
    image = layers[0] if mode in {"1", "P"} else Image.merge(mode, layers)
    if mode == "1":
        image = image.convert("1")
    if mode in {"P", "PA"}:
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())

    if extra:
        partial = bytes([0] * 85 + [90] + [255] * 84 + [128])
        colors = {"index": 170, "gray": 255, "color": (85, 0, 170), "partial": partial}
        image.info["transparency"] = colors[extra]
    return image


KINDS = [
    "1",
    "1 gray",
    "L",
    "L gray",
    "LA",
    "P",
    "P index",
    "P partial",
    "PA",
    "RGB",
    "RGB color",
    "RGBA",
]
KINDS += ["RGBa", "CMYK", *sorted(SIXTEEN_BIT)]


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(SIZES, st.integers(1, 400), st.integers(0, 999), st.sampled_from([GREEN, (255,) * 3]))
def test_tiled_conversion_equals_conversion_of_the_whole_image(
    kind: str, size: tuple[int, int], tile: int, seed: int, background: tuple[int, int, int]
) -> None:
    rules = Preprocess(background=background)
    image = few_values(kind, size, seed)
    whole = to_rgb(few_values(kind, size, seed), rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "TILE", tile)
        found = to_rgb(few_values(kind, size, seed), rules)
        changes = list_changes(image, rules)

    assert found.mode == "RGB"
    assert found.size == size
    assert found.tobytes() == whole.tobytes()
    clear = (
        image.has_transparency_data
        and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    )

    assert ("alpha_flattened" in changes) == clear


def test_gray_with_premultiplied_transparency_is_converted_as_without() -> None:
    rules = Preprocess(background=GREEN)
    image = few_values("LA", (9, 7), 1).convert("La")

    assert to_rgb(image, rules).tobytes() == to_rgb(image.convert("LA"), rules).tobytes()
    assert list_changes(image, rules) == list_changes(image.convert("LA"), rules)


def png(depth: int, color: int, row: bytes, width: int, *extra: bytes) -> bytes:
    """Make a PNG of one row; Pillow does not write every depth."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *extra, data, chunk(b"IEND", b"")])


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", words(*values))


RED_BLUE_GRAY = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255, 9, 9, 9]))
GRAYS = [(n, n, n) for n in range(256)]

# A row of pixels with a transparent color at each depth, and its pixels on a green background.
TRANSPARENT = {
    "16-bit gray": (
        png(16, 0, words(1000, 1001, 999, 1257, 65535), 5, trns(1000)),
        [GREEN, GRAYS[4], GRAYS[4], GRAYS[5], GRAYS[255]],
    ),
    "8-bit gray": (
        png(8, 0, bytes([100, 101, 0]), 3, trns(100)),
        [GREEN, GRAYS[101], GRAYS[0]],
    ),
    "1-bit gray": (png(1, 0, bytes([0b10000000]), 2, trns(1)), [GREEN, GRAYS[0]]),
    "16-bit RGB": (
        png(16, 2, words(1000, 2000, 3000, 1000, 2000, 9000), 2, trns(1000, 2000, 3000)),
        [GREEN, (3, 7, 35)],
    ),
    "palette, half transparent": (
        png(8, 3, bytes([0, 1, 2]), 3, RED_BLUE_GRAY, chunk(b"tRNS", bytes([128, 0]))),
        [(128, 100, 0), GREEN, (9, 9, 9)],
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_the_transparent_color_of_a_png_is_found_at_every_depth(kind):
    body, expected = TRANSPARENT[kind]
    image = open_image(body)

    assert list(map(tuple, np.asarray(to_rgb(image, WHOLE))[0])) == expected
    assert "alpha_flattened" in list_changes(image, WHOLE)


def gif_with_frame(left: int, top: int, **options: Any) -> bytes:
    """Write a red frame of 4 x 3 at (left, top) of a canvas of 9 x 8; green is first in the palette."""
    frame = Image.new("P", (4, 3), 1)
    frame.putpalette([0, 255, 0, 255, 0, 0, 0, 0, 255])
    frame.putpixel((0, 0), 2)
    body = bytearray(encoded(frame, "GIF", optimize=False, **options))
    # The size of the canvas, then the position of the frame
    body[6:10] = struct.pack("<2H", 9, 8)
    separator = body.index(b",")
    body[separator + 1 : separator + 5] = struct.pack("<2H", left, top)
    return bytes(body)


# Of a GIF, and how its canvas is turned
FRAMES = {
    "in a corner": (gif_with_frame(0, 0), 1),
    "inside": (gif_with_frame(3, 4), 1),
    "turned": (gif_with_frame(2, 5), 6),
    "one color transparent": (gif_with_frame(3, 4, transparency=2), 1),
}


@pytest.mark.parametrize("case", FRAMES)
def test_around_a_first_frame_smaller_than_its_canvas_is_the_background(case):
    body, orientation = FRAMES[case]
    image = open_image(body)
    rules = WHOLE.model_copy(update={"exif_orientation": True})
    left, top, right, bottom = image.tile[0][1]
    image.info["xmp"] = f'tiff:Orientation="{orientation}"'.encode()
    expected = Image.new("RGB", (9, 8), GREEN)
    expected.paste((255, 0, 0), (left, top, right, bottom))
    expected.putpixel((left, top), GREEN if "transparent" in case else (0, 0, 255))
    if orientation != 1:
        expected = expected.transpose(TURNS[orientation])

    assert to_rgb(image, rules).tobytes() == expected.tobytes()
    assert "alpha_flattened" in list_changes(image, rules)


RULES = Preprocess(resize=36, crop=32)


def gradient(width: int = 90, height: int = 60) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 4 % 256, columns * 2 % 256, (rows + columns) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF"])
def test_a_turned_photograph_of_any_format_is_upright(kind: str) -> None:
    upright = Image.new("RGB", (64, 128))
    upright.paste((250, 250, 250), (0, 0, 64, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    body = encoded(upright.transpose(UNDO[6]), kind, exif=exif.tobytes())
    found = decode(body, RULES, max_bytes=10**6, max_pixels=10**6)

    assert found.pixels[:12].mean() > 240
    assert found.pixels[-12:].mean() < 15


def test_one_set_of_limits_holds_for_training_and_server() -> None:
    assert Settings().max_body_bytes == formats.MAX_BYTES
    assert Settings().max_pixels == formats.MAX_PIXELS
    with pytest.raises(DataError, match="20000000 bytes"):
        Photo("photo", b"\xff\xd8\xff" + bytes(20_000_000)).preprocess(RULES)


def test_the_error_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encoded(gradient(), "HEIF")
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)

    with pytest.raises(DataError, match=r"\.\[heif\]"):
        Photo("photo", body).preprocess(RULES)
    with pytest.raises(ImageError, match="needs pillow-heif") as caught:
        formats.open_image(body)
    assert (caught.value.code, caught.value.status) == ("unsupported_format", 415)


def test_a_format_without_its_decoder_is_not_recommended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for extra, is_named in (("", True), ("heif", False)):
        monkeypatch.setattr(
            formats, "missing_extra", lambda name, extra=extra: extra if name == "heic" else ""
        )

        with pytest.raises(ImageError) as caught:
            formats.open_image(b"text")
        assert ("HEIC" in str(caught.value)) == is_named


GRAY_RULES: dict[str, dict[str, Any]] = {
    "lists of one value": {"mean": [0.5], "std": [0.25]},
    "numbers": {"mean": 0.5, "std": 0.25},
    "three equal values": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


@pytest.mark.parametrize("case", GRAY_RULES)
def test_rules_have_one_mean_and_one_deviation_per_channel(case: str) -> None:
    for channels in (1, 3):
        rules = Preprocess(channels=channels, crop=28, **GRAY_RULES[case])

        assert (rules.mean, rules.std) == ((0.5,) * channels, (0.25,) * channels)
        assert Preprocess.model_validate_json(rules.model_dump_json()) == rules
        assert rules.in_gray().channels == 1
        assert ("channels" in rules.model_dump()) == (channels == 1)  # as before 0.4


WRONG_COLORS: dict[str, dict[str, Any]] = {
    "the default values of RGB for gray images": {"channels": 1},
    "one mean, but three deviations": {"channels": 1, "mean": [0.5]},
    "two values": {"mean": [0.5, 0.5]},
    "no value": {"mean": []},
    "a deviation of 0": {"std": 0},
    "two channels": {"channels": 2},
}


@pytest.mark.parametrize("case", WRONG_COLORS)
def test_values_of_other_channels_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"mean|std|channels"):
        Preprocess(**WRONG_COLORS[case])


def test_rules_of_rgb_do_not_become_those_of_gray_images() -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocess().in_gray()
    assert caught.value.setting == "preprocess"


PUBLISHED: dict[str, tuple[Any, Preprocess]] = {
    "timm, gray": (
        Preprocess.from_timm(
            {"input_size": (1, 96, 96), "crop_mode": "border", "mean": (0.5,), "std": (0.2,)}
        ),
        Preprocess(
            resize=96, crop=96, fit="pad", channels=1, mean=0.5, std=0.2, background=(128,) * 3
        ),
    ),
    "timm": (
        Preprocess.from_timm(
            {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic"}
        ),
        Preprocess(resize=248, crop=224, interpolation="bicubic"),
    ),
    "timm, squashed": (
        Preprocess.from_timm(
            {"input_size": (3, 96, 96), "crop_pct": 1.0, "crop_mode": "squash"}
        ),
        Preprocess(resize=96, crop=96, fit="squash"),
    ),
    "timm, padded with the mean color": (
        Preprocess.from_timm(
            {"input_size": (3, 96, 96), "crop_mode": "border", "mean": (0.5, 0.4, 0.0)}
        ),
        Preprocess(
            resize=96, crop=96, fit="pad", mean=(0.5, 0.4, 0.0), background=(128, 102, 0)
        ),
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_preprocessing_is_converted(case: str) -> None:
    found, expected = PUBLISHED[case]
    assert found == expected


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_a_crop_after_squashing_or_padding_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=f"crop_mode '{mode}'"):
        Preprocess.from_timm({"crop_mode": mode, "crop_pct": 0.9})


def test_preprocessing_of_torchvision_is_converted() -> None:
    models = pytest.importorskip("torchvision.models")
    found = Preprocess.from_torchvision(models.ResNet50_Weights.IMAGENET1K_V2.transforms())

    assert found.resize == 232
    assert found.crop == 224
    assert found.interpolation == "bilinear"
    with pytest.raises(ConfigError, match=r"Compose"):
        Preprocess.from_torchvision(torch.nn.Identity())
