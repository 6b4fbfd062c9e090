"""Warnings about changes made while decoding, over HTTP and in `predict`."""

import io

import numpy as np
import pytest
from PIL import Image

from sopdeploy_service.commands.predict import predict_files
from sopdeploy_service.settings import Settings

SIZE = (48, 40)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PLAIN = Image.new("RGB", SIZE, (200, 30, 60))


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(PLAIN, "JPEG", exif=exif)


def with_alpha(alpha: int) -> bytes:
    return saved(Image.new("RGBA", SIZE, (200, 30, 60, alpha)), "PNG")


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", SIZE, (0, 0, 99))]}
ANIMATED = saved(PLAIN, "GIF", **FRAMES)
CASES = {
    "plain": (saved(PLAIN, "JPEG"), []),
    "orientation 6": (rotated(6), ["exif_rotated"]),
    "invalid orientation": (rotated(99), []),
    "opaque alpha channel": (with_alpha(255), []),
    "transparent": (with_alpha(120), ["alpha_flattened"]),
    "16 bits": (
        saved(Image.fromarray(np.full(SIZE, 40_000, dtype=np.uint16)), "PNG"),
        ["sixteen_bit_scaled"],
    ),
    "animated": (ANIMATED, ["first_frame_only"]),
    "damaged second frame": (ANIMATED[:-40], ["first_frame_only"]),
}


@pytest.mark.parametrize("name", CASES)
def test_warnings_name_the_changes_to_the_image(client, bundle_path, tmp_path, name):
    body, expected = CASES[name]
    assert client.post("/v1/classify", content=body).json()["warnings"] == expected
    (tmp_path / "x").write_bytes(body)
    assert list(predict_files(bundle_path, [tmp_path / "x"], Settings(threads=1))[0].warnings) == expected


def test_a_content_type_of_another_format_is_a_warning(client, jpeg):
    for media_type, expected in (
        ("IMAGE/JPG; charset=x", []),
        ("image/*", []),
        ("application/x-www-form-urlencoded", []),  # the default of curl
        ("image/png", ["content_type_mismatch"]),
    ):
        raw = client.post("/v1/classify", content=jpeg, headers={"Content-Type": media_type})
        form = client.post("/v1/classify", files={"image": ("x", jpeg, media_type)})
        assert raw.json()["warnings"] == form.json()["warnings"] == expected


def test_each_image_of_a_form_has_its_own_warnings(client, jpeg):
    files = [("image", ("a", jpeg, "image/jpeg")), ("image", ("b", jpeg, "image/gif")), ("image", rotated(3))]
    results = client.post("/v1/classify", files=files).json()["results"]
    assert [entry["warnings"] for entry in results] == [[], ["content_type_mismatch"], ["exif_rotated"]]
