"""Which image files are accepted: formats, limits, and opening a file without decoding its pixels.

Each check is cheaper than the next: size in bytes, file signature, header (pixels are counted
before any is allocated). The work of a decoder is limited in a server only.
"""

import contextlib
import importlib
import io
import re
import warnings
import zlib
from collections.abc import Collection, Iterator

from PIL import AvifImagePlugin, Image

from sopdeploy.errors import ImageError, first_line
from sopdeploy.files import POINTER, POINTER_ADVICE
from sopdeploy.images.limits import EXTRAS, FORMATS, MAX_BYTES, MAX_PIXELS, describe_formats
from sopdeploy.images.pixels import correct_transparency_info
from sopdeploy.images.signatures import HEAD_BYTES, find_converter, find_format

# Pillow warns about large images, which `max_pixels` rejects, and about metadata, which is not
# used.
warnings.filterwarnings("ignore", module="PIL")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as of all other decoders

_MAX_SIDE = 65_535  # as in JPEG; Pillow needs 8 bytes for each row, and time
# Sizes of the images in a HEIC or AVIF file
ITEM_SIZE = re.compile(rb"ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)
CAMERA = "phones take JPEG with the camera setting `most compatible`"
# Segments of JPEG files:
FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, sequential, progressive
ARITHMETIC_FRAMES = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # T.81, table B.1
SCAN = 0xDA
# of segments with a length, and of the end
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
MARKER_BYTES = 2
COMMENT = 0xFE
END = 0xD9
# Of the segments of applications, those that the colors depend on, with the least length that
# libjpeg reads.
COLOR_SEGMENTS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}
APPLICATIONS = range(0xE0, 0xF0)
APPLICATION_1 = 0xE1
EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
# Of the chunks of PNG files that a decoder may ignore, texts with an orientation.
TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt"}
TEXTS = re.compile(rb"(XML:com\.adobe\.xmp|xmp|exif|Raw profile type exif)\0")
TRANSPARENCY_BYTES = {0: 2, 2: 6}  # by color type
# an extension of GIF
CONTROL = 0xF9
CONTROL_BYTES = 4
MAX_TEXT = 1_000_000  # bytes of all such texts of a file, unpacked


def open_image(
    body: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    formats: Collection[str] | None = None,
) -> Image.Image:
    """Open the image file *body* and read its header; `load` of the result decodes the pixels.

    Raises `ImageError` for a file that is not one of *formats* (names of `FORMATS`), too large
    or damaged.
    """
    if not body:
        raise empty_error()
    if len(body) > max_bytes:
        raise too_large_error(max_bytes)

    # Headers are read within limits; the pixels are not decoded yet.
    detected = detect_format(body, formats)
    try:
        # Before `Image.open`, which allocates the pixels of a WebP:
        _check_dimensions(webp_size(body), max_pixels)
        if detected == "HEIF":
            _register_heif()
        if detected == "AVIF" and not AvifImagePlugin.SUPPORTED:
            raise _unsupported_error("this installation of Pillow reads no AVIF; convert it")

        if detected == "JPEG":
            for marker, _ in jpeg_segments(body):
                # Libjpeg does not tell whether the data of arithmetic frames are complete.
                if marker in ARITHMETIC_FRAMES:
                    reason = (
                        "JPEG files with the arithmetic code are not accepted; "
                        "use the Huffman code"
                    )
                    raise _unsupported_error(reason)
                if marker in FRAMES or marker == SCAN:
                    break

        image = Image.open(io.BytesIO(without_metadata(body)), formats=(detected,))
        _check_dimensions(image.size, max_pixels)
        if detected == "JPEG":
            image.info.update(_jpeg_orientation_info(body).items())

        if detected in {"HEIF", "AVIF"}:  # their decoders may allocate all images of the file
            for width, height in ITEM_SIZE.findall(body):
                _check_dimensions(
                    (int.from_bytes(width, "big"), int.from_bytes(height, "big")), max_pixels
                )
        correct_transparency_info(image)
    except Exception as error:  # untrusted bytes: a parser may raise anything
        raise image_error(error, max_pixels) from error
    return image


def without_metadata(body: bytes) -> bytes:
    """Leave out what the decoder of the JPEG, PNG or GIF file *body* does not need for the first frame.

    Pillow would parse it, and refuse the image if that part is damaged or large. A PNG keeps
    what tells the orientation.
    """
    find_unneeded = {
        b"\xff\xd8": _jpeg_metadata,
        b"\x89P": _png_metadata,
        b"GI": _gif_metadata,
    }.get(body[:2])
    if find_unneeded is None:
        return body

    # Join what is between the unneeded ranges.
    needed = []
    begin = 0
    for start, end in find_unneeded(body):
        needed.append(body[begin:start])
        begin = end
    needed.append(body[begin:])
    return b"".join(needed)


