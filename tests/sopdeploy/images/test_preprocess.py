"""Preprocessing of images against torchvision, for every color mode and EXIF orientation."""

import io
import struct
import time
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from sopdeploy.images.preprocess import Preprocess, to_rgb

FUZZ = settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
PILLOW_MAY_WARN = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
WHOLE = Preprocess(resize=8, crop=8)  # of an 8 x 8 image nothing is resized or cropped
GREEN_BACKGROUND = Preprocess(resize=8, crop=8, background=(0, 200, 0))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def from_torchvision(image: Image.Image, rules: Preprocess) -> NDArray[np.uint8]:
    resized = resize(image, rules.resize, MODES[rules.interpolation])
    return np.asarray(center_crop(resized, [rules.crop, rules.crop]))


# On long strips Pillow may resize vertically first; bicubic overshoot is clipped in between.
OVERSHOOT = {"bilinear": 2, "bicubic": 40}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@FUZZ
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
    found = rules(image)
    expected = from_torchvision(image, rules)
    assert found.shape == expected.shape
    if max(size) <= 15 * min(size):
        assert np.array_equal(found, expected)
    assert np.abs(found.astype(int) - expected).max() <= OVERSHOOT[interpolation]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (257, 256), (256, 256), (31, 700)])
def test_photographs_equal_torchvision_pixel_for_pixel(size: tuple[int, int]) -> None:
    rules, image = Preprocess(), noise(*size)
    if size == (31, 700):  # longer than any photograph: only the part that the crop shows is computed
        assert np.abs(rules(image).astype(int) - from_torchvision(image, rules)).max() <= 2
    else:
        assert np.array_equal(rules(image), from_torchvision(image, rules))


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def reopened(image: Image.Image, **options: Any) -> Image.Image:
    """Save *image* as PNG and open it again."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(file)


TRANSLUCENT = halves("RGBA", (100, 100, 100, 255), (255, 0, 0, 0))
PALETTE = halves("P", 1, 0)
PALETTE.putpalette([9, 9, 9, 40, 50, 60])
# Expected colors of the left and the right half on a green background.
COLORS = {
    "RGBA": (TRANSLUCENT, (100, 100, 100), (0, 200, 0)),
    "LA": (TRANSLUCENT.convert("LA"), (100, 100, 100), (0, 200, 0)),
    "PA": (TRANSLUCENT.quantize(2), (100, 100, 100), (0, 200, 0)),
    "half transparent": (Image.new("RGBA", (8, 8), (200, 0, 0, 128)), (100, 100, 0), (100, 100, 0)),
    "palette with a transparent color": (reopened(PALETTE, transparency=0), (40, 50, 60), (0, 200, 0)),
    "one bit": (halves("1", 0, 1), (0, 0, 0), (255, 255, 255)),
    "CMYK": (halves("CMYK", (0, 255, 255, 0), (255, 0, 0, 0)), (255, 0, 0), (0, 255, 255)),
    "gray": (Image.new("L", (8, 8), 77), (77, 77, 77), (77, 77, 77)),
}


@pytest.mark.parametrize(("image", "left", "right"), COLORS.values(), ids=COLORS)
def test_every_color_mode_becomes_rgb_on_the_background(
    image: Image.Image, left: tuple[int, int, int], right: tuple[int, int, int]
) -> None:
    pixels = GREEN_BACKGROUND(image)
    assert np.abs(pixels[4, 1].astype(int) - left).max() <= 1
    assert np.abs(pixels[4, 6].astype(int) - right).max() <= 1


def test_sixteen_bit_gray_is_scaled_and_not_clipped() -> None:
    image = reopened(Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)))
    assert image.mode.startswith("I")
    pixels = WHOLE(image)
    expected = np.rint(np.linspace(0, 255, 64).reshape(8, 8))
    assert np.abs(pixels[..., 0].astype(int) - expected).max() <= 1
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def corners() -> Image.Image:
    """Black with one red pixel block at the top left and a green one at the top right."""
    image = Image.new("RGB", (8, 8))
    image.paste((255, 0, 0), (0, 0, 3, 3))
    image.paste((0, 255, 0), (5, 0, 8, 3))
    return image


UNDO = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),  # the viewer turns it clockwise, so it was turned counter-clockwise
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


def stored(orientation: int, image: Image.Image) -> Image.Image:
    """Store *image* like a camera that writes *orientation*."""
    for turn in UNDO[orientation]:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return reopened(image, exif=exif)


@pytest.mark.parametrize("orientation", UNDO)
def test_every_exif_orientation_is_made_upright(orientation: int) -> None:
    assert np.array_equal(WHOLE(stored(orientation, corners())), np.asarray(corners()))


def test_the_exif_orientation_can_be_ignored() -> None:
    image = stored(6, corners())
    rules = Preprocess(resize=8, crop=8, exif_orientation=False)
    assert np.array_equal(rules(image), np.asarray(image.convert("RGB")))


def test_a_rotated_image_is_resized_by_its_upright_sides() -> None:
    tall = noise(40, 60)
    rules = Preprocess(resize=20, crop=16)
    assert np.array_equal(rules(stored(6, tall)), rules(tall))


def with_exif(body: bytes) -> Image.Image:
    file = io.BytesIO()
    corners().save(file, "JPEG", exif=b"Exif\0\0" + body)
    return Image.open(file)


TIFF = b"II*\0\x08\0\0\0"
BAD_EXIF = {
    "no TIFF header": b"not a header at all",
    "cut after the header": TIFF,
    "a directory beyond the end": b"II*\0\xff\xff\xff\x7f",
    "more entries than there are": TIFF + b"\xff\xff" + struct.pack("<HHII", 0x010F, 3, 1, 6),
    "orientation as text": TIFF + b"\x01\0" + struct.pack("<HHI4s", 0x0112, 2, 4, b"six\0") + bytes(4),
    "orientation of nine": TIFF + b"\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 9) + bytes(4),
    "orientation of no values": TIFF + b"\x01\0" + struct.pack("<HHII", 0x0112, 3, 0, 6) + bytes(4),
    "orientation as a fraction of nothing": TIFF
    + b"\x01\0"
    + struct.pack("<HHII", 0x0112, 5, 1, 26)
    + bytes(4)
    + struct.pack("<II", 1, 0),
}


@PILLOW_MAY_WARN
@pytest.mark.parametrize("exif", BAD_EXIF.values(), ids=BAD_EXIF)
def test_an_image_with_damaged_exif_data_is_not_rotated(exif: bytes) -> None:
    image = with_exif(exif)
    plain = np.asarray(image.convert("RGB"))
    assert np.array_equal(WHOLE(image), plain)


@PILLOW_MAY_WARN
@FUZZ
@given(
    entries=st.lists(
        st.tuples(
            st.sampled_from([0x0112, 0x8769, 0x8825, 0xA005, 0x927C, 0x011A, 0x010F, 0xEA1C, 0x02BC]),
            st.integers(0, 14),
            st.sampled_from([0, 1, 2, 3, 4, 100, 2**31, 2**32 - 1]),
            st.sampled_from([0, 1, 6, 8, 26, 2**16, 2**32 - 1]),
        ),
        max_size=5,
    ),
    rest=st.binary(max_size=60),
)
def test_any_exif_data_is_accepted(entries: list[tuple[int, int, int, int]], rest: bytes) -> None:
    turn = struct.pack("<HHII", 0x0112, 3, 1, 6)
    directory = (
        struct.pack("<H", len(entries) + 1) + turn + b"".join(struct.pack("<HHII", *e) for e in entries)
    )
    image = with_exif(TIFF + directory + bytes(4) + rest)
    assert to_rgb(image, WHOLE).size == (8, 8)
    assert WHOLE(image).shape == (8, 8, 3)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 15_000)])
def test_a_strip_costs_no_more_than_a_photograph(size: tuple[int, int]) -> None:
    started = time.thread_time()
    pixels = Preprocess()(noise(*size))
    assert pixels.shape == (224, 224, 3)
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize("size", [(50, 40), (1, 1), (8, 300)])
def test_the_result_is_a_contiguous_rgb_array(size: tuple[int, int]) -> None:
    pixels = Preprocess(resize=18, crop=16)(noise(*size))
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert pixels.flags.c_contiguous


REFUSED = {
    "crop larger than resize": ({"resize": 100, "crop": 101}, r"crop \(101\) is larger than resize \(100\)"),
    "no pixels": ({"crop": 0}, "crop"),
    "too many pixels": ({"resize": 4097}, "resize"),
    "a standard deviation of zero": ({"std": (0.2, 0.0, 0.2)}, "std"),
    "a mean that is no number": ({"mean": (0.1, float("nan"), 0.2)}, "mean"),
    "an unknown interpolation": ({"interpolation": "nearest"}, "interpolation"),
    "a background beyond white": ({"background": (0, 256, 0)}, "background"),
    "an unknown key": ({"rezise": 3}, "rezise"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_preprocessing_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        Preprocess(**values)
