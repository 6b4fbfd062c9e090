"""From the bytes of a request to the network's input: the only place that looks at image bytes.

Every step is cheaper than the next and may refuse: size in bytes, first bytes of the format, header
(its pixels are counted before one is allocated), full decode, preprocessing. What a picture is, its own
bytes say; a content type that says otherwise is a warning. Whatever the bytes are, the only error is
`ImageError`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.errors import ImageError
from sopdeploy.images.color import match_transparency
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.limits import (
    WANTED,
    LimitedReader,
    is_truncated,
    refuse_odd_jpeg,
    without_short_adobe,
)

ALLOWED = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
REFUSED = {
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
ANIMATED = {"GIF", "PNG", "WEBP"}  # a JPEG may hold a second picture too, but that is a thumbnail
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heif", b"avif", b"avis"}


class EncodedImage(NamedTuple):
    """The bytes of one image as they came, and the media type that came with them, if any."""

    body: bytes
    media_type: str = ""


# From a picture with only its header read, its file, and what it is for, to the picture with its pixels.
Load = Callable[[Image.Image, bytes, Preprocess], Image.Image]


class Decoded(NamedTuple):
    """The network's input (crop, crop, 3) uint8, and codes of what was done to the picture to get it."""

    pixels: NDArray[np.uint8]
    warnings: tuple[str, ...]


def exactly(picture: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG001
    """Return *picture* with the pixels that training saw."""
    picture.load()
    return picture


def decode(
    sent: EncodedImage, preprocess: Preprocess, *, max_bytes: int, max_pixels: int, load: Load = exactly
) -> Decoded:
    """Return the input that *preprocess* makes of the image in *sent*, its pixels decoded by *load*.

    Of an animation the first frame counts. Raises `ImageError` with the code and the HTTP status that tell
    what is wrong with the image.
    """
    body = sent.body
    if not body:
        raise ImageError("the body is empty; " + WANTED, code="empty_body", status=400)
    if len(body) > max_bytes:
        raise too_large_error(max_bytes)
    name = sniff(body)
    picture = read_header(body, name, max_pixels)
    try:
        with picture:
            whole = load(picture, body, preprocess)
            if name == "JPEG" and is_truncated(whole, body):
                raise cut_short()
            pixels, changes = preprocess(whole), preprocess.changes(whole)
            found = {
                "content_type_mismatch": disagrees(sent.media_type, name),
                "first_frame_only": name in ANIMATED and has_more_frames(picture),
            }
            more = (warning for warning, holds in found.items() if holds)
            return Decoded(pixels, tuple(sorted([*changes, *more])))
    except Exception as problem:  # foreign bytes in a decoder: it may raise anything
        raise damaged(problem) from problem


def keep_memory(decoders: int) -> None:
    """Let Pillow keep a few freed pictures' memory for the next ones of so many *decoders*.

    Given back to the system, every page of the next picture would be mapped and cleared again: a quarter of
    the time of a 500 x 375 JPEG. A block has at most 16 MB.
    """
    Image.core.set_blocks_max(2 * decoders)  # type: ignore[attr-defined]


def has_image_signature(body: bytes) -> bool:
    """Return whether the first bytes of *body* are those of an accepted format."""
    return body.startswith((*ALLOWED, b"RIFF"))


def sniff(body: bytes) -> str:
    """Return Pillow's name of the format *body* starts like; raises `ImageError` for others."""
    for magic, name in ALLOWED.items():
        if body.startswith(magic):
            if name == "JPEG":
                refuse_odd_jpeg(body)
            return name
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return "WEBP"
    other = name_of_other(body)
    if other is not None:
        raise ImageError(f"{other} files are not accepted; {WANTED}", code="unsupported_format", status=415)
    raise ImageError(f"this is not an image; {WANTED}", code="not_an_image", status=415)


def disagrees(media_type: str, name: str) -> bool:
    """Say whether *media_type* names an image format other than Pillow's *name*; `image/*` names none."""
    kind, _, subtype = media_type.partition(";")[0].strip().upper().partition("/")
    return kind == "IMAGE" and subtype != "*" and ALIASES.get(subtype, subtype) != name


def has_more_frames(picture: Image.Image) -> bool:
    """Say whether *picture*, whose first frame is already read, holds another, be it a damaged one."""
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # foreign bytes behind the frame that counts
        return True


def name_of_other(body: bytes) -> str | None:
    """Return the name of a format that is known and not accepted, or None."""
    if body[4:8] == b"ftyp" and body[8:12] in HEIF_BRANDS:
        return "HEIC and AVIF (a phone writes JPEG when its camera is set to `most compatible`)"
    return next((name for magic, name in REFUSED.items() if body.startswith(magic)), None)


def read_header(body: bytes, name: str, max_pixels: int) -> Image.Image:
    """Return the picture of format *name* with its header read and no pixel decoded.

    Raises `ImageError` where the header is damaged or says more than *max_pixels*.
    """
    try:
        picture = opened(body, name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise too_many_pixels(max_pixels) from problem
    except Exception as problem:  # foreign bytes in a parser: it may raise anything
        raise damaged(problem) from problem
    if picture.width * picture.height > max_pixels:
        raise too_many_pixels(max_pixels, picture.size)
    match_transparency(picture)
    return picture


def opened(body: bytes, name: str) -> Image.Image:
    """Return the picture of format *name*; raises what Pillow does, but not for a short note of Adobe."""
    try:
        return Image.open(LimitedReader(body, name), formats=(name,))
    except UnidentifiedImageError:
        plain = without_short_adobe(body)
        if name != "JPEG" or plain == body:
            raise
        return Image.open(LimitedReader(plain, name), formats=(name,))


def too_large_error(max_bytes: int) -> ImageError:
    """Return the error of a body longer than *max_bytes*."""
    return ImageError(
        f"the body is larger than {max_bytes} bytes, the limit of this server",
        code="too_large",
        status=413,
    )


def too_many_pixels(max_pixels: int, size: tuple[int, int] | None = None) -> ImageError:
    """Return the error of a picture of more than *max_pixels*."""
    what = f"{size[0]} x {size[1]}" if size else "this"
    return ImageError(
        f"{what} is more than {max_pixels} pixels, the limit of this server",
        code="too_many_pixels",
        status=413,
    )


def damaged(problem: Exception) -> ImageError:
    """Return the error of a picture whose decoder raised *problem*."""
    if isinstance(problem, ImageError):
        return problem
    if isinstance(problem, MemoryError):
        return ImageError("the image needs more memory than there is", code="too_many_pixels", status=413)
    if isinstance(problem, EOFError) or "truncated" in str(problem).lower():
        return cut_short()
    return ImageError("the image is damaged", code="damaged_image", status=422)


def cut_short() -> ImageError:
    """Return the error of a picture whose data ends before its pixels."""
    return ImageError("the image is cut short", code="truncated_image", status=422)
