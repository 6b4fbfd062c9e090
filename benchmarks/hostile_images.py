"""Image files of every format that are cheap to send and expensive to decode.

`hostile_images` yields (name, bytes). 70 megapixels of every format take milliseconds to make.
"""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import Image

from tests.support.hostile_images import bits, jpeg, riff, segment, webp_codes, webp_lossless
from tests.support.pictures import chunk

PHOTO_SIDE = 1024  # pixels of the noise that photographs repeat


def vp8_frame(width: int, height: int) -> bytes:
    """Make a VP8 key frame: zeros decode to blocks without coefficients."""
    blocks = -(-width // 16) * -(-height // 16)
    modes = bytes(min(2**19 - 1, 200 + 2 * blocks))
    tag = (len(modes) << 5 | 1 << 4).to_bytes(3, "little")
    return tag + b"\x9d\x01\x2a" + struct.pack("<HH", width, height) + modes + bytes(4 * blocks + 100)


def webp_lossy(width: int, height: int) -> bytes:
    """Make a lossy WebP of one color."""
    return riff((b"VP8 ", vp8_frame(width, height)))


def webp_alpha(width: int, height: int) -> bytes:
    """Make a lossy WebP with a lossless alpha channel."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    code = ((1, 1), (0, 1), (0, 1), (0, 1))
    alpha = b"\1" + bits((0, 1), (0, 1), (0, 1), *code * 5) + bytes(8)
    return riff((b"VP8X", b"\x10\0\0\0" + size), (b"ALPH", alpha), (b"VP8 ", vp8_frame(width, height)))


def zeros(count: int) -> bytes:
    """Make a zlib stream of *count* zeros."""
    unit = 1 << 20
    pack = zlib.compressobj(9)
    first = pack.compress(bytes(unit)) + pack.flush(zlib.Z_FULL_FLUSH)
    again = zlib.compressobj(9, wbits=-15)
    block = again.compress(bytes(unit)) + again.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, wbits=-15)
    if count < unit:
        return zlib.compress(bytes(count), 9)
    end = last.compress(bytes(count % unit)) + last.flush()
    checksum = (count % 65521) << 16 | 1
    return first + block * (count // unit - 1) + end + struct.pack(">I", checksum)


def png(
    width: int, height: int, *, depth: int = 8, color: int = 2, interlaced: bool = False, extra: bytes = b""
) -> bytes:
    """Make a PNG of zeros with further chunks *extra* before its pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    grids = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    passes = grids if interlaced else ((0, 1, 0, 1),)
    length = 0
    for left, step_x, top, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        length += rows * (1 + (columns * channels * depth + 7) // 8) if columns > 0 else 0
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(3)) if color == 3 else b""
    pixels = chunk(b"IDAT", zeros(length))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + extra + pixels + chunk(b"IEND", b"")


def photograph(width: int, height: int, kind: str = "JPEG", **options: object) -> bytes:
    """Make a file with the noise and the size of a photograph."""
    noise = random.Random(0).randbytes(PHOTO_SIDE // 4 * PHOTO_SIDE // 4 * 3)  # noqa: S311 - no secret
    tile = Image.frombytes("RGB", (PHOTO_SIDE // 4,) * 2, noise).resize((PHOTO_SIDE,) * 2)
    image = Image.new("RGB", (width, height))
    for top in range(0, height, PHOTO_SIDE):
        for left in range(0, width, PHOTO_SIDE):
            image.paste(tile, (left, top))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encoded(kind: str, mode: str, width: int, height: int, frames: int = 1, **options: object) -> bytes:
    """Encode an image of one color with Pillow."""
    images = [Image.new(mode, (width, height), number) for number in range(frames)]
    if frames > 1:
        options |= {"save_all": True, "append_images": images[1:], "duration": 10}
    file = io.BytesIO()
    images[0].save(file, kind, **options)
    return file.getvalue()


def bmp_rle(width: int, height: int) -> bytes:
    """Make a run-length-encoded BMP, which Pillow decodes in Python."""
    row = b"\xff\0" * (width // 255) + bytes([width % 255, 0]) + b"\0\0"
    data = row * height + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + bytes(1024) + data


def gif(width: int, height: int, frames: int = 1) -> bytes:
    """Make a GIF of *frames* without pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return (
        head
        + (b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00") * frames
        + b";"
    )


def exif(megabytes: float) -> bytes:
    """Make segments of EXIF with *megabytes* of entries."""
    count = 5400
    tags = struct.pack("<H", count) + b"".join(
        struct.pack("<HHII", 0x9000 + number, 7, 65_000, 8) for number in range(count)
    )
    body = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags
    return segment(0xE1, body[:65_533]) * int(megabytes * 1e6 / len(body))


def webp_metadata(width: int, height: int, size: int) -> bytes:
    """Make a lossless WebP with *size* bytes of EXIF."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    flags, pixels = b"\x18\0\0\0", webp_lossless(width, height)[20:]
    return riff((b"VP8X", flags + canvas), (b"VP8L", pixels), (b"EXIF", b"II*\0" + bytes(size)))


@functools.cache
def compressed_text() -> bytes:
    """Compress 100 MB of text to 97 kB."""
    return zlib.compress(bytes(100_000_000), 9)


WIDE, HIGH = 16_383, 4_270  # 70 megapixels, as WebP can have

FILES: dict[str, Callable[[], bytes]] = {
    "WebP lossless RGBA 70 MP": lambda: webp_lossless(WIDE, HIGH),
    "WebP lossless RGB 70 MP": lambda: webp_lossless(WIDE, HIGH, alpha=False),
    "WebP lossless RGBA 24 MP": lambda: webp_lossless(6000, 4000),
    "WebP lossless RGBA 12 MP": lambda: webp_lossless(4000, 3000),
    "WebP lossless RGBA 6 MP": lambda: webp_lossless(3000, 2000),
    "WebP lossy 70 MP": lambda: webp_lossy(WIDE, HIGH),
    "WebP lossy 24 MP": lambda: webp_lossy(6000, 4000),
    "WebP lossy with alpha 70 MP": lambda: webp_alpha(WIDE, HIGH),
    "WebP lossy with alpha 12 MP": lambda: webp_alpha(4000, 3000),
    "WebP animated 16 MP": lambda: encoded("WEBP", "RGB", 4000, 4000, 2, lossless=True, method=0, quality=0),
    "WebP with 15 MB of EXIF": lambda: webp_metadata(4000, 3000, 15_000_000),
    "PNG 1 bit 70 MP": lambda: png(10_000, 7_000, depth=1, color=0),
    "PNG 8 bit gray 70 MP": lambda: png(10_000, 7_000, color=0),
    "PNG gray and alpha 70 MP": lambda: png(10_000, 7_000, color=4),
    "PNG RGB 70 MP": lambda: png(10_000, 7_000),
    "PNG RGBA 70 MP": lambda: png(10_000, 7_000, color=6),
    "PNG RGBA 24 MP": lambda: png(6000, 4000, color=6),
    "PNG palette 70 MP": lambda: png(10_000, 7_000, color=3),
    "PNG palette with transparency 70 MP": lambda: png(10_000, 7_000, color=3, extra=chunk(b"tRNS", b"\0")),
    "PNG RGB with transparent color 70 MP": lambda: png(10_000, 7_000, extra=chunk(b"tRNS", bytes(6))),
    "PNG 16 bit gray 70 MP": lambda: png(10_000, 7_000, depth=16, color=0),
    "PNG 16 bit RGB 70 MP": lambda: png(10_000, 7_000, depth=16),
    "PNG 16 bit RGBA 70 MP": lambda: png(10_000, 7_000, depth=16, color=6),
    "PNG 16 bit RGBA 30 MP": lambda: png(6_000, 5_000, depth=16, color=6),
    "PNG interlaced RGB 70 MP": lambda: png(10_000, 7_000, interlaced=True),
    "PNG interlaced 16 bit RGBA 24 MP": lambda: png(6000, 4000, depth=16, color=6, interlaced=True),
    "PNG of one row": lambda: png(70_000_000, 1),
    "PNG of one column": lambda: png(1, 70_000_000, color=0),
    "PNG with text of 100 MB": lambda: png(64, 64, extra=chunk(b"zTXt", b"a\0\0" + compressed_text()) * 20),
    "PNG with a profile of 100 MB": lambda: png(64, 64, extra=chunk(b"iCCP", b"a\0\0" + compressed_text())),
    "PNG with 15 MB of text": lambda: png(64, 64, extra=chunk(b"tEXt", b"a\0" + b"b" * 15_000_000)),
    "PNG with 15 MB of EXIF": lambda: png(64, 64, extra=chunk(b"eXIf", b"II*\0" + bytes(15_000_000))),
    "APNG": lambda: encoded("PNG", "RGB", 2000, 2000, 3),
    "JPEG one color 70 MP": lambda: jpeg(10_000, 7_000),
    "JPEG gray 70 MP": lambda: jpeg(10_000, 7_000, components=1),
    "JPEG CMYK 70 MP": lambda: jpeg(10_000, 7_000, components=4),
    "JPEG progressive CMYK 70 MP": lambda: jpeg(10_000, 7_000, components=4, scans=4),
    "JPEG progressive 4:4:4 70 MP": lambda: jpeg(10_000, 7_000, scans=9),
    "JPEG progressive 4:2:0 70 MP": lambda: jpeg(10_000, 7_000, sampling=0x22, scans=9),
    "JPEG 100 scans of empty blocks 70 MP": lambda: jpeg(10_000, 7_000, scans=98),
    "JPEG 100 scans of empty blocks 6 MP": lambda: jpeg(3000, 2000, sampling=0x22, scans=98),
    "JPEG 100 scans of empty blocks 1 MP": lambda: jpeg(1000, 1000, sampling=0x22, scans=98),
    "JPEG 100 refining scans 70 MP": lambda: jpeg(10_000, 7_000, scans=98, refine=True),
    "JPEG 100 refining scans 12 MP": lambda: jpeg(4000, 3000, sampling=0x22, scans=98, refine=True),
    "JPEG photograph 12 MP": lambda: photograph(4000, 3000, quality=90),
    "JPEG photograph 24 MP": lambda: photograph(6000, 4000, quality=90),
    "JPEG photograph 50 MP": lambda: photograph(8192, 6144, quality=80),
    "JPEG photograph 64 MP": lambda: photograph(9248, 6936, quality=75),
    "JPEG photograph progressive 24 MP": lambda: photograph(6000, 4000, quality=85, progressive=True),
    "JPEG photograph progressive 50 MP": lambda: photograph(8192, 6144, quality=75, progressive=True),
    "JPEG photograph 4:4:4 50 MP": lambda: photograph(8192, 6144, quality=75, subsampling=0),
    "JPEG with 19 MB of EXIF": lambda: jpeg(64, 64, extra=exif(19)),
    "JPEG with 19 MB of empty segments": lambda: jpeg(64, 64, extra=segment(0xE5, bytes(1900)) * 9_900),
    "JPEG truncated 70 MP": lambda: jpeg(10_000, 7_000)[:5_000],
    "JPEG truncated progressive 70 MP": lambda: jpeg(10_000, 7_000, scans=9)[:5_000],
    "WebP with codes of its own per block 0.75 MP": lambda: webp_codes(868, 868),
    "WebP with codes of its own per block and a color cache 1 MP": lambda: webp_codes(1024, 1024, 10),
    "GIF 65535 x 1000": lambda: gif(65_535, 1_000),
    "GIF of 100,000 frames": lambda: gif(64, 64, 100_000),
    "BMP run-length-encoded 64 MP": lambda: bmp_rle(8_000, 8_000),
}


def hostile_images(part: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of every file in `FILES` with *part* in its name."""
    for name, make in FILES.items():
        if part in name:
            yield name, make()
