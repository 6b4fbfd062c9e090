"""Encode images for tests; `tests.support.hostile_images` makes hostile ones."""

import io
import struct
import zlib

from PIL import Image

from sopdeploy.images.formats import prepare_decoders

prepare_decoders()  # also registers the encoder of HEIC


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Encode *image* with Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Make a chunk of a PNG."""
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )


def png(
    width: int, height: int, *, depth: int = 1, data: bytes = bytes(1000), extra: bytes = b""
) -> bytes:
    """Make a gray PNG whose header says any size, with pixel *data* and further chunks *extra*."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data, 9))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")
