"""The structure of JPEG files, read before anything is decoded.

Pillow reads headers segment by segment, in Python: 19 MB of empty segments take seconds.
"""

import re
from collections.abc import Iterator

from sopdeploy.errors import ImageError
from sopdeploy.images.exif import check_tags

FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, sequential, progressive
UNSUPPORTED_FRAMES = {0xC3: "lossless", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded"}
SCAN, EXIF, PROGRESSIVE = 0xDA, 0xE1, 0xC2
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of segments with a length; bytes between are skipped
MARKER_BYTES = 2
MAX_SEGMENTS = 1000  # 20 MB of metadata are 310 segments
TOO_MANY_SEGMENTS = "the image has too many segments"


def check_segments(body: bytes) -> None:
    """Raise `ImageError` for a JPEG *body* of a rare coding, which not every build of libjpeg reads.

    Also for too many segments, and for EXIF data that needs much memory.
    """
    is_progressive = False
    for number, (marker, start) in enumerate(jpeg_segments(body)):
        if number == MAX_SEGMENTS:
            raise ImageError(TOO_MANY_SEGMENTS, code="damaged_image", status=422)
        if marker in UNSUPPORTED_FRAMES:
            message = f"{UNSUPPORTED_FRAMES[marker]} JPEG files are not accepted; save it as an ordinary JPEG"
            raise ImageError(message, code="unsupported_format", status=415)
        if marker == EXIF and body[start + 2 : start + 8] == b"Exif\0\0":
            check_tags(body[start + 8 : start + int.from_bytes(body[start : start + 2], "big")])
        elif marker == PROGRESSIVE:
            is_progressive = True
        elif marker == SCAN and not is_progressive:  # has all data
            break


def jpeg_segments(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each JPEG segment and the position of its length.

    The search for the segment after a scan skips the data of the scan.
    """
    position = 2
    while marker := MARKER.search(body, position):
        position = marker.end()
        yield body[position - 1], position
        position += int.from_bytes(body[position : position + 2], "big")
