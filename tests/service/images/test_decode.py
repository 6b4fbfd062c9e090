"""Which images are accepted, and that they become the right pixels."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.images.formats import prepare_decoders
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode

RULES = Preprocess(resize=36, crop=32)
ROWS, COLUMNS = np.mgrid[0:60, 0:90]
# Every pixel has another color.
GRADIENT = Image.fromarray(np.stack([ROWS * 4, COLUMNS * 2, 255 - ROWS - COLUMNS], axis=-1).astype(np.uint8))


prepare_decoders()  # also registers the encoder of HEIC


def pixels_of(body: bytes) -> NDArray[np.uint8]:
    return decode(EncodedImage(body), RULES, max_bytes=1_000_000, max_pixels=1_000_000).pixels


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    found = pixels_of(encode(GRADIENT, kind, **options)).astype(int)
    assert np.abs(found - preprocess_image(GRADIENT, RULES)).mean() <= difference


FAR_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\xff\xff\xff\xff"  # points nowhere
DAMAGED = [{"exif": b"Exif\0\0garbage"}, {"exif": FAR_EXIF}, {"icc_profile": b"garbage" * 20}]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("options", DAMAGED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_metadata_and_trailing_bytes_are_ignored(kind: str, options: dict[str, bytes]) -> None:
    found = pixels_of(encode(GRADIENT, kind, quality=95, **options) + bytes(1000))
    np.testing.assert_array_equal(found, pixels_of(encode(GRADIENT, kind, quality=95)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_decoded(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in [(250, 0, 0), (0, 0, 250)]]
    found = pixels_of(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert found[..., 0].mean() > 200
    assert found[..., 2].mean() < 50
