"""What Pillow does not say of a JPEG, that its data ends before its pixels, and what it need not refuse."""

import io
import random
import re

from PIL import Image

from sopdeploy_service.parts import SCAN, segments

MARKER_BYTES = 2
NO_DATA = {127, 128}  # libjpeg's grey where there is none; in CMYK Pillow turns it round
NOISE = random.Random(0).randbytes(2048).replace(b"\xff", b"")  # noqa: S311 - data that paints something
SHORT_ADOBE = re.compile(rb"\xff\xee(\0[\x07\x08]Adobe)")
RESTART = re.compile(rb"\xff([\xd0-\xd7])")


def lacks_data(picture: Image.Image, body: bytes) -> bool:
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
