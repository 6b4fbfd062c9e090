"""Estimate the memory and the time that an image takes to decode, from its header.

`benchmarks/decode_cost.py` measures the factors. They hold for the exact decoders of Pillow's wheels and
include the conversion to RGB and the rotation.
"""

from typing import NamedTuple

from PIL import Image

from sopdeploy.images.exif import PNG_CHUNKS, ROTATED, exif_orientation


class Factors(NamedTuple):
    """Cost of a format: *extra* bytes per pixel of its decoder, *copies* of the file, ns per pixel and byte.

    *extra* is in addition to Pillow's image.
    """

    extra: float
    copies: int
    pixel_ns: float
    byte_ns: float


FACTORS = {
    "JPEG": Factors(0.2, 0, 9, 5),
    "PNG": Factors(0.2, 0, 13, 8),
    "WEBP": Factors(12.8, 2, 26, 10),
    "HEIF": Factors(5.5, 2, 16, 10),
    "GIF": Factors(0.8, 0, 12, 5),
    "BMP": Factors(1.5, 0, 8, 2),
}
PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # of Pillow's images; others have 4
RGB_BYTES, RGB_NS = 4, 8  # conversion to RGB
ALPHA_EXTRA = 2.0  # HEIC has a plane for alpha
DEEP_NS = 10  # samples of more than 8 bits
BUFFER_NS = 2.5  # per byte of buffered coefficients
RUN_NS = 1300  # per byte of a run-length-encoded BMP, which Pillow decodes in Python
MARGIN, LEAST_MEMORY = 1.06, 2_000_000  # of every estimate


class Cost(NamedTuple):
    """Peak memory in bytes, without the file itself, and CPU time in milliseconds, to decode an image."""

    memory: int
    ms: float


def decode_cost(image: Image.Image, body: bytes) -> Cost:
    """Estimate the cost of decoding the file *body*, opened by `open_image`, to RGB."""
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    factors = FACTORS[kind]
    own, extra, pixel_ns, byte_ns = PIXEL_BYTES.get(image.mode, 4), *factors[::2], factors.byte_ns
    buffer = image.info.get("coefficient_bytes", 0.0)
    extra, pixel_ns = extra + buffer, pixel_ns + BUFFER_NS * buffer
    if kind == "HEIF" and "A" in image.mode:
        extra += ALPHA_EXTRA
    tiles = getattr(image, "tile", None) or [("", None, 0, "")]
    if kind == "PNG" and str(tiles[0][3]).endswith("16B"):
        pixel_ns += DEEP_NS
    if tiles[0][0] == "bmp_rle":
        byte_ns = RUN_NS
    converts = image.mode != "RGB" or image.has_transparency_data
    if converts:
        pixel_ns += RGB_NS
    more = max(extra, RGB_BYTES * converts, own * _is_turned(image, body, kind))
    pixels = image.width * image.height
    memory = LEAST_MEMORY + MARGIN * pixels * (own + more) + factors.copies * len(body)
    ns = pixels * pixel_ns + len(body) * byte_ns + image.info.get("scan_ns", 0.0)
    return Cost(int(memory), ns / 1e6)


def _is_turned(image: Image.Image, body: bytes, kind: str) -> bool:
    """Whether the image may be rotated; the tags of a PNG may follow its pixels."""
    if kind == "PNG":
        return any(name in body for name in PNG_CHUNKS)
    return exif_orientation(image) in ROTATED
