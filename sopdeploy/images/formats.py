"""Which image files are accepted: formats, limits, and opening a file without decoding its pixels.

Each check is cheaper than the next: size in bytes, file signature, header (pixels are counted
before any is allocated). The work of a decoder is limited in a server only.
"""

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator

from PIL import AvifImagePlugin, Image, PngImagePlugin

from sopdeploy.base.environment import install_command
from sopdeploy.base.files import POINTER, POINTER_ADVICE
from sopdeploy.errors import ImageError, first_line
from sopdeploy.images.limits import (
    EXTRAS,
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    describe_formats,
    missing_extra,
)
from sopdeploy.images.pixels import correct_transparency_info
from sopdeploy.images.signatures import HEAD_BYTES, find_converter, find_format

# Pillow warns about large images, which `max_pixels` rejects, and about metadata, which is not
# used.
warnings.filterwarnings("ignore", module="PIL")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as of all other decoders
# Bytes of a text or color profile of a PNG, unpacked. Pillow's own limit, 1 MB, refuses profiles
# of scanners.
PngImagePlugin.MAX_TEXT_CHUNK = 8_000_000

_MAX_SIDE = 65_535  # as in JPEG; Pillow needs 8 bytes for each row, and time
# Sizes of the images in a HEIC or AVIF file
ITEM_SIZE = re.compile(rb"ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)
CAMERA = "phones take JPEG with the camera setting `most compatible`"
# Segments of JPEG files:
FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, sequential, progressive
SCAN = 0xDA
# of segments with a length, and of the end
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
MARKER_BYTES = 2
END = 0xD9


def open_image(
    body: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open the image file *body* and read its header; `load` of the result decodes the pixels.

    Raises `ImageError` for a file of a format that is not one of `FORMATS`, too large
    or damaged.
    """
    if not body:
        raise empty_error()
    if len(body) > max_bytes:
        raise too_large_error(max_bytes)

    # Headers are read within limits; the pixels are not decoded yet.
    detected = detect_format(body)
    try:
        # Before `Image.open`, which allocates the pixels of a WebP:
        _check_dimensions(webp_size(body), max_pixels)
        if detected == "HEIF":
            _register_heif()
        if detected == "AVIF" and not AvifImagePlugin.SUPPORTED:
            raise _unsupported_error("this installation of Pillow reads no AVIF; convert it")

        image = Image.open(io.BytesIO(body), formats=(detected,))
        _check_dimensions(image.size, max_pixels)

        if detected in {"HEIF", "AVIF"}:  # their decoders may allocate all images of the file
            for width, height in ITEM_SIZE.findall(body):
                _check_dimensions(
                    (int.from_bytes(width, "big"), int.from_bytes(height, "big")), max_pixels
                )
        correct_transparency_info(image)
    except Exception as error:  # untrusted bytes: a parser may raise anything
        raise image_error(error, max_pixels) from error
    return image


def _check_dimensions(size: tuple[int, int], max_pixels: int) -> None:
    """Raise `ImageError` if an image of *size*, width and height, is too large."""
    width, height = size
    limit = ""
    if width * height > max_pixels:
        limit = f"{max_pixels} pixels"
    elif max(size) > _MAX_SIDE:
        limit = f"{_MAX_SIDE} pixels per side"
    if limit:
        message = f"{width} x {height} is more than {limit}, the limit"
        raise ImageError(message, code="too_many_pixels", status=413)


def check_decoded_size(image: Image.Image, size: tuple[int, int]) -> None:
    """Raise `ValueError` if a decoded HEIC file has another size than its header said."""
    if image.format == "HEIF" and image.size != size:
        raise ValueError(f"decoded {image.size}, but the header says {size}")


def image_error(error: Exception, max_pixels: int = MAX_PIXELS) -> ImageError:
    """Convert the *error* of a parser or decoder to an `ImageError`."""
    if isinstance(error, ImageError):
        return error

    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        message = f"the image has more than {max_pixels} pixels, the limit"
        return ImageError(message, code="too_many_pixels", status=413)
    if isinstance(error, MemoryError):
        return ImageError("the image needs too much memory", code="too_many_pixels", status=413)

    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return ImageError("the image is truncated", code="truncated_image", status=422)
    return ImageError("the image is damaged", code="damaged_image", status=422)


def empty_error() -> ImageError:
    """Build the error of a file or body without a byte."""
    return ImageError("this is not an image: it is empty", code="empty_body", status=400)


def too_large_error(max_bytes: int) -> ImageError:
    """Build the error of a file or body longer than *max_bytes*."""
    return ImageError(f"larger than {max_bytes} bytes, the limit", code="too_large", status=413)


def detect_format(body: bytes) -> str:
    """Detect the format of *body*, as Pillow names it; raises `ImageError` if it is not one of `FORMATS`."""
    detected = find_format(body[:HEAD_BYTES])
    if detected in FORMATS.values():
        return detected

    decodable = [name for name in FORMATS if not missing_extra(name)]
    advice = f"use {describe_formats(decodable, 'or')}"

    if not detected:
        raise ImageError(f"this is not an image; {advice}", code="not_an_image", status=415)
    if body.startswith(POINTER):
        raise _unsupported_error(POINTER_ADVICE)
    # Pillow calls HEIC files HEIF.
    shown = "HEIC" if detected == "HEIF" else detected
    if converter := find_converter(detected):
        advice += f"; {converter} converts {shown} files"
    raise _unsupported_error(f"{shown} files are not accepted; {advice}")


def _unsupported_error(message: str) -> ImageError:
    return ImageError(message, code="unsupported_format", status=415)


def prepare_decoders() -> None:
    """Import the decoder of HEIC, if it is installed, before the process may no longer open files."""
    for name in EXTRAS:
        missing_extra(name)  # which messages tell
    with contextlib.suppress(ImageError):
        _register_heif()


def _register_heif() -> None:
    """Let Pillow open HEIC files, with one thread per image; raise `ImageError` without pillow-heif."""
    if "HEIF" in Image.OPEN:
        return

    extra, package = EXTRAS["heic"]
    try:
        pillow_heif = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise _unsupported_error(
            f"HEIC needs pillow-heif, which is not installed; {install_command(f'.[{extra}]')} ({CAMERA})"
        ) from error
    except ImportError as error:  # it is there
        reason = f"HEIC needs pillow-heif, which cannot be loaded ({first_line(error)})"
        raise _unsupported_error(f"{reason}; {CAMERA}") from error

    pillow_heif.register_heif_opener(
        decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
    )


def webp_size(body: bytes) -> tuple[int, int]:
    """Read (width, height) from the header of a WebP; (0, 0) for other formats.

    libwebp allocates the pixels before Pillow knows the size, and does not say that it lacks
    memory. Source: RFC 9649, sections 2.5 to 2.7.
    """
    # `WEBP` and the name of the first chunk; then follow 4 bytes of its length, and its content.
    kind = body[8:16]
    chunk = body[20:30]

    # Extended: 4 bytes of flags, then width - 1 and height - 1 of 3 bytes each.
    if kind == b"WEBPVP8X":
        width = 1 + int.from_bytes(chunk[4:7], "little")
        height = 1 + int.from_bytes(chunk[7:10], "little")
        return width, height

    # Lossless: a signature byte, then width - 1 and height - 1 of 14 bits each.
    if kind == b"WEBPVP8L":
        bits = int.from_bytes(chunk[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)

    # Lossy: 6 bytes, then width and height of 14 bits, each with 2 bits of scale.
    if kind == b"WEBPVP8 ":
        width = int.from_bytes(chunk[6:8], "little") & 0x3FFF
        height = int.from_bytes(chunk[8:], "little") & 0x3FFF
        return width, height

    return 0, 0


def jpeg_segments(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each JPEG segment and the position of its length.

    Bytes between two segments are skipped, such as the data of a scan, which contain no marker
    with a length.
    """
    position = MARKER_BYTES  # after the marker of the start
    while marker := MARKER.search(body, position):
        position = marker.end()
        yield body[position - 1], position
        position += int.from_bytes(body[position : position + 2], "big")
