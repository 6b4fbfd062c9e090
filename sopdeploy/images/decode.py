"""From the bytes of an image file to pixels: the one way of training, evaluation, export and service.

So a network is never trained on files that the server refuses, nor on other pixels than the
server gives it. Each step is cheaper than the next and may reject the image: opening the file
(`formats`), decoding at the scale that the rules allow, fitting. The bytes decide the format.
Invalid bytes raise only `ImageError`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image

from sopdeploy.images.formats import (
    check_decoded_size,
    image_error,
    open_image,
)
from sopdeploy.images.limits import MAX_BYTES, MAX_PIXELS
from sopdeploy.images.pixels import (
    UPRIGHT,
    ChooseView,
    View,
    center_view,
    exif_orientation,
    list_changes,
    preprocess_image,
    to_rgb,
    turned_size,
)
from sopdeploy.images.preprocess import Pixels, Preprocess

ANIMATED = {"GIF", "WEBP", "AVIF", "PNG"}  # the second image of a JPEG is a thumbnail
JPEG = {"JPEG", "MPO"}  # MPO: has further images


class Decoded(NamedTuple):
    """The network's input (crop, crop, 3) uint8, and warning codes for changes made while decoding."""

    pixels: Pixels
    warnings: tuple[str, ...]


class _Loaded(NamedTuple):
    """The upright `size` of an image, which is decoded at 1/`scale`, and what is seen of it."""

    size: tuple[int, int]
    scale: int
    view: View


def decode(
    body: bytes,
    rules: Preprocess,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    choose_view: ChooseView | None = None,
) -> Decoded:
    """Decode the file *body* to the pixels that a network with *rules* reads; raises `ImageError`.

    The limits are those of `open_image`. Of an animation, this is the first frame. With
    *choose_view*, these are the pixels of its view.
    """
    limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
    with (
        open_image(body, **limits) as image,
        _loaded(image, rules, max_pixels, choose_view) as (size, scale, view),
    ):
        # With full decoding, the whole image is resized, unless a view was chosen.
        has_own_view = choose_view is not None or rules.decoding != "full"
        own_view = view if has_own_view else None
        pixels = preprocess_image(image, rules, own_view, size, scale)

        warnings = list(list_changes(image, rules))
        if _has_more_frames(image):
            warnings.append("first_frame_only")
        return Decoded(pixels, tuple(sorted(warnings)))


def decode_upright(body: bytes, rules: Preprocess) -> Image.Image:
    """Decode the file *body* to upright RGB, at the scale that *rules* allow; raises `ImageError`."""
    with (
        open_image(body) as image,
        _loaded(image, rules, MAX_PIXELS, choose_view=None),
    ):
        return to_rgb(image, rules)


@contextmanager
def _loaded(
    image: Image.Image,
    rules: Preprocess,
    max_pixels: int,
    choose_view: ChooseView | None,
) -> Iterator[_Loaded]:
    """Decode the opened *image* at the smallest scale that *rules* allow for what is seen of it.

    An error here or in the block becomes an `ImageError`.
    """
    try:
        # Formats that are decoded at one scale only. Of a PNG, EXIF may follow the pixels.
        opened_size = image.size
        scale = 1
        if image.format not in JPEG:
            image.load()
            check_decoded_size(image, opened_size)

        # What is seen of the upright image; of a JPEG, it decides the scale.
        orientation = exif_orientation(image) if rules.exif_orientation else UPRIGHT
        size = turned_size(opened_size, orientation)
        view = center_view(size, rules) if choose_view is None else choose_view(size)

        if image.format in JPEG:
            if rules.decoding != "full" and view.scale > 1:
                scale = view.scale
                image.draft(None, (image.width // scale, image.height // scale))
            image.load()
        yield _Loaded(size, scale, view)
    except Exception as error:  # untrusted bytes: a parser or decoder may raise anything
        raise image_error(error, max_pixels) from error


def _has_more_frames(image: Image.Image) -> bool:
    """Tell whether *image* has several frames, even damaged ones."""
    try:
        return image.format in ANIMATED and bool(getattr(image, "is_animated", False))
    except Exception:  # untrusted bytes after the first frame
        return True
