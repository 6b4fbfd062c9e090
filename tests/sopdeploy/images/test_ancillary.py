"""Metadata do not change the pixels, large ones are read within limits, and damaged ones are refused in one line."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.decode import decode
from sopdeploy.images.preprocess import Preprocess

RULES = Preprocess(resize=32, crop=32)
SCENE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
).resize((80, 60))
XMP = b'<x tiff:Orientation="6"/>'
PROFILE = b"ICC_PROFILE\0\1\1" + b"x" * 60_000
EXIF = b"MM\0*" + struct.pack(">IHHHIHxx", 8, 1, 0x0112, 3, 1, 6) + bytes(4)
# 5,000 tags whose values are the same 60 kB.
OVERLAPPING = b"MM\0*" + struct.pack(">IH", 8, 5000)
OVERLAPPING += b"".join(struct.pack(">HHII", 0x9000 + tag, 7, 60_000, 8) for tag in range(5000))
TEXT_PROFILE = b"\nexif\n26\n" + EXIF.hex().encode()


def encoded(format_name: str, **options: object) -> bytes:
    file = io.BytesIO()
    SCENE.save(file, format_name, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    value = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", value)


def png(*chunks: bytes, at_end: bool = False) -> bytes:
    """Add *chunks* to a PNG, before its pixels or after them."""
    body = encoded("PNG")
    position = len(body) - 12 if at_end else 33
    return body[:position] + b"".join(chunks) + body[position:]


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    body = encoded("JPEG", quality=95)
    added = (
        struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in segments
    )
    return body[:2] + b"".join(added) + body[2:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = encoded(
        "WEBP", lossless=True, exif=b"Exif\0\0" + b"x" * 9, xmp=b"<", icc_profile=b"broken"
    )
    for name, data in chunks:
        body += name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return body[:4] + struct.pack("<I", len(body) - 8) + body[8:]


def gif(*comments: bytes) -> bytes:
    body = encoded("GIF")
    start = 13 + 3 * 2 ** ((body[10] & 7) + 1)
    blocks = (
        b"!\xfe"
        + b"".join(
            bytes([len(part)]) + part
            for part in (text[at : at + 255] for at in range(0, len(text), 255))
        )
        + b"\0"
        for text in comments
    )
    return body[:start] + b"".join(blocks) + body[start:]


LARGE = zlib.compress(b"x" * 3_000_000)
PNGS = {
    "a compressed text": lambda: png(chunk(b"zTXt", b"prompt\0\0" + LARGE)),
    "a text": lambda: png(chunk(b"tEXt", b"workflow\0" + b"y" * 2_000_000)),
    "an international text": lambda: png(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)
    ),
    "a text after the pixels": lambda: png(chunk(b"zTXt", b"prompt\0\0" + LARGE), at_end=True),
    "a profile": lambda: png(chunk(b"iCCP", b"name\0\0" + LARGE)),
}
JPEGS = {
    "empty segments": lambda: jpeg(*((marker, b"") for marker in (*range(0xE0, 0xF0), 0xFE))),
    "many segments": lambda: jpeg(*[(0xE2, PROFILE)] * 30, *[(0xED, b"a")] * 2000),
    "broken tags": lambda: jpeg((0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0<")),
    "overlapping tags": lambda: jpeg((0xE1, b"Exif\0\0" + OVERLAPPING)),
    "an index of images": lambda: jpeg((0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff")),
}  # fmt: skip
DAMAGED = {
    "PNG: a cut profile": lambda: png(chunk(b"iCCP", b"")),
    "PNG: an unknown method": lambda: png(chunk(b"zTXt", b"exif\0\7" + LARGE)),
    "PNG: a text that is named as a property": lambda: png(chunk(b"tEXt", b"interlace\x001")),
    "PNG: a short chunk": lambda: png(chunk(b"gAMA", b"")),
    "PNG: a wrong checksum": lambda: png(chunk(b"tEXt", b"x", 1)),
    "JPEG: short headers": lambda: jpeg((0xE0, b"JFIF\0"), (0xEE, b"Adobe")),
    "JPEG: a cut resource": lambda: jpeg((0xED, b"Photoshop 3.0\x008BIM\3\xed")),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as everywhere outside of the tests
@pytest.mark.parametrize(
    ("body", "plain"),
    [
        *(
            pytest.param(body, lambda: encoded("PNG"), id=f"PNG: {name}")
            for name, body in PNGS.items()
        ),
        *(
            pytest.param(body, lambda: encoded("JPEG", quality=95), id=f"JPEG: {name}")
            for name, body in JPEGS.items()
        ),
        pytest.param(
            lambda: webp((b"XMP ", b"y" * 2_000_000), (b"abcd", b"z")), webp, id="WebP"
        ),
        pytest.param(lambda: gif(b"x" * 1_000_000, b"", b"y"), gif, id="GIF"),
    ],
)
def test_metadata_do_not_change_the_pixels(body, plain) -> None:
    given = decode(body(), RULES)
    expected = decode(plain(), RULES)

    np.testing.assert_array_equal(given.pixels, expected.pixels)
    assert given.warnings == expected.warnings


@pytest.mark.parametrize(
    "body",
    [
        png(chunk(b"eXIf", EXIF)),
        png(chunk(b"eXIf", EXIF), at_end=True),
        png(chunk(b"tEXt", b"XML:com.adobe.xmp\0" + XMP)),
        png(chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(XMP))),
        png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(TEXT_PROFILE))),
        jpeg((0xE1, b"Exif\0\0" + EXIF)),
        jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    ],
)  # fmt: skip
def test_an_orientation_is_still_read(body: bytes) -> None:
    assert decode(body, RULES).warnings == ("exif_rotated",)


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_an_image_with_damaged_metadata_is_refused_as_damaged(make) -> None:
    with pytest.raises(ImageError) as refused:
        decode(make(), RULES)

    assert refused.value.code in {"damaged_image", "truncated_image"}


@pytest.mark.parametrize("at_end", [False, True])
def test_a_file_of_bombs_is_refused_before_they_fill_the_memory(at_end: bool) -> None:
    text = zlib.compress(b"x" * 7_000_000)
    bombs = [chunk(b"zTXt", b"%d\0\0" % number + text) for number in range(200)]
    body = png(*bombs, at_end=at_end)

    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="damaged"):
            decode(body, RULES)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most_bytes < 200_000_000  # all texts have 1.4 GB


def test_what_the_pixels_depend_on_still_decides() -> None:
    cut = jpeg((0xE1, b"Exif\0\0" + EXIF))[:40]
    for body in (cut, png(chunk(b"zTXt", b"a\0\0" + LARGE))[:60], png(chunk(b"ABCD", b"", 1))):
        with pytest.raises(ImageError):
            decode(body, RULES)
