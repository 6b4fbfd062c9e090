"""Formats and limits of one image, the same in training and service.

Importing this module does not load Pillow; `formats` enforces the limits.
"""

import functools
from collections.abc import Iterable
from importlib.util import find_spec

MAX_BYTES = 20_000_000  # of a file
MAX_PIXELS = 70_000_000  # of an image; phones take photos of 50 and 64 megapixels
# Names in settings, which are also endings of files, and those of Pillow
FORMATS = {
    "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "avif": "AVIF", "heic": "HEIF",
}  # fmt: skip
EXTRAS = {"heic": ("heif", "pillow_heif")}  # what decodes a format: extra of sopdeploy, package


def describe_formats(names: Iterable[str] = FORMATS, last_word: str = "and") -> str:
    """List the formats with *names* of `FORMATS`, by default all: "JPEG, PNG and WebP"."""
    *others, last = ["WebP" if name == "webp" else name.upper() for name in names]
    return f"{', '.join(others)} {last_word} {last}" if others else last


@functools.cache  # a decoder may no longer look for packages
def missing_extra(name: str) -> str:
    """Return the extra of sopdeploy without which this Python cannot decode the format *name*, or ""."""
    extra, package = EXTRAS.get(name, ("", "sopdeploy"))
    return extra if find_spec(package) is None else ""
