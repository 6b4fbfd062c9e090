"""Copies of image files without metadata: no place, time, device, comment or thumbnail; upright as before.

A JPEG keeps its coefficients, so its pixels do not change. Other formats are decoded and
written as PNG, and so is a JPEG whose copy does not have the same pixels: decoders read kinds
of JPEG that `_copy_jpeg` does not.
"""

import calendar
import hashlib
import io
import struct
import time
from contextlib import suppress

from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.formats import END, FRAMES, MARKER_BYTES, SCAN, jpeg_segments, open_image
from sopdeploy.images.limits import MAX_PIXELS
from sopdeploy.images.pixels import ORIENTATION, UPRIGHT, exif_orientation, to_rgb
from sopdeploy.images.preprocess import Preprocess

MAX_COPIED_PIXELS = 12_000_000  # of a file that is written as PNG
HASHED_ROWS = 256
NO_TIME = -1
_EXIF_IFD = 0x8769
_TIME_TAKEN = 0x9003
JFIF = 0xE0
# The segments that pixels depend on, by marker, with the start of their content: frames, scans,
# tables of the Huffman code and quantization, number of lines, restart interval.
NEEDED = dict.fromkeys((*FRAMES, SCAN, 0xC4, 0xDB, 0xDC, 0xDD), b"")
NEEDED |= {0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}  # color profile, color transform


def capture_time(image: Image.Image) -> int:
    """Read when *image* was taken, in seconds of the camera's clock, from EXIF; `NO_TIME` if that is unknown.

    Only EXIF that precedes the pixels is read, so that they need not be decoded.
    """
    with suppress(Exception):  # Pillow raises many types for damaged metadata
        exif = Image.Exif()
        exif.load(image.info["exif"])
        text = exif.get_ifd(_EXIF_IFD)[_TIME_TAKEN]
        taken = time.strptime(text.strip("\0 "), "%Y:%m:%d %H:%M:%S")
        return max(NO_TIME, calendar.timegm(taken))
    return NO_TIME


def copy_without_metadata(body: bytes, max_pixels: int = MAX_PIXELS) -> tuple[bytes, str]:
    """Copy the image file *body*; return the copy and its suffix, `.jpg` or `.png`.

    The copy of a JPEG has the same pixels, or else is a PNG, as those of other formats are. An
    orientation other than upright stays as the only EXIF tag of a JPEG; a PNG is upright.

    Raises `ImageError` for a damaged file, for more than *max_pixels*, and if the copy is a PNG,
    for more than `MAX_COPIED_PIXELS`.
    """
    with open_image(body, max_bytes=len(body), max_pixels=max_pixels) as image:
        # A JPEG is copied by segments, if the copy decodes to the same pixels.
        if image.format in {"JPEG", "MPO"}:
            copy = _copy_jpeg(body, exif_orientation(image))
            copy_hash = _hash_pixels(copy)
            original_hash = _hash_pixels(body)
            if copy_hash is None and original_hash is None:
                raise ImageError("damaged", code="damaged_image", status=422)
            # None: the original does not decode, as without the end marker, which the copy has.
            if original_hash in {None, copy_hash}:
                return copy, ".jpg"
            # `_copy_jpeg` does not read this kind of JPEG, so it becomes a PNG, as other
            # formats do.
        if image.width * image.height > MAX_COPIED_PIXELS:
            raise ImageError(
                "too large to be written as PNG", code="too_many_pixels", status=413
            )

        # Any other image becomes a PNG of its pixels, upright and without metadata.
        file = io.BytesIO()
        try:
            pixels = to_rgb(image, Preprocess())
            if pixels is image:
                # `save` of an opened file asks for the current folder, which the server's
                # decoder may not.
                pixels = image.copy()
            pixels.info.clear()
            pixels.save(file, "PNG", compress_level=1)
        except Exception as error:  # a decoder may raise anything
            raise ImageError("damaged", code="damaged_image", status=422) from error

        return file.getvalue(), ".png"


def _hash_pixels(body: bytes) -> bytes | None:
    """Decode the JPEG *body* and hash its mode, size and pixels; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(body), formats=("JPEG",)) as image:
            digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
            # A few rows at a time need little memory.
            for top in range(0, image.height, HASHED_ROWS):
                bottom = min(top + HASHED_ROWS, image.height)
                rows = image.crop((0, top, image.width, bottom))
                digest.update(rows.tobytes())
    except Exception:  # a decoder may raise anything
        return None
    return digest.digest()


def _copy_jpeg(body: bytes, orientation: int) -> bytes:
    """Copy what the first image in the JPEG *body* needs to show its pixels, and its *orientation*."""
    parts = [b"\xff\xd8"]
    if orientation != UPRIGHT:
        # The header is big-endian: TIFF's number 42, and the directory of tags at byte 8.
        tiff_header = b"MM" + struct.pack(">HI", 42, 8)
        # The tag has one value of type 3, which has 16 bits.
        tag = struct.pack(">HHIHxx", ORIENTATION, 3, 1, orientation)
        # The directory has one tag, and no other directory follows.
        exif = b"Exif\0\0" + tiff_header + b"\0\1" + tag + bytes(4)
        parts += [b"\xff\xe1", struct.pack(">H", 2 + len(exif)), exif]

    data_begin: int | None = None  # of the data that follow a scan; None after another segment
    for marker, position in jpeg_segments(body):  # the position of the length, after the marker
        begin = position - MARKER_BYTES
        end = position + int.from_bytes(body[position : position + 2], "big")
        if data_begin is not None:  # they end where this segment begins
            parts.append(body[data_begin:begin])
        data_begin = end if marker == SCAN else None
        if marker == END:
            break

        # Of the segments, only those that change how the pixels look.
        content = body[position + 2 : end]  # after the length
        if marker == JFIF and content.startswith(b"JFIF\0"):
            # A segment of 16 bytes: its length, 12 bytes of fields, the size 0 x 0 of a
            # thumbnail.
            parts += [b"\xff\xe0\0\x10", body[position + 2 : position + 14], b"\0\0"]
        elif marker in NEEDED and content.startswith(NEEDED[marker]):
            parts.append(body[begin:end])

    if data_begin is not None:  # the file has no end marker
        parts.append(body[data_begin:])
    return b"".join((*parts, b"\xff\xd9"))
