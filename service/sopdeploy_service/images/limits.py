"""How many parts a picture may have: bytes that are cheap to send must not be dear to read.

Pillow reads headers part by part, in Python: 19 MB of empty segments hold the interpreter for seconds. And
each scan of a JPEG goes over all of its pixels, so 240 kB of empty scans cost half a minute of a decoder.
"""

import io
import random
import re
from collections.abc import Iterator

from PIL import Image

from sopdeploy.errors import ImageError

WANTED = "send a JPEG, PNG, WebP, BMP or GIF file"
ODD_JPEGS = {0xC3: "lossless", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded"}  # by their frame header
SCAN, END, SEQUENTIAL = 0xDA, 0xD9, {0xC0, 0xC1}
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # that has a length; libjpeg too skips what is between
MOST_SCANS = 100  # progressive files have about ten
MOST_SEGMENTS = 10_000
READS = 10_000  # of small files; a PNG in pieces of 8 kB and a GIF in blocks of 255 bytes need far fewer
BYTES_PER_READ = 100
BMP_READS = 2_000_000  # a run-length-coded one is decoded in Python, a byte or two at a time


class LimitedReader(io.BytesIO):
    """The bytes of an image of format *name*, of which Pillow may ask for a part so often only.

    Beyond that `read` raises `ImageError`.
    """

    def __init__(self, body: bytes, name: str) -> None:
        super().__init__(body)
        self._reads = BMP_READS if name == "BMP" else READS + len(body) // BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next *size* bytes."""
        self._reads -= 1
        if self._reads < 0:
            raise too_many_parts()
        return super().read(size)


def refuse_odd_jpeg(body: bytes) -> None:
    """Raise `ImageError` for a coding that not every build of libjpeg reads, or one with too many parts."""
    scans = components = 0  # components of a file that may have all of them in one scan
    for number, (marker, place) in enumerate(segments(body)):
        if number == MOST_SEGMENTS:
            raise too_many_parts()
        if marker in ODD_JPEGS:
            what = f"{ODD_JPEGS[marker]} JPEG files are not accepted; {WANTED}"
            raise ImageError(what, code="unsupported_format", status=415)
        if marker in SEQUENTIAL:
            components = int.from_bytes(body[place + 7 : place + 8], "big")
        if marker == END or (marker == SCAN and body[place + 2 : place + 3] == bytes([components])):
            return
        scans += marker == SCAN
        if scans > MOST_SCANS:
            raise too_many_parts()


def segments(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment of the JPEG *body*, and the place behind it, where its length stands.

    After a scan comes the next segment behind its data.
    """
    place = 2
    while found := MARKER.search(body, place):
        place = found.end()
        yield body[place - 1], place
        place += int.from_bytes(body[place : place + 2], "big")


def too_many_parts() -> ImageError:
    """Return the error of a picture in more pieces than any program writes."""
    return ImageError("the image has more parts than a picture needs", code="damaged_image", status=422)


MARKER_BYTES = 2
NO_DATA = {127, 128}  # libjpeg's grey where there is none; in CMYK Pillow turns it round
NOISE = random.Random(0).randbytes(2048).replace(b"\xff", b"")  # noqa: S311 - data that paints something
SHORT_ADOBE = re.compile(rb"\xff\xee(\0[\x07\x08]Adobe)")
RESTART = re.compile(rb"\xff([\xd0-\xd7])")


def is_truncated(picture: Image.Image, body: bytes) -> bool:
    """Say whether the pixels of a JPEG *picture*, whose file is *body*, go on where its data has ended.

    libjpeg paints the rest grey, and Pillow hides its warning. So where the last pixel is that grey, and only
    there, the picture is decoded twice more at an eighth of its size, once with more data behind its first
    scan: that is passed over in a whole file, and painted in one that lacks data.
    """
    last = picture.getpixel((picture.width - 1, picture.height - 1))
    if not NO_DATA.issuperset(last if isinstance(last, tuple) else (last,)):
        return False
    end = end_of_first_scan(body)
    return small(body) != small(body[:end] + more_data(body[:end]) + body[end:])


def end_of_first_scan(body: bytes) -> int:
    """Return where the data of the first scan of *body* ends, a JPEG that was decoded."""
    before = None
    for marker, place in segments(body):
        if before == SCAN:
            return place - MARKER_BYTES
        before = marker
    return len(body)


def more_data(before: bytes) -> bytes:
    """Return noise that a decoder takes for the data after *before*, be a restart due next or not."""
    restarts = RESTART.findall(before)
    due = restarts[-1][0] + 1 if restarts else 0
    return NOISE + b"".join(b"\xff%c" % (0xD0 | (due + count) & 7) + NOISE for count in range(8))


def small(body: bytes) -> bytes:
    """Return the pixels of the JPEG *body* at an eighth of its size."""
    picture = Image.open(io.BytesIO(without_short_adobe(body)), formats=("JPEG",))
    picture.draft(picture.mode, (1, 1))
    return picture.tobytes()


def without_short_adobe(body: bytes) -> bytes:
    """Return the JPEG *body*, its notes of Adobe that are too short marked as another program's.

    Pillow fails on them; libjpeg and other decoders take no note of any that is shorter than 12 bytes.
    """
    return SHORT_ADOBE.sub(b"\xff\xef\\1", body)
