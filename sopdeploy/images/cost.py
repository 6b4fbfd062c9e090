"""What decoding a file costs, told from the first fields of the file, before a decoder sees it.

A server chooses the decoder by it. Nothing depends on it being right: each decoder limits its
work itself.
"""

import math
from typing import NamedTuple

from sopdeploy.images.formats import FRAMES, ITEM_SIZE, SCAN, webp_size
from sopdeploy.images.pixels import center_view
from sopdeploy.images.preprocess import Preprocess

MAX_SEGMENTS = 400  # before the first scan of a JPEG: its metadata, in segments of up to 64 kB
PROGRESSIVE = 0xC2
HEIF_HEAD_BYTES = 1 << 16  # before the pixels of a HEIC or AVIF: what is in the file


class Cost(NamedTuple):
    """The work of decoding an image.

    Attributes:
        pixels: How many pixels the decoder holds at once. The coefficients of a JPEG with several scans count
            as pixels of the whole image.
        encoded: How many pixels the whole image has.
        is_proportional: Whether the time is proportional to the bytes and pixels, as that of a JPEG with one
            scan. Other formats can repeat work.
        is_slow: Whether each pixel takes several times as long as in other formats, as in HEIC and AVIF.
    """

    pixels: int
    encoded: int
    is_proportional: bool
    is_slow: bool = False


def estimate_cost(body: bytes, rules: Preprocess | None) -> Cost | None:
    """Estimate the cost of decoding *body* by *rules* (None: in full); None if *body* does not tell it."""
    if body[4:8] == b"ftyp":
        return _heif_cost(body)

    if body.startswith(b"\xff\xd8\xff"):
        width, height, num_scans = _jpeg_fields(body)  # several scans count as 2
    else:
        width, height = _read_size(body)
        num_scans = 0

    encoded = width * height
    if not encoded:
        return None

    # A JPEG can be decoded at a smaller scale.
    pixels = encoded
    if num_scans and rules is not None and rules.decoding != "full":
        scale = center_view((width, height), rules).scale
        pixels = math.ceil(width / scale) * math.ceil(height / scale)

    if num_scans > 1:  # the coefficients of the whole image are in memory, too
        pixels += encoded
    return Cost(pixels, encoded, is_proportional=num_scans == 1)


def _read_size(body: bytes) -> tuple[int, int]:
    """Read (width, height) near the beginning of a PNG, GIF, WebP or bitmap; (0, 0) for other formats."""
    if body.startswith(b"\x89PNG"):
        return int.from_bytes(body[16:20]), int.from_bytes(body[20:24])
    if body.startswith(b"GIF8"):
        return int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
    if body.startswith(b"RIFF"):
        return webp_size(body)

    if body.startswith(b"BM"):
        is_old = body[14:18] == b"\x0c\0\0\0"  # 12 bytes, with sides of two bytes
        starts, length = ((18, 20), 2) if is_old else ((18, 22), 4)
        # A height below 0 tells the order of the rows.
        width, height = (
            abs(int.from_bytes(body[start : start + length], "little", signed=not is_old))
            for start in starts
        )
        return width, height
    return 0, 0


def _heif_cost(body: bytes) -> Cost | None:
    """Read the cost of the HEIC or AVIF *body*, whose decoder holds all its images; None if unclear."""
    sizes = ITEM_SIZE.findall(body, 0, HEIF_HEAD_BYTES)
    pixels = sum(int.from_bytes(width) * int.from_bytes(height) for width, height in sizes)
    return Cost(pixels, pixels, is_proportional=False, is_slow=True) if pixels else None


def _byte(body: bytes, position: int) -> int:
    """Read a byte; 0 behind the end of a *body* that was cut."""
    return int.from_bytes(body[position : position + 1])


def _jpeg_fields(body: bytes) -> tuple[int, int, int]:
    """Read width, height and number of scans (1, or 2 for several) of the JPEG *body*; zeros if unclear."""
    position = 2  # behind the marker that begins the file
    # What a frame header says: width, height and number of components.
    frame = (0, 0, 0)
    is_progressive = False

    for _ in range(MAX_SEGMENTS):
        if body[position : position + 1] != b"\xff" or position + 4 > len(body):
            break
        marker = body[position + 1]
        length = int.from_bytes(body[position + 2 : position + 4])

        # Behind its marker, length and precision, a frame has height, width and number of
        # components.
        if marker in FRAMES:
            height, width = (
                int.from_bytes(body[position + at : position + at + 2]) for at in (5, 7)
            )
            frame = (width, height, _byte(body, position + 9))
            is_progressive = marker == PROGRESSIVE

        if marker == SCAN:
            has_one_scan = not is_progressive and _byte(body, position + 4) == frame[2]
            return frame[0], frame[1], 1 if has_one_scan else 2
        position += 2 + length
    return 0, 0, 0
