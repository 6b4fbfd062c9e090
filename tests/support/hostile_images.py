"""Image files that are cheap to send and expensive to decode, written bit by bit in milliseconds."""

import struct

REVERSED = [int(f"{value:08b}"[::-1], 2) for value in range(256)]
CODE_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8)  # of the lengths of a VP8L prefix code


def bits(*fields: tuple[int, int]) -> bytes:
    """Pack (value, number of bits) with the least significant bit first, as VP8L does."""
    value = length = 0
    for field, count in fields:
        value |= field << length
        length += count
    return value.to_bytes(-(-length // 8), "little")


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """Make a WebP file of *chunks*."""
    parts = [
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
        for kind, data in chunks
    ]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossless(width: int, height: int, *, alpha: bool = True) -> bytes:
    """Make a WebP of one color in fewer than 50 bytes."""
    code = ((1, 1), (0, 1), (0, 1), (0, 1))  # a simple prefix code with the symbol 0
    header = (
        (0x2F, 8),
        (width - 1, 14),
        (height - 1, 14),
        (alpha, 1),
        (0, 3),
        (0, 1),
        (0, 1),
        (0, 1),
    )
    return riff((b"VP8L", bits(*header, *code * 5) + bytes(8)))


def webp_codes(width: int, height: int, cache_bits: int = 0) -> bytes:
    """Make a lossless WebP with prefix codes of its own for each block of 4 x 4 pixels.

    libwebp builds tables of several kB for each of up to 65536 blocks. The color cache has
    2***cache_bits* entries, none for 0.
    """
    across = -(-width // 4)
    down = -(-height // 4)
    groups = min(1 << 16, across * down)
    lengths = (
        (0, 1),
        (8, 4),
        *((1 if symbol in {0, 8} else 0, 3) for symbol in CODE_ORDER),
        (0, 1),
    )
    full = ((0, 1), *((int(symbol < 256), 1) for symbol in range(256)))
    green = (*lengths, *full[1:], *((0, 1),) * 24)
    cache = ((1, 1), (cache_bits, 4)) if cache_bits else ((0, 1),)
    header = (
        (0x2F, 8),
        (width - 1, 14),
        (height - 1, 14),
        (0, 1),
        (0, 3),
        (0, 1),
        *cache,
        (1, 1),
        (0, 3),
        (0, 1),
    )
    single = ((1, 4),) * 3  # simple codes of the symbol 0
    blocks = b"".join(
        bytes((REVERSED[group & 255], REVERSED[group >> 8]))
        for group in (min(number, groups - 1) for number in range(across * down))
    )
    start = (*header, *green, *lengths, *full[1:], *single)
    tail = (
        (int.from_bytes(blocks, "little"), 8 * len(blocks)),
        (int("1" * (5 * groups), 16), 20 * groups),
    )
    return riff((b"VP8L", bits(*start, *tail) + bytes(16)))


def segment(marker: int, data: bytes) -> bytes:
    """Make a segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def huffman(kind: int, symbols: bytes) -> bytes:
    """Make the table *kind* of at most 254 *symbols* with codes of 8 bits, or of 1 bit for one symbol."""
    counts = bytearray(16)
    counts[0 if len(symbols) == 1 else 7] = len(symbols)
    return segment(0xC4, bytes([kind]) + counts + symbols)


def jpeg(
    width: int,
    height: int,
    *,
    components: int = 3,
    sampling: int = 0x11,
    scans: int | None = None,
    refine: bool = False,
    extra: bytes = b"",
) -> bytes:
    """Make a JPEG of one color; with *scans*, a progressive one with so many scans without coefficients.

    The scans have runs of empty blocks and, with *refine*, refine coefficients that are all 0.
    """
    tables = segment(0xDB, bytes([0]) + bytes([1] * 64)) + huffman(0, b"\0")
    parts = bytes([components]) + b"".join(
        bytes([number, sampling if number == 1 else 0x11, 0])
        for number in range(1, components + 1)
    )
    frame = struct.pack(">BHH", 8, height, width) + parts
    across = sampling >> 4
    down = sampling & 15
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    per_unit = (across * down + components - 1) if components > 1 else 1
    selected = b"".join(bytes([number, 0]) for number in range(1, components + 1))
    start = b"\xff\xd8" + extra + tables
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\0") if components == 4 else b""
    if scans is None:
        data = bytes(-(-units * per_unit * 2 // 8))
        head = segment(0xC0, frame) + huffman(0x10, b"\0")
        scan = segment(0xDA, bytes([components]) + selected + b"\0\x3f\0") + data
        return start + adobe + head + scan + b"\xff\xd9"
    body = segment(0xC2, frame) + huffman(0x10, b"\xe0\0")
    body += segment(0xDA, bytes([components]) + selected + bytes([0, 0, 1 if refine else 0]))
    body += bytes(-(-units * per_unit // 8))
    blocks = -(-width // 8) * -(-height // 8)
    run = "00000000" + "1" * 14  # 32767 blocks
    coded = run * (-(-blocks // 32767))
    coded += "1" * (-len(coded) % 8)
    data = int(coded, 2).to_bytes(len(coded) // 8, "big").replace(b"\xff", b"\xff\0")
    for number in range(scans):
        approximation = 0x10 if refine and number else 1 if refine else 0
        scan = bytes([1, 1 + number % components, 0, 1, 63, approximation])
        body += segment(0xDA, scan) + data
    return start + adobe + body + b"\xff\xd9"
