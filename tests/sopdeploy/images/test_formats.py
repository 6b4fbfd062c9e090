"""Training opens and refuses the files that the server opens and refuses."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sopdeploy.data.image_files import image_errors
from sopdeploy.errors import DataError, ImageError
from sopdeploy.images import formats
from sopdeploy.images.limits import SUFFIXES
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.settings import Settings
from tests.service.api.test_bad_inputs import BAD_BODIES

RULES = Preprocess(resize=36, crop=32)
FILE = Path("photo")
KINDS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "HEIF": ".heic"}
formats.prepare_decoders()  # also registers the encoder of HEIC


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 90, height: int = 60) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 4 % 256, columns * 2 % 256, (rows + columns) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def load(body: bytes) -> Image.Image:
    """Decode *body* as training does."""
    with image_errors(FILE):
        return formats.load_pixels(formats.open_image(body))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_server_compute_the_same_pixels_of_every_format(kind: str) -> None:
    assert KINDS[kind] in SUFFIXES
    body = encode(gradient(), kind)
    trained = preprocess_image(load(body), RULES)
    served = decode(EncodedImage(body), RULES, max_bytes=10**6, max_pixels=10**6)
    assert np.array_equal(trained, served.pixels)
    assert served.warnings == ()


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF"])
def test_a_turned_photograph_of_any_format_is_upright(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (64, 128))
    upright.paste((250, 250, 250), (0, 0, 64, 64))
    turned = upright.transpose(
        {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[
            orientation
        ]
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(
        EncodedImage(encode(turned, kind, exif=exif.tobytes())), RULES, max_bytes=10**6, max_pixels=10**6
    )
    assert found.pixels[:12].mean() > 240
    assert found.pixels[-12:].mean() < 15


REFUSED = [
    pytest.param(body, id=name)
    for (_, code), bodies in BAD_BODIES.items()
    for name, body in bodies.items()
    if code != "too_large"
]


@pytest.mark.parametrize("body", REFUSED)
def test_training_refuses_what_the_server_refuses(body: bytes) -> None:
    with pytest.raises(DataError, match=r"^photo: ") as caught:
        load(body)
    assert "\n" not in str(caught.value)


def test_one_set_of_limits_holds_for_training_and_server() -> None:
    assert (Settings().max_body_bytes, Settings().max_pixels) == (formats.MAX_BYTES, formats.MAX_PIXELS)
    with pytest.raises(DataError, match="larger than 20000000 bytes, the limit; "):
        load(b"\xff\xd8\xff" + bytes(20_000_000))


def test_the_error_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encode(gradient(), "HEIF")
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match=r'pip install "sopdeploy\[heif\]" \(phones take JPEG'):
        load(body)
    with pytest.raises(ImageError, match="needs pillow-heif") as caught:
        formats.open_image(body)
    assert (caught.value.code, caught.value.status) == ("unsupported_format", 415)
