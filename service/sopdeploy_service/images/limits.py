"""Limit segments, scans and reads so that small files cannot take seconds to decode.

Pillow reads headers segment by segment, in Python: 19 MB of empty segments hold the interpreter lock for
seconds. Each scan of a JPEG visits all of its pixels, so 240 kB of empty scans take half a minute to decode.
"""

import io
import random
import re
from collections.abc import Iterator

from PIL import Image

from sopdeploy.errors import ImageError

ACCEPTED = "send a JPEG, PNG, WebP, BMP or GIF file"
UNSUPPORTED_FRAMES = {0xC3: "lossless", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded"}  # by SOF marker
SCAN, END, SEQUENTIAL = 0xDA, 0xD9, {0xC0, 0xC1}
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # with a length; like libjpeg, skip bytes in between
MARKER_BYTES = 2
MAX_SCANS = 100  # progressive files have about ten
MAX_SEGMENTS = 10_000
MAX_READS = 10_000  # of a small file; a PNG in 8 kB chunks or a GIF in 255-byte blocks needs far fewer
BYTES_PER_READ = 100
MAX_BMP_READS = 2_000_000  # a run-length-encoded BMP is decoded in Python, one or two bytes at a time
FILL_COLOR = {127, 128}  # libjpeg's gray for missing data; Pillow inverts it in CMYK
NOISE = random.Random(0).randbytes(2048).replace(b"\xff", b"")  # noqa: S311 - data that changes pixels
SHORT_ADOBE = re.compile(rb"\xff\xee(\0[\x07\x08]Adobe)")
RESTART = re.compile(rb"\xff([\xd0-\xd7])")


class LimitedReader(io.BytesIO):
    """The bytes of a file of format *kind*; `read` raises `ImageError` after too many calls."""

    def __init__(self, body: bytes, kind: str) -> None:
        super().__init__(body)
        self._reads = MAX_BMP_READS if kind == "BMP" else MAX_READS + len(body) // BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next *size* bytes."""
        self._reads -= 1
        if self._reads < 0:
            raise _too_many_parts_error()
        return super().read(size)


def check_jpeg_segments(body: bytes) -> None:
    """Raise `ImageError` for too many segments or scans and for rare codings.

    Not every build of libjpeg reads lossless and arithmetic-coded files.
    """
    scans = components = 0  # `components` of a file that may have all of them in one scan
    for number, (marker, start) in enumerate(_segments(body)):
        if number == MAX_SEGMENTS:
            raise _too_many_parts_error()
        if marker in UNSUPPORTED_FRAMES:
            message = f"{UNSUPPORTED_FRAMES[marker]} JPEG files are not accepted; {ACCEPTED}"
            raise ImageError(message, code="unsupported_format", status=415)
        if marker in SEQUENTIAL:
            components = int.from_bytes(body[start + 7 : start + 8], "big")
        if marker == END or (marker == SCAN and body[start + 2 : start + 3] == bytes([components])):
            return
        scans += marker == SCAN
        if scans > MAX_SCANS:
            raise _too_many_parts_error()


def _segments(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each JPEG segment and the position of its length.

    The segment after a scan is found behind the data of the scan.
    """
    position = 2
    while found := MARKER.search(body, position):
        position = found.end()
        yield body[position - 1], position
        position += int.from_bytes(body[position : position + 2], "big")


def _too_many_parts_error() -> ImageError:
    return ImageError("the image has too many segments", code="damaged_image", status=422)


def is_truncated(image: Image.Image, body: bytes) -> bool:
    """Check whether the data of a JPEG *body* ends before its last pixel.

    libjpeg fills missing pixels with gray and Pillow hides its warning. Only if the last pixel has that gray,
    the image is decoded twice more at 1/8 scale, once with noise appended to its first scan: a complete file
    ignores the noise, a truncated one shows it.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if not FILL_COLOR.issuperset(last if isinstance(last, tuple) else (last,)):
        return False
    end, before = len(body), None
    for marker, start in _segments(body):
        if before == SCAN:
            end = start - MARKER_BYTES
            break
        before = marker
    # A decoder that expects a restart marker reads noise only after it, so all eight markers follow in turn.
    restarts = RESTART.findall(body[:end])
    due = restarts[-1][0] + 1 if restarts else 0
    noise = NOISE + b"".join(b"\xff%c" % (0xD0 | (due + count) & 7) + NOISE for count in range(8))
    return _thumbnail(body) != _thumbnail(body[:end] + noise + body[end:])


def _thumbnail(body: bytes) -> bytes:
    """Return the pixels of a JPEG at 1/8 scale."""
    image = Image.open(io.BytesIO(without_short_adobe(body)), formats=("JPEG",))
    image.draft(image.mode, (1, 1))
    return image.tobytes()


def without_short_adobe(body: bytes) -> bytes:
    """Turn Adobe segments shorter than 12 bytes into those of an unknown application.

    Pillow fails on them; libjpeg and other decoders ignore them.
    """
    return SHORT_ADOBE.sub(b"\xff\xef\\1", body)
