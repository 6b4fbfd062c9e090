"""Truncated JPEGs are told apart from complete ones with gray areas."""

import io
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode, is_truncated

FUZZ = settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
RULES = Preprocess(resize=36, crop=32)
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


def encode(image: Image.Image, variant: str, quality: int = 80) -> bytes:
    mode, options = VARIANTS[variant]
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


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
    body = encode(noise_image(), variant)
    assert not truncated(body)
    for size in ((160, 112), (900, 900)):
        with pytest.raises(ImageError, match="truncated") as caught:
            decode(EncodedImage(with_size(body, *size)), RULES, **LIMITS)
        assert (caught.value.code, caught.value.status) == ("truncated_image", 422)


@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_a_jpeg_cut_and_closed_with_an_end_marker_is_rejected(fraction: float) -> None:
    body = encode(noise_image((320, 240)), "baseline")
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
    assert not truncated(encode(image, variant, quality) + trailing)


@pytest.mark.parametrize("segment", [b"Adobe", b"Adob"])
def test_a_short_adobe_segment_is_ignored(segment: bytes) -> None:
    body = encode(noise_image(), "CMYK")
    changed = body[:2] + b"\xff\xee" + struct.pack(">H", 2 + len(segment)) + segment + body[2:]
    found, plain = decode(EncodedImage(changed), RULES, **LIMITS), decode(EncodedImage(body), RULES, **LIMITS)
    assert found.pixels.tobytes() == plain.pixels.tobytes()
    with pytest.raises(ImageError, match="truncated"):
        decode(EncodedImage(with_size(changed, 160, 400)), RULES, **LIMITS)
