"""Which images are good, and that they become the numbers they should."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from sopdeploy.errors import ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode

RULES = Preprocess(resize=36, crop=32)


def network_input(body: bytes) -> NDArray[np.uint8]:
    return decode(EncodedImage(body), RULES, max_bytes=1_000_000, max_pixels=1_000_000).pixels


def save(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def gradient() -> NDArray[np.uint8]:
    """A (60, 90, 3) picture whose colours differ everywhere."""
    rows, columns = np.mgrid[0:60, 0:90]
    return np.stack([rows * 4, columns * 2, 255 - rows - columns], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_lossless_picture_becomes_what_preprocess_makes_of_it(kind: str) -> None:
    picture = Image.fromarray(gradient())
    np.testing.assert_array_equal(network_input(save(picture, kind)), RULES(picture))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("WEBP", {"quality": 95}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
    ],
)
def test_every_accepted_format_shows_the_same_picture(kind: str, options: dict[str, int]) -> None:
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    picture = Image.fromarray(gradient())
    found = network_input(save(picture, kind, **options)).astype(int)
    assert np.abs(found - RULES(picture)).mean() < 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGB"])
def test_every_colour_mode_is_read(mode: str) -> None:
    if mode == "PA":
        picture = Image.fromarray(gradient()).convert("P")
        body = save(picture, transparency=3)
    else:
        body = save(Image.fromarray(gradient()).convert(mode))
    assert network_input(body).shape == (32, 32, 3)


def test_a_16_bit_grey_picture_is_scaled_and_not_clipped_to_white() -> None:
    deep = np.full((40, 40), 128 * 257, dtype=np.uint16)
    np.testing.assert_array_equal(network_input(save(Image.fromarray(deep))), 128)


def test_a_cmyk_picture_keeps_its_colours() -> None:
    body = save(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(network_input(body).astype(int) - [254, 0, 0]).max() <= 3


def test_a_transparent_picture_shows_the_background_of_the_bundle() -> None:
    body = save(Image.new("RGBA", (40, 40), (0, 0, 0, 0)))
    np.testing.assert_array_equal(network_input(body), 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_set_upright(orientation: int) -> None:
    picture = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {3: 180, 6: 270, 8: 90}.get(orientation)
    found = network_input(save(picture, exif=exif))
    assert found.shape == (32, 32, 3)
    if turned is not None:
        upright = picture.rotate(turned, expand=True)
        np.testing.assert_array_equal(found, RULES(upright))


@pytest.mark.parametrize(
    "options", [{"exif": b"Exif\0\0garbage"}, {"icc_profile": b"garbage" * 20}], ids=["exif", "icc"]
)
def test_damaged_metadata_is_ignored(options: dict[str, bytes]) -> None:
    picture = Image.fromarray(gradient())
    found = network_input(save(picture, "JPEG", quality=95, **options))
    np.testing.assert_array_equal(found, network_input(save(picture, "JPEG", quality=95)))


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 5)])
def test_any_shape_of_picture_is_read(size: tuple[int, int]) -> None:
    assert network_input(save(Image.new("RGB", size, (9, 8, 7)))).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    frames = [Image.new("RGB", (40, 40), colour) for colour in [(250, 0, 0), (0, 0, 250)]]
    found = network_input(save(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert found[..., 0].mean() > 200
    assert found[..., 2].mean() < 50


REFUSALS: dict[str, tuple[Callable[[], bytes], str, int]] = {
    "nothing": (lambda: b"", "empty_body", 400),
    "too many bytes": (lambda: b"\xff\xd8\xff" + bytes(1_000_000), "too_large", 413),
    "too many pixels": (lambda: save(Image.new("1", (1001, 1000))), "too_many_pixels", 413),
    "text": (lambda: b"text", "not_an_image", 415),
    "a TIFF": (lambda: save(Image.new("L", (9, 9)), "TIFF"), "unsupported_format", 415),
    "an AVIF": (lambda: b"\0\0\0\x1cftypavif", "unsupported_format", 415),
    "a RIFF that is a sound": (lambda: b"RIFF\0\0\0\0WAVEfmt ", "not_an_image", 415),
    "a cut PNG": (
        lambda: save(Image.fromarray(gradient()))[:-60],
        "truncated_image",
        422,
    ),
    "a cut JPEG": (
        lambda: save(Image.fromarray(gradient()), "JPEG")[:-300],
        "truncated_image",
        422,
    ),
    "a BMP that says BM and no more": (lambda: b"BMW is a car", "damaged_image", 422),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bad_image_is_refused_with_its_own_code(name: str) -> None:
    make, code, status = REFUSALS[name]
    with pytest.raises(ImageError) as caught:
        network_input(make())
    assert (caught.value.code, caught.value.status) == (code, status)


def test_exactly_the_pixel_limit_is_accepted() -> None:
    assert network_input(save(Image.new("1", (1000, 1000)))).shape == (32, 32, 3)