def _jpeg_metadata(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the segments before the first scan that `without_metadata` leaves out."""
    for marker, position in jpeg_segments(body):
        length = int.from_bytes(body[position : position + 2])
        if marker in {SCAN, END} or length < 2 or position + length > len(body):
            return

        if marker != COMMENT and marker not in APPLICATIONS:
            continue

        # The colors depend on few of these; the length counts its own two bytes.
        is_needed = False
        if marker in COLOR_SEGMENTS:
            name, least = COLOR_SEGMENTS[marker]
            is_needed = length - 2 >= least and body.startswith(name, position + 2)
        if not is_needed:
            yield position - MARKER_BYTES, position + length


def _jpeg_orientation_info(body: bytes) -> dict[str, bytes]:
    """Read EXIF and XMP of the JPEG *body*, as Pillow has them in `info`, without parsing all tags."""
    info: dict[str, bytes] = {}
    for start, end in _jpeg_metadata(body):
        content = start + MARKER_BYTES + 2
        if body[start + 1] == APPLICATION_1 and body.startswith(EXIF, content):
            info["exif"] = info.get("exif", EXIF) + body[content + len(EXIF) : end]
        elif body[start + 1] == APPLICATION_1 and body.startswith(XMP, content):
            info["xmp"] = body[content + len(XMP) : end]
    return info


def _png_metadata(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the chunks that `without_metadata` leaves out.

    They are the ancillary chunks that are not needed, or damaged.
    """
    # Chunks follow the signature.
    begin = 8
    remaining = MAX_TEXT  # bytes of texts that may still be unpacked
    while (end := begin + 12 + int.from_bytes(body[begin : begin + 4])) <= len(body):
        name = body[begin + 4 : begin + 8]

        content = slice(begin + 8, end - 4)
        if name == b"IEND" or not name.isalpha():
            return

        # A chunk in lower case is ancillary. Needed are orientation, transparency and, up to
        # `MAX_TEXT`, texts with an orientation.
        if name[:1].islower():
            is_needed = name == b"eXIf"
            if name == b"tRNS":
                color_type = body[25]  # in the first chunk
                least = TRANSPARENCY_BYTES.get(color_type, 0)
                is_needed = content.stop - content.start >= least
            elif name in TEXT_CHUNKS and remaining and TEXTS.match(body, begin + 8):
                used = _count_text(name, body[content], remaining)
                remaining = max(0, remaining - used)
                is_needed = remaining > 0

            checksum = int.from_bytes(body[end - 4 : end])
            if not is_needed or zlib.crc32(body[begin + 4 : end - 4]) != checksum:
                yield begin, end
        begin = end


def png_frames(body: bytes) -> int:
    """Return how many frames the animation of the PNG *body* says it has; 0 without an animation."""
    control = body.find(b"\0\0\0\x08acTL", 0, body.find(b"IDAT"))
    return int.from_bytes(body[control + 8 : control + 12]) if control > 0 else 0


def _gif_metadata(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield begin and end of what `without_metadata` leaves out: control blocks that are too short.

    Pillow fails on them. Only those before the first image are looked for.
    """
    # Behind the signature and the screen, 13 bytes, is the palette if there is one.
    has_palette = body[10] & 0x80
    palette_size = 6 << (body[10] & 7)
    begin = 13 + (palette_size if has_palette else 0)

    while body.startswith(b"!", begin):
        end = begin + 2
        while length := body[end]:
            end += 1 + length
        end += 1

        if body[begin + 1] == CONTROL and body[begin + 2] < CONTROL_BYTES:
            yield begin, end
        begin = end


def _count_text(chunk: bytes, content: bytes, limit: int) -> int:
    """Count the bytes of the text in a *chunk* of a PNG, at most *limit* (PNG specification, 11.3.3).

    A text that is damaged, or compressed by an unknown method, counts as *limit*.
    """
    _keyword, _, text = content.partition(b"\0")

    if chunk == b"iTXt":  # a flag, the method, language, keyword in this language, text
        is_compressed = text[:1] != b"\0"
        method = text[1:2]
        packed = text[2:].split(b"\0", 2)[-1]
    else:  # zTXt has the method before the text; tEXt is not compressed
        is_compressed = chunk == b"zTXt"
        method = text[:1]
        packed = text[1:]

    if not is_compressed:
        return min(len(content), limit)
    if method != b"\0":
        return limit
    try:
        return len(zlib.decompressobj().decompress(packed, limit))
    except zlib.error:
        return limit


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


def detect_format(body: bytes, formats: Collection[str] | None = None) -> str:
    """Detect the format of *body*, as Pillow names it; raises `ImageError` if it is not one of *formats*."""
    detected = find_format(body[:HEAD_BYTES])
    accepted = FORMATS if formats is None else formats
    if any(FORMATS[name] == detected for name in accepted):
        return detected

    advice = f"use {describe_formats(accepted)}"
    if len(set(accepted)) < len(FORMATS):
        advice += " (the setting formats)"

    if not detected:
        raise ImageError(f"this is not an image; {advice}", code="not_an_image", status=415)
    if body.startswith(POINTER):
        raise _unsupported_error(POINTER_ADVICE)
    if converter := find_converter(detected):
        advice += f"; {converter} converts them"
    # Pillow calls HEIC files HEIF.
    shown = "HEIC" if detected == "HEIF" else detected
    raise _unsupported_error(f"{shown} files are not accepted; {advice}")


def _unsupported_error(message: str) -> ImageError:
    return ImageError(message, code="unsupported_format", status=415)


def prepare_decoders() -> None:
    """Import the decoder of HEIC, if it is installed, before the process may no longer open files."""
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
            f'HEIC needs pillow-heif, which is not installed; run: pip install "sopdeploy[{extra}]" ({CAMERA})'
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
