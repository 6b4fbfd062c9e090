"""The segments of JPEG files, which say where the data of a scan begin."""

import re
from collections.abc import Iterator

FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, sequential, progressive
SCAN = 0xDA
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of segments with a length; bytes between are skipped
MARKER_BYTES = 2


def jpeg_segments(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each JPEG segment and the position of its length.

    The search for the segment after a scan skips the data of the scan.
    """
    position = 2
    while marker := MARKER.search(body, position):
        position = marker.end()
        yield body[position - 1], position
        position += int.from_bytes(body[position : position + 2], "big")
