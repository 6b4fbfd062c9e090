"""The orientation of a photograph in its EXIF data, read without the other tags.

Pillow reads all tags, and they may overlap: 5400 tags of 64 kB each fit into 64 kB and would take 350 MB.
"""

import re
import struct
from typing import Any

from PIL import Image

from sopdeploy.errors import ImageError

ORIENTATION, UPRIGHT = 0x0112, 1
ROTATED = range(2, 9)  # orientations that are valid and not upright
MAX_TAGS, MAX_TAG_BYTES = 1000, 1_000_000
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # by type
INTEGERS = {1: "B", 3: "H", 4: "I"}
TEXT_PROFILE = "Raw profile type exif"  # in the text of a PNG
XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
PNG_CHUNKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # they may follow the pixels


def exif_orientation(image: Image.Image) -> int:
    """Read the orientation of *image* from EXIF, else from XMP; 1 (upright) if absent or unreadable.

    Of a PNG it loads the pixels, because the tags may follow them.
    """
    try:
        if image.format == "PNG" and "exif" not in image.info:
            image.load()
        info: dict[Any, Any] = image.info
        data = info.get("exif")
        if data is None and TEXT_PROFILE in info:
            data = bytes.fromhex("".join(info[TEXT_PROFILE].split("\n")[3:]))
        found = _read_orientation(data) if data else None
        if found is None:
            xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
            match = XMP.search(xmp if isinstance(xmp, bytes) else xmp.encode())
            found = int(match[1]) if match else UPRIGHT
    except Exception:  # damaged tags fail in many ways
        return UPRIGHT
    else:
        return found


def _read_orientation(data: bytes) -> int | None:
    data = data.removeprefix(b"Exif\0\0")
    order = _byte_order(data)
    for tag, kind, _, value in _read_tags(data, order):
        if tag == ORIENTATION:
            return int(struct.unpack_from(order + INTEGERS[kind], struct.pack(order + "I", value))[0])
    return None


def check_tags(data: bytes) -> None:
    """Raise `ImageError` for EXIF *data* whose tags need more memory than those of a photograph."""
    tags = _read_tags(data, _byte_order(data))
    if len(tags) > MAX_TAGS or sum(_SIZES.get(kind, 1) * count for _, kind, count, _ in tags) > MAX_TAG_BYTES:
        message = f"the EXIF data has more than {MAX_TAGS} tags or {MAX_TAG_BYTES} bytes; remove it"
        raise ImageError(message, code="too_large", status=413)


def _byte_order(data: bytes) -> str:
    return "<" if data.startswith(b"II") else ">"


def _read_tags(data: bytes, order: str) -> list[tuple[int, int, int, int]]:
    """Read (tag, type, count, value or offset) of the first directory; fewer if *data* is cut."""
    if len(data) < 8:
        return []
    (start,) = struct.unpack_from(order + "I", data, 4)
    count = struct.unpack(order + "H", data[start : start + 2])[0] if len(data) >= start + 2 else 0
    entries = data[start + 2 : start + 2 + 12 * count]
    return list(struct.iter_unpack(order + "HHII", entries[: len(entries) // 12 * 12]))
