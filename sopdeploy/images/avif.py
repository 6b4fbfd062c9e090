"""The frame sizes in an AVIF file, read before anything is decoded, and whether it has film grain.

The size in the header of an AVIF file need not be that of its AV1 frames: a decoder allocates the frames and
scales them. A file of 450 kB that says 64 x 64 can hold a frame of 268 megapixels. libavif decodes it, and
Pillow has no option to limit it, so this module reads the sizes from the AV1 sequence headers. Film grain,
which is noise that a decoder adds to a copy of the frame, is not accepted.

Sources: ISO/IEC 14496-12, sections 8.11.3 (iloc) and 8.11.6 (iinf); AV1 Bitstream Specification, sections
5.3 (OBUs), 5.5.1 (sequence header) and 5.5.2 (color config).
"""

from collections.abc import Iterator

from sopdeploy.errors import ImageError

MAX_ITEMS = 1000  # images, tiles and metadata in one file
MAX_UNITS = 10_000  # OBUs
SEQUENCE_HEADER = 1
DAMAGED = "damaged AVIF file"
_Box = tuple[bytes, tuple[int, int]]  # type, and range of the content


def frame_sizes(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield an upper bound (width, height) of the frames of each AV1 image in the AVIF file *body*.

    Raises `ImageError` for an animated image or film grain, and `ValueError` for a damaged file or one with
    more parts than a photograph has.
    """
    file_boxes = list(_boxes(body, 0, len(body)))
    if any(kind == b"moov" for kind, _ in file_boxes):
        message = "animated AVIF files are not accepted; save one frame"
        raise ImageError(message, code="unsupported_format", status=415)
    start, end = _only(file_boxes, b"meta")
    boxes = list(_boxes(body, start + 4, end))
    av1_items = _items_of_type(body, *_only(boxes, b"iinf"), b"av01")
    if b"idat" not in dict(boxes):  # optional: item data inside `meta`
        boxes.append((b"idat", (0, 0)))
    for item, data in _item_data(body, *_only(boxes, b"iloc"), _only(boxes, b"idat")):
        if item in av1_items:
            yield from _sequence_sizes(data)


def _only(boxes: list[_Box], kind: bytes) -> tuple[int, int]:
    """Find the range of the only box of *kind*; readers differ in which of two they take."""
    ranges = [content for name, content in boxes if name == kind]
    if len(ranges) != 1:
        raise ValueError(DAMAGED)
    return ranges[0]


def _boxes(body: bytes, start: int, end: int) -> Iterator[_Box]:
    """Yield the type and the range of the content of each box between *start* and *end*."""
    for _ in range(MAX_ITEMS):
        if start >= end:
            return
        size, head = int.from_bytes(body[start : start + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(body[start + 8 : start + 16], "big"), 16
        stop = end if size == 0 else start + size
        if stop > end or stop < start + head:
            raise ValueError(DAMAGED)
        yield body[start + 4 : start + 8], (start + head, stop)
        start = stop
    raise ValueError("too many boxes")


def _items_of_type(body: bytes, start: int, end: int, item_type: bytes) -> set[int]:
    """Find the ids of the items of the type *item_type* in the item information box."""
    items = set()
    for _, (entry, _) in _boxes(body, start + (6 if body[start] == 0 else 8), end):
        length = 2 if body[entry] == 2 else 4  # version 3 has ids of 32 bits
        position = entry + 4 + length + 2
        if body[position : position + 4] == item_type:
            items.add(int.from_bytes(body[entry + 4 : entry + 4 + length], "big"))
    return items


def _item_data(body: bytes, start: int, end: int, idat: tuple[int, int]) -> Iterator[tuple[int, bytes]]:
    """Yield the id and the bytes of each item in the item location box; *idat* is the range of that box."""
    position = start + 6

    def number(length: int) -> int:
        nonlocal position
        position += length
        if position > end:
            raise ValueError(DAMAGED)
        return int.from_bytes(body[position - length : position], "big")

    version = body[start]
    # the numbers of bytes in each field; 0 for a field that is absent
    offset_bytes, length_bytes, base_bytes = body[start + 4] >> 4, body[start + 4] & 15, body[start + 5] >> 4
    index_bytes = body[start + 5] & 15 if version > 0 else 0
    items = number(4 if version == 2 else 2)
    if items > MAX_ITEMS:
        raise ValueError("too many items")
    for _ in range(items):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version > 0 else 0  # 0: offsets in the file, 1: in the idat box
        number(2)  # data reference
        base, extents, parts = number(base_bytes), number(2), []
        if method > 1 or extents > MAX_ITEMS:
            raise ValueError("an item made of other items, or of too many parts")
        for _ in range(extents):
            number(index_bytes)
            offset, length = base + number(offset_bytes), number(length_bytes)
            first, limit = (offset, len(body)) if method == 0 else (idat[0] + offset, idat[1])
            parts.append(body[first : min(limit, first + length) if length else limit])  # 0: up to the end
        yield item, b"".join(parts)


def _sequence_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the size in each sequence header of the OBUs in *data*."""
    position = 0
    for _ in range(MAX_UNITS):
        if position >= len(data):
            return
        header = data[position]
        position += 2 if header & 4 else 1  # an extension follows
        size = len(data) - position
        if header & 2:
            size, shift = 0, 0
            while True:
                if position >= len(data) or shift > 28:
                    raise ValueError(DAMAGED)
                size |= (data[position] & 127) << shift
                position, shift = position + 1, shift + 7
                if data[position - 1] < 128:
                    break
        if header >> 3 & 15 == SEQUENCE_HEADER:
            yield _sequence_size(data[position : position + size])
        position += size
    raise ValueError("too many OBUs")


class _Bits:
    """The first bits of a header, the most significant bit first."""

    def __init__(self, header: bytes) -> None:
        self._bits, self._left = int.from_bytes(header[:64], "big"), 8 * min(64, len(header))

    def read(self, count: int = 1) -> int:
        """Read a number of *count* bits."""
        self._left -= count
        if self._left < 0:
            raise ValueError(DAMAGED)
        return self._bits >> self._left & ((1 << count) - 1)


def _sequence_size(header: bytes) -> tuple[int, int]:
    """Read the size in a sequence header: of its still picture, or the largest that a frame can have.

    Raises `ImageError` if the frames have film grain.
    """
    bits = _Bits(header)
    profile = bits.read(3)
    bits.read()  # still_picture
    reduced = bits.read()
    if reduced:
        bits.read(5)  # level
    else:
        if bits.read():  # timing information, which images do not have
            raise ValueError("timing information")
        delays = bits.read()
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            if bits.read(5) > 7:
                bits.read()
            if delays and bits.read():
                bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    width, height = bits.read(width_bits) + 1, bits.read(height_bits) + 1
    if not reduced:
        _skip_tools_between_frames(bits)
        width, height = 1 << width_bits, 1 << height_bits  # a frame header may contain any of so many bits
    else:
        bits.read(3)  # superblocks, filters
    bits.read(3)  # superres, cdef, restoration
    _skip_colors(bits, profile)
    if bits.read():
        message = "AVIF files with film grain are not accepted; save it without"
        raise ImageError(message, code="unsupported_format", status=415)
    return width, height


def _skip_tools_between_frames(bits: _Bits) -> None:
    """Skip the part of a sequence header that still pictures do not have."""
    if bits.read():  # frame ids
        bits.read(7)
    bits.read(7)  # superblocks, filters, prediction between frames
    ordered = bits.read()
    bits.read(2 * ordered)
    if bits.read() or bits.read():  # screen content tools: chosen per frame, or always
        _ = bits.read() or bits.read()  # integer motion vectors: chosen per frame, or always
    bits.read(3 * ordered)


def _skip_colors(bits: _Bits, profile: int) -> None:
    """Skip the color config of a sequence header."""
    deep = bits.read()
    twelve = profile == 2 and deep and bits.read()
    gray = profile != 1 and bits.read()
    described = (bits.read(8), bits.read(8), bits.read(8)) if bits.read() else ()
    if gray:
        bits.read()  # range
        return
    if described != (1, 13, 0):  # sRGB as RGB
        bits.read()  # range
        across, down = (1, 1) if profile == 0 else (0, 0) if profile == 1 else (1, 0)
        if twelve:
            across = bits.read()
            down = across and bits.read()
        bits.read(2 * (across and down))  # position of the chroma samples
    bits.read()  # separate quantizers
