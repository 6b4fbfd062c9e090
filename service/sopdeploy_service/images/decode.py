"""Decode the bytes of a request to the network's input.

Each step is cheaper than the next and may reject the image: opening the file (`sopdeploy.images.formats`, as
in training), decoding, preprocessing. The bytes decide the format. Invalid bytes raise only `ImageError`.
"""

import io
import itertools
import random
import re
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.formats import (
    MARKER_BYTES,
    SCAN,
    check_decoded_size,
    image_error,
    jpeg_segments,
    open_image,
)
from sopdeploy.images.pixels import list_changes, preprocess_image
from sopdeploy.images.preprocess import Preprocess

ANIMATED = {"GIF", "PNG", "WEBP"}  # the second image of a JPEG is a thumbnail
FILL_COLOR = {127, 128}  # libjpeg's gray for missing data; Pillow inverts it in CMYK
NOISE = random.Random(0).randbytes(2048).replace(b"\xff", b"")  # noqa: S311 - data that changes pixels
RESTART = re.compile(rb"\xff([\xd0-\xd7])")  # a restart marker, number 0 to 7 in turn
FIRST_RESTART, NUM_RESTARTS = 0xD0, 8


class Decoded(NamedTuple):
    """The network's input (crop, crop, 3) uint8, and warning codes for changes made while decoding."""

    pixels: NDArray[np.uint8]
    warnings: tuple[str, ...]


def decode(
    body: bytes,
    preprocess: Preprocess,
    *,
    max_bytes: int,
    max_pixels: int,
    formats: Collection[str] | None = None,
) -> Decoded:
    """Decode the file *body* to the pixels of training and apply *preprocess*.

    Of an animation, this is the first frame. *formats* (None: all) are accepted. Raises `ImageError`.
    """
    if not body:
        raise ImageError("the body is empty; send an image file", code="empty_body", status=400)
    with open_image(body, max_bytes=max_bytes, max_pixels=max_pixels, formats=formats) as image:
        try:
            size = image.size
            image.load()
            check_decoded_size(image, size)
            if image.format in {"JPEG", "MPO"} and is_truncated(image, body):  # MPO: has further images
                raise EOFError("the data ends before the last pixel")
            pixels = preprocess_image(image, preprocess)
            warnings = list(list_changes(image, preprocess))
            if image.format in ANIMATED and _has_more_frames(image):
                warnings.append("first_frame_only")
        except Exception as error:  # untrusted bytes: a parser or decoder may raise anything
            raise image_error(error, max_pixels) from error
        return Decoded(pixels, tuple(sorted(warnings)))


def is_truncated(image: Image.Image, body: bytes) -> bool:
    """Check whether the data of the JPEG *body*, decoded as *image*, ends before the last pixel.

    libjpeg fills missing pixels with gray, and Pillow hides its warning. If the last pixel has this gray, the
    image is decoded twice more at 1/8 scale, once with noise appended to its first scan. The noise changes
    the pixels of a truncated file and has no effect on a complete one.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if not FILL_COLOR.issuperset(last if isinstance(last, tuple) else (last,)):
        return False
    scan_end = len(body)
    for (marker, _), (_, next_begin) in itertools.pairwise(jpeg_segments(body)):
        if marker == SCAN:
            scan_end = next_begin - MARKER_BYTES  # the content of the next segment begins after its marker
            break
    # A decoder that expects a certain restart marker skips everything before it. So the noise is repeated
    # after each of the markers, in their order, beginning with the one that follows the last in the scan.
    restarts = RESTART.findall(body[:scan_end])
    due = restarts[-1][0] - FIRST_RESTART + 1 if restarts else 0  # number of the next marker, modulo 8
    noise = NOISE
    for number in range(due, due + NUM_RESTARTS):
        noise += bytes([0xFF, FIRST_RESTART + number % NUM_RESTARTS]) + NOISE
    thumbnails = []
    for data in (body, body[:scan_end] + noise + body[scan_end:]):
        thumbnail = Image.open(io.BytesIO(data), formats=("JPEG",))
        thumbnail.draft(thumbnail.mode, (1, 1))  # at the smallest scale, 1/8
        thumbnails.append(thumbnail.tobytes())
    return thumbnails[0] != thumbnails[1]


def _has_more_frames(image: Image.Image) -> bool:
    """Tell whether *image* has several frames, even damaged ones."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # untrusted bytes after the first frame
        return True
