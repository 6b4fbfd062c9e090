"""A JPEG that lacks data is told from one that is grey where such a one would be."""

import io
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.limits import is_truncated

FUZZ = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
RULES = Preprocess(resize=36, crop=32)
FRAMES = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")
END = b"\xff\xd9"
WAYS = {
    "baseline": ("RGB", {}),
    "4:4:4": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "tables of its own": ("RGB", {"optimize": True}),
    "stored as RGB": ("RGB", {"keep_rgb": True}),
    "restarts in each row": ("RGB", {"restart_marker_rows": 1}),
    "restarts all the time": ("RGB", {"restart_marker_blocks": 1}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
}


def saved(picture: Image.Image, way: str, quality: int = 80) -> bytes:
    mode, options = WAYS[way]
    file = io.BytesIO()
    picture.convert(mode).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def photograph(size: tuple[int, int] = (160, 96)) -> Image.Image:
    grains = np.random.default_rng(0).normal(128, 90, (24, 40)).clip(0, 255).astype(np.uint8)
    noise = Image.fromarray(grains).resize(size, Image.Resampling.BICUBIC)
    return Image.merge(
        "RGB", [noise, noise.transpose(Image.Transpose.ROTATE_180), noise.point(lambda v: 255 - v)]
    )


def that_says(body: bytes, width: int, height: int) -> bytes:
    frame = next(place for place in map(body.find, FRAMES) if place > 0)
    return body[: frame + 5] + struct.pack(">HH", height, width) + body[frame + 9 :]


def lacks(body: bytes) -> bool:
    with Image.open(io.BytesIO(body)) as picture:
        picture.load()
        return is_truncated(picture, body)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(160, 112), (176, 96), (160, 400), (900, 900)])
def test_a_jpeg_that_says_more_pixels_than_it_has_is_cut_short(way: str, size: tuple[int, int]) -> None:
    body = saved(photograph(), way)
    assert not lacks(body)
    with pytest.raises(ImageError, match="truncated") as caught:
        decode(EncodedImage(that_says(body, *size)), RULES, max_bytes=10**6, max_pixels=10**6)
    assert (caught.value.code, caught.value.status) == ("truncated_image", 422)


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"progressive"}))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_jpeg_that_was_cut_and_closed_again_is_cut_short(way: str, share: float) -> None:
    body = saved(photograph((320, 240)), way)
    with pytest.raises(ImageError) as caught:
        decode(EncodedImage(body[: int(share * len(body))] + END), RULES, max_bytes=10**6, max_pixels=10**6)
    assert caught.value.status == 422
    assert caught.value.code in {"truncated_image", "damaged_image"}  # the latter where half a marker is left


@pytest.mark.parametrize("way", WAYS)
@FUZZ
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    grey=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    quality=st.integers(1, 100),
    behind=st.sampled_from([b"", bytes(300), END * 9]),
)
def test_a_whole_jpeg_may_be_as_grey_as_it_likes(
    way: str, size: tuple[int, int], grey: tuple[int, int], quality: int, behind: bytes
) -> None:
    picture = photograph(size)
    picture.paste((128, 128, 128), (max(0, size[0] - grey[0]), max(0, size[1] - grey[1]), *size))
    assert not lacks(saved(picture, way, quality) + behind)


@pytest.mark.parametrize("note", [b"Adobe", b"Adobe\0", b"Adobe\0d", b"Adobe\0d\0\0\0\0", b"Adob"])
@pytest.mark.parametrize("way", WAYS)
def test_a_short_note_of_adobe_changes_nothing(way: str, note: bytes) -> None:
    body = saved(photograph(), way)
    noted = body[:2] + b"\xff\xee" + struct.pack(">H", 2 + len(note)) + note + body[2:]
    limits = {"max_bytes": 10**6, "max_pixels": 10**6}
    found, plain = decode(EncodedImage(noted), RULES, **limits), decode(EncodedImage(body), RULES, **limits)
    assert found.pixels.tobytes() == plain.pixels.tobytes()
    with pytest.raises(ImageError, match="truncated"):
        decode(EncodedImage(that_says(noted, 160, 400)), RULES, **limits)
