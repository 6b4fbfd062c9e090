"""Which images are accepted, that they become the right pixels, and truncated JPEGs."""

import io
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode, is_truncated
from tests.pictures import encoded

RULES = Preprocess(resize=36, crop=32)
ROWS, COLUMNS = np.mgrid[0:60, 0:90]

# Every pixel has another color.
GRADIENT = Image.fromarray(np.stack([ROWS * 4, COLUMNS * 2, 255 - ROWS - COLUMNS], axis=-1).astype(np.uint8))


def pixels_of(body: bytes) -> NDArray[np.uint8]:
    return decode(EncodedImage(body), RULES, max_bytes=1_000_000, max_pixels=1_000_000).pixels


@pytest.mark.parametrize(
    ("kind", "options", "difference"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("JPEG", {"quality": 95}, 8),
        ("JPEG", {"quality": 95, "progressive": True}, 8),
        ("WEBP", {"quality": 95}, 8),
        ("GIF", {}, 8),
        ("HEIF", {"quality": 95}, 8),
    ],
)
def test_every_accepted_format_gives_the_same_image(
    kind: str, options: dict[str, int], difference: int
) -> None:
    found = pixels_of(encoded(GRADIENT, kind, **options)).astype(int)
    assert np.abs(found - preprocess_image(GRADIENT, RULES)).mean() <= difference


FAR_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\xff\xff\xff\xff"  # points nowhere
DAMAGED = [{"exif": b"Exif\0\0garbage"}, {"exif": FAR_EXIF}, {"icc_profile": b"garbage" * 20}]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("options", DAMAGED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_metadata_and_trailing_bytes_are_ignored(kind: str, options: dict[str, bytes]) -> None:
    found = pixels_of(encoded(GRADIENT, kind, quality=95, **options) + bytes(1000))
    np.testing.assert_array_equal(found, pixels_of(encoded(GRADIENT, kind, quality=95)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_decoded(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in [(250, 0, 0), (0, 0, 250)]]
    found = pixels_of(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert found[..., 0].mean() > 200
    assert found[..., 2].mean() < 50


FUZZ = settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
LIMITS = {"max_bytes": 10**6, "max_pixels": 10**6}
FRAMES = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")
END = b"\xff\xd9"

VARIANTS = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "restart markers per block": ("RGB", {"restart_marker_blocks": 1}),
    "gray": ("L", {}),
    "CMYK": ("CMYK", {}),
}


def encode_jpeg(image: Image.Image, variant: str, quality: int = 80) -> bytes:
    mode, options = VARIANTS[variant]
    return encoded(image.convert(mode), "JPEG", quality=quality, **options)


def noise_image(size: tuple[int, int] = (160, 96)) -> Image.Image:
    grid = np.random.default_rng(0).normal(128, 90, (24, 40)).clip(0, 255).astype(np.uint8)
    noise = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
    return Image.merge(
        "RGB", [noise, noise.transpose(Image.Transpose.ROTATE_180), noise.point(lambda v: 255 - v)]
    )


def with_size(body: bytes, width: int, height: int) -> bytes:
    frame = next(start for start in map(body.find, FRAMES) if start > 0)
    return body[: frame + 5] + struct.pack(">HH", height, width) + body[frame + 9 :]


def truncated(body: bytes) -> bool:
    with Image.open(io.BytesIO(body)) as image:
        image.load()
        return is_truncated(image, body)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_jpeg_with_fewer_pixels_than_declared_is_truncated(variant: str) -> None:
    body = encode_jpeg(noise_image(), variant)
    assert not truncated(body)
    for size in ((160, 112), (900, 900)):
        with pytest.raises(ImageError, match="truncated") as caught:
            decode(EncodedImage(with_size(body, *size)), RULES, **LIMITS)
        assert (caught.value.code, caught.value.status) == ("truncated_image", 422)


@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_a_jpeg_cut_and_closed_with_an_end_marker_is_rejected(fraction: float) -> None:
    body = encode_jpeg(noise_image((320, 240)), "baseline")
    with pytest.raises(ImageError) as caught:
        decode(EncodedImage(body[: int(fraction * len(body))] + END), RULES, **LIMITS)
    assert caught.value.status == 422
    assert caught.value.code in {"truncated_image", "damaged_image"}  # damaged if half a marker is left


@pytest.mark.parametrize("variant", VARIANTS)
@FUZZ
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    gray=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    quality=st.integers(1, 100),
    trailing=st.sampled_from([b"", bytes(300), END * 9]),
)
def test_a_complete_jpeg_may_have_any_gray_area(
    variant: str, size: tuple[int, int], gray: tuple[int, int], quality: int, trailing: bytes
) -> None:
    image = noise_image(size)
    image.paste((128, 128, 128), (max(0, size[0] - gray[0]), max(0, size[1] - gray[1]), *size))
    assert not truncated(encode_jpeg(image, variant, quality) + trailing)


@pytest.mark.parametrize("segment", [b"Adobe", b"Adob"])
def test_a_short_adobe_segment_is_ignored(segment: bytes) -> None:
    body = encode_jpeg(noise_image(), "CMYK")
    changed = body[:2] + b"\xff\xee" + struct.pack(">H", 2 + len(segment)) + segment + body[2:]
    found, plain = decode(EncodedImage(changed), RULES, **LIMITS), decode(EncodedImage(body), RULES, **LIMITS)
    assert found.pixels.tobytes() == plain.pixels.tobytes()
    with pytest.raises(ImageError, match="truncated"):
        decode(EncodedImage(with_size(changed, 160, 400)), RULES, **LIMITS)
