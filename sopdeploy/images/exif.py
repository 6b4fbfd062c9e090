"""The orientation of a photograph in its EXIF data, read without the other tags.

Pillow reads all tags, and they may overlap: 5400 tags of 64 kB each fit into 64 kB and would take 350 MB.
"""

import re
import struct
from typing import Any

from PIL import Image

ORIENTATION, UPRIGHT = 0x0112, 1
ROTATED = range(2, 9)  # orientations that are valid and not upright
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
    order = "<" if data.startswith(b"II") else ">"
    for tag, kind, _, value in _read_tags(data, order):
        if tag == ORIENTATION:
            return int(struct.unpack_from(order + INTEGERS[kind], struct.pack(order + "I", value))[0])
    return None


def _read_tags(data: bytes, order: str) -> list[tuple[int, int, int, int]]:
    """Read (tag, type, count, value or offset) of the first directory; fewer if *data* is cut."""
    if len(data) < 8:
        return []
    (start,) = struct.unpack_from(order + "I", data, 4)
    count = struct.unpack(order + "H", data[start : start + 2])[0] if len(data) >= start + 2 else 0
    entries = data[start + 2 : start + 2 + 12 * count]
    return list(struct.iter_unpack(order + "HHII", entries[: len(entries) // 12 * 12]))
