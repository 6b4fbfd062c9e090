"""Decode the bytes of a request to the network's input.

Each step is cheaper than the next and may reject the image: size in bytes, file signature, header (pixels are
counted before any is allocated), decoding, preprocessing. The bytes decide the format; a content type that
disagrees is a warning. The only exception for bad bytes is `ImageError`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.errors import ImageError
from sopdeploy.images.preprocess import Preprocess, match_transparency
from sopdeploy_service.images.limits import (
    ACCEPTED,
    LimitedReader,
    check_jpeg_segments,
    is_truncated,
    without_short_adobe,
)

SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
REJECTED_SIGNATURES = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
}
ALIASES = {"JPG": "JPEG", "PJPEG": "JPEG", "APNG": "PNG", "X-PNG": "PNG", "X-BMP": "BMP", "X-MS-BMP": "BMP"}
ANIMATED = {"GIF", "PNG", "WEBP"}  # the second image of a JPEG is a thumbnail
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heif", b"avif", b"avis"}


class EncodedImage(NamedTuple):
    """The bytes of one image and its media type, if the client sent one."""

    body: bytes
    media_type: str = ""


class Decoded(NamedTuple):
    """The network's input (crop, crop, 3) uint8 and codes of what decoding changed."""

    pixels: NDArray[np.uint8]
    warnings: tuple[str, ...]


# (image with only its header read, file, preprocessing) -> image with its pixels.
Load = Callable[[Image.Image, bytes, Preprocess], Image.Image]


def load_exact(image: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG001
    """Load the pixels that training saw."""
    image.load()
    return image


def decode(
    encoded: EncodedImage, preprocess: Preprocess, *, max_bytes: int, max_pixels: int, load: Load = load_exact
) -> Decoded:
    """Decode *encoded*, with its pixels from *load*, and apply *preprocess*.

    Only the first frame of an animation is decoded. Raises `ImageError` with a code and an HTTP status.
    """
    body = encoded.body
    if not body:
        raise ImageError("the body is empty; " + ACCEPTED, code="empty_body", status=400)
    if len(body) > max_bytes:
        raise too_large_error(max_bytes)
    kind = _image_format(body)
    header = _read_header(body, kind, max_pixels)
    try:
        with header:
            image = load(header, body, preprocess)
            if kind == "JPEG" and is_truncated(image, body):
                raise EOFError("the data ends before the last pixel")
            pixels, warnings = preprocess(image), list(preprocess.changes(image))
            family, _, subtype = encoded.media_type.partition(";")[0].strip().upper().partition("/")
            if family == "IMAGE" and subtype != "*" and ALIASES.get(subtype, subtype) != kind:
                warnings.append("content_type_mismatch")
            if kind in ANIMATED and _has_more_frames(header):
                warnings.append("first_frame_only")
            return Decoded(pixels, tuple(sorted(warnings)))
    except Exception as error:  # untrusted bytes: a decoder may raise anything
        raise _as_image_error(error) from error


def keep_memory(decoders: int) -> None:
    """Let Pillow keep a few freed memory blocks of 16 MB for the next images.

    Without this, every page of the next image is mapped and cleared again: a quarter of the time of a 500 x
    375 JPEG.
    """
    Image.core.set_blocks_max(2 * decoders)  # type: ignore[attr-defined]


def has_image_signature(body: bytes) -> bool:
    """Return whether *body* starts like a file of an accepted format."""
    return body.startswith((*SIGNATURES, b"RIFF"))


def too_large_error(max_bytes: int) -> ImageError:
    """Build the error of a body longer than *max_bytes*."""
    message = f"the body is larger than {max_bytes} bytes, the limit of this server"
    return ImageError(message, code="too_large", status=413)


def _image_format(body: bytes) -> str:
    """Detect the format of *body*; raise `ImageError` if it is not accepted."""
    for signature, kind in SIGNATURES.items():
        if body.startswith(signature):
            if kind == "JPEG":
                check_jpeg_segments(body)
            return kind
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return "WEBP"
    known = next((name for magic, name in REJECTED_SIGNATURES.items() if body.startswith(magic)), None)
    if body[4:8] == b"ftyp" and body[8:12] in HEIF_BRANDS:
        known = "HEIC and AVIF (a phone writes JPEG if its camera is set to `most compatible`)"
    if known is not None:
        raise ImageError(f"{known} files are not accepted; {ACCEPTED}", code="unsupported_format", status=415)
    raise ImageError(f"this is not an image; {ACCEPTED}", code="not_an_image", status=415)


def _has_more_frames(image: Image.Image) -> bool:
    """Check whether *image* has a second frame, even a damaged one."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # untrusted bytes after the first frame
        return True


def _read_header(body: bytes, kind: str, max_pixels: int) -> Image.Image:
    """Open an image of at most *max_pixels* without decoding its pixels."""
    limit = f"more than {max_pixels} pixels, the limit of this server"
    try:
        image = _open(body, kind)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"this is {limit}", code="too_many_pixels", status=413) from error
    except Exception as error:  # untrusted bytes: a parser may raise anything
        raise _as_image_error(error) from error
    if image.width * image.height > max_pixels:
        message = f"{image.width} x {image.height} is {limit}"
        raise ImageError(message, code="too_many_pixels", status=413)
    match_transparency(image)
    return image


def _open(body: bytes, kind: str) -> Image.Image:
    """Open with Pillow, if needed without short Adobe segments, which only Pillow rejects."""
    try:
        return Image.open(LimitedReader(body, kind), formats=(kind,))
    except UnidentifiedImageError:
        plain = without_short_adobe(body)
        if kind != "JPEG" or plain == body:
            raise
        return Image.open(LimitedReader(plain, kind), formats=(kind,))


def _as_image_error(error: Exception) -> ImageError:
    if isinstance(error, ImageError):
        return error
    if isinstance(error, MemoryError):
        return ImageError("the image needs too much memory", code="too_many_pixels", status=413)
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return ImageError("the image is truncated", code="truncated_image", status=422)
    return ImageError("the image is damaged", code="damaged_image", status=422)
