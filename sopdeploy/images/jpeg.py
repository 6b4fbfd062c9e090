"""The structure of JPEG files, read before anything is decoded.

Pillow reads headers segment by segment, in Python: 19 MB of empty segments hold the interpreter lock for
seconds. Each scan of a JPEG visits all coefficients of its components, even a scan of 10 bytes that changes
none. So segments are limited by number, and scans by the time that their visits take.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from sopdeploy.errors import ImageError
from sopdeploy.images.exif import check_tags

FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, sequential, progressive
UNSUPPORTED_FRAMES = {0xC3: "lossless", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded"}
SCAN, _END, EXIF, PROGRESSIVE = 0xDA, 0xD9, 0xE1, 0xC2
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of segments with a length; bytes between are skipped
MARKER_BYTES = 2
MAX_SEGMENTS = 1000  # 20 MB of metadata are 310 segments
# Nanoseconds per coefficient of a scan without information, and of one that refines coefficients
SCAN_NS, REFINE_NS = 0.4, 2.2
MAX_SCAN_NS = 4e9  # an ordinary progressive file of 70 megapixels needs 1.3e9
TOO_MANY_SEGMENTS = "the image has too many segments"
COEFFICIENT_BYTES = 2


class Scans(NamedTuple):
    """Cost of the scans of a JPEG: *buffer* is in bytes per pixel, 0 if the pixels are decoded in one pass.

    *ns* is the time in addition to that of one pass.
    """

    buffer: float
    ns: float


def read_scans(body: bytes) -> Scans:
    """Compute the cost of the scans in the JPEG *body*.

    Raises `ImageError` for rare codings, which not every build of libjpeg reads, for too many segments, and
    for scans or EXIF data that take too long.
    """
    ns, pixels, marker_of_frame = 0.0, 0, 0
    areas: dict[int, float] = {}  # of the components, relative to that of the image
    for number, (marker, start) in enumerate(jpeg_segments(body)):
        if number == MAX_SEGMENTS or ns > MAX_SCAN_NS:
            raise ImageError(TOO_MANY_SEGMENTS, code="damaged_image", status=422)
        if marker in UNSUPPORTED_FRAMES:
            message = f"{UNSUPPORTED_FRAMES[marker]} JPEG files are not accepted; save it as an ordinary JPEG"
            raise ImageError(message, code="unsupported_format", status=415)
        if marker in FRAMES:
            marker_of_frame = marker
            pixels = int.from_bytes(body[start + 3 : start + 5], "big")
            pixels *= int.from_bytes(body[start + 5 : start + 7], "big")
            areas = _areas(body[start + 8 : start + 8 + 3 * body[start + 7]])
        elif marker == EXIF and body[start + 2 : start + 8] == b"Exif\0\0":
            check_tags(body[start + 8 : start + int.from_bytes(body[start : start + 2], "big")])
        elif marker == SCAN:
            components = body[start + 3 : start + 3 + 2 * body[start + 2] : 2]
            if marker_of_frame != PROGRESSIVE and len(components) == len(areas):
                return Scans(0, 0)  # a sequential file with all components in one scan has no further scan
            refines = body[start + 5 + 2 * body[start + 2] : start + 6 + 2 * body[start + 2]] >= b"\x10"
            area = sum(areas.get(component, 0) for component in components)
            ns += pixels * area * (REFINE_NS if refines else SCAN_NS)
        elif marker == _END:
            break
    return Scans(COEFFICIENT_BYTES * sum(areas.values()), ns)


def _areas(components: bytes) -> dict[int, float]:
    """Return the area of each component by its id; 1 is that of the image."""
    sampling = {
        components[at]: (components[at + 1] >> 4, components[at + 1] & 15)
        for at in range(0, len(components) - 2, 3)
    }
    widest = max((across for across, _ in sampling.values()), default=1) or 1
    tallest = max((down for _, down in sampling.values()), default=1) or 1
    return {name: across * down / (widest * tallest) for name, (across, down) in sampling.items()}


def jpeg_segments(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each JPEG segment and the position of its length.

    The search for the segment after a scan skips the data of the scan.
    """
    position = 2
    while marker := MARKER.search(body, position):
        position = marker.end()
        yield body[position - 1], position
        position += int.from_bytes(body[position : position + 2], "big")
