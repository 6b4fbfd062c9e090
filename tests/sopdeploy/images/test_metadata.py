"""Copies of image files keep pixels and orientation, and nothing that tells where, when or by whom."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from sopdeploy.errors import ImageError
from sopdeploy.images.metadata import copy_without_metadata
from sopdeploy.images.pixels import exif_orientation, to_rgb
from sopdeploy.images.preprocess import Preprocess
from tests.support import hostile_images as hostile
from tests.support.pictures import encoded

SECRET = b"SECRET"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def scene(mode: str = "RGB") -> Image.Image:
    cells = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(cells).resize((75, 60), Image.Resampling.BICUBIC).convert(mode)


def secret_exif(orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Artist] = SECRET.decode()
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 12.0)
    gps[ExifTags.GPS.GPSProcessingMethod] = SECRET
    return exif.tobytes()


def secret_jpeg(mode: str = "RGB", orientation: int = 1, **options: object) -> bytes:
    """A JPEG with a secret in every kind of segment, between segments and behind the end."""
    body = encoded(
        scene(mode), "JPEG", exif=secret_exif(orientation), icc_profile=PROFILE, **options
    )
    segments = [
        hostile.segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>" + SECRET),
        hostile.segment(0xE0, b"JFXX\0\x10" + SECRET),
        hostile.segment(0xE2, b"FPXR\0" + SECRET),
        hostile.segment(0xED, b"Photoshop 3.0\0" + SECRET),
        hostile.segment(0xEE, b"other" + SECRET),
        hostile.segment(0xEF, SECRET),
        hostile.segment(0xFE, SECRET),
        SECRET,
    ]
    tables = body.index(b"\xff\xdb")
    return body[:tables] + b"".join(segments) + body[tables:] + SECRET + body


def opened(body: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(body))
    image.load()
    return image


JPEGS: dict[str, Callable[[], bytes]] = {
    "baseline": secret_jpeg,
    "progressive": lambda: secret_jpeg(progressive=True),
    "restart markers": lambda: secret_jpeg(restart_marker_blocks=2),
    "gray": lambda: secret_jpeg("L"),
    "cmyk": lambda: secret_jpeg("CMYK"),
    "rgb": lambda: secret_jpeg(keep_rgb=True),
    "subsampled": lambda: secret_jpeg(subsampling="4:2:0", optimize=True),
    "thumbnail in JFIF": lambda: encoded(scene(), "JPEG").replace(
        b"\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0",
        hostile.segment(0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\x02\x01" + SECRET),
        1,
    ),
    "a table behind the end": lambda: (
        encoded(scene(), "JPEG") + b"\0\0" + hostile.segment(0xDB, SECRET)
    ),
    "two photographs": lambda: encoded(
        scene(),
        "MPO",
        save_all=True,
        append_images=[scene("L").convert("RGB")],
        exif=secret_exif(),
    ),
}


@pytest.mark.parametrize("make", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_keeps_its_pixels_and_loses_every_secret(make) -> None:
    body = make()
    assert SECRET in body

    copy, suffix = copy_without_metadata(body)
    assert suffix == ".jpg"
    assert SECRET not in copy
    assert copy.count(b"\xff\xd8\xff") == 1

    before = opened(body)
    after = opened(copy)
    assert np.array_equal(np.asarray(before), np.asarray(after))
    assert before.mode == after.mode
    assert after.info.get("icc_profile") == before.info.get("icc_profile")
    assert not dict(after.getexif())
    assert copy_without_metadata(copy) == (copy, suffix)


@pytest.mark.parametrize("orientation", range(10))
def test_a_valid_orientation_stays_as_the_only_tag(orientation: int) -> None:
    copy, _ = copy_without_metadata(secret_jpeg(orientation=orientation))
    image = opened(copy)
    rotated = 2 <= orientation <= 8

    assert exif_orientation(image) == (orientation if rotated else 1)
    assert dict(image.getexif()) == (
        {ExifTags.Base.Orientation: orientation} if rotated else {}
    )


def test_an_orientation_of_more_than_16_bits_is_upright() -> None:
    short = struct.pack(">HHIHxx", ExifTags.Base.Orientation, 3, 1, 6)
    long = struct.pack(">HHII", ExifTags.Base.Orientation, 4, 1, 70_000)
    copy, _ = copy_without_metadata(secret_jpeg(orientation=6).replace(short, long))

    assert exif_orientation(opened(copy)) == 1
    assert dict(opened(copy).getexif()) == {}


def test_a_jpeg_without_an_end_gets_one() -> None:
    body = encoded(scene(), "JPEG")
    assert copy_without_metadata(body[:-2]) == copy_without_metadata(body)


PNG_TEXT = PngImagePlugin.PngInfo()
PNG_TEXT.add_text("Comment", SECRET.decode())
OTHERS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(
        scene(), "PNG", pnginfo=PNG_TEXT, exif=secret_exif(6), icc_profile=PROFILE
    ),
    "PNG with alpha": lambda: encoded(scene("RGBA"), "PNG", pnginfo=PNG_TEXT),
    "PNG of 16 bits": lambda: encoded(scene().convert("I;16"), "PNG", pnginfo=PNG_TEXT),
    "palette": lambda: encoded(scene("P"), "PNG", pnginfo=PNG_TEXT),
    "WEBP": lambda: encoded(scene(), "WEBP", lossless=True, exif=secret_exif(8), xmp=SECRET),
    "GIF": lambda: encoded(scene("P"), "GIF", comment=SECRET),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_another_format_becomes_an_upright_png_without_secrets(make) -> None:
    body = make()
    assert SECRET in body

    copy, suffix = copy_without_metadata(body)
    assert suffix == ".png"
    assert SECRET not in copy
    assert set(opened(copy).info) == set()
    assert np.array_equal(
        np.asarray(to_rgb(Image.open(io.BytesIO(body)), Preprocess())), opened(copy)
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "empty_body"),
        (b"no image", "not_an_image"),
        (encoded(scene(), "PNG")[:-900], "damaged_image"),
        (encoded(Image.new("1", (11_000, 4000)), "PNG"), "too_many_pixels"),
    ],
    ids=["empty", "text", "truncated", "large"],
)
def test_what_cannot_be_copied_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(ImageError) as refused:
        copy_without_metadata(body)
    assert refused.value.code == code


def lossless_jpeg(marker: int = 0xC3, width: int = 24, height: int = 16) -> bytes:
    """A lossless JPEG (ITU-T T.81, annex H; predictor 1), which libjpeg-turbo decodes since version 3."""
    pixels = [[100 + (x // 4 + y // 2) % 50 for x in range(width)] for y in range(height)]
    bits = ""
    for y in range(height):
        for x in range(width):
            predicted = pixels[y][x - 1] if x else pixels[y - 1][0] if y else 128
            difference = pixels[y][x] - predicted
            size = abs(difference).bit_length()  # the category, with a code of 3 bits
            bits += f"{size:03b}"
            if size:
                bits += (
                    f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}"
                )
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB", 8, height, width, 1) + bytes((1, 0x11, 0))
    table = bytes([0, 0, 0, 7] + [0] * 13) + bytes(range(7))  # 7 codes of 3 bits
    scan = hostile.segment(0xDA, bytes((1, 1, 0, 1, 0, 0)))
    comment = hostile.segment(0xFE, SECRET)
    segments = hostile.segment(marker, frame) + comment + hostile.segment(0xC4, table) + scan
    return b"\xff\xd8" + segments + data + b"\xff\xd9"


def with_segments_of_unknown_kinds(body: bytes) -> bytes:
    """Repeat the quantization tables behind bytes that are not a segment, where some decoders do not look."""
    return body[:2] + b"\xff\x02" + body[2:]


FOREIGN = {
    "lossless": lossless_jpeg(),
    "a marker without a length": with_segments_of_unknown_kinds(encoded(scene(), "JPEG")),
    "progressive": encoded(scene(), "JPEG", progressive=True),
    "CMYK": encoded(scene("CMYK"), "JPEG"),
    "one pixel": encoded(scene().resize((1, 1)), "JPEG"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_whatever_a_decoder_reads_its_copy_has_the_same_pixels(kind: str) -> None:
    body = FOREIGN[kind]
    try:
        expected = np.asarray(to_rgb(Image.open(io.BytesIO(body)), Preprocess()))
    except (OSError, ImageError):  # this version of the decoder does not read it
        with pytest.raises(ImageError):
            copy_without_metadata(body)
        return
    copy, suffix = copy_without_metadata(body)

    assert np.array_equal(np.asarray(to_rgb(opened(copy), Preprocess())), expected)
    assert opened(copy).format == {".jpg": "JPEG", ".png": "PNG"}[suffix]
    assert SECRET not in copy


def test_a_file_without_pixels_has_no_copy() -> None:
    body = encoded(scene(), "JPEG")
    with pytest.raises(ImageError, match="damaged"):
        copy_without_metadata(body[: body.index(b"\xff\xda")])
