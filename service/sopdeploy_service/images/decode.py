"""Decode the bytes of a request to the network's input, in threads.

Each step is cheaper than the next and may reject the image: size in bytes, file signature, header (pixels are
counted before any is allocated), decoding, preprocessing. The bytes decide the format; a content type that
disagrees is a warning. Invalid bytes raise `ImageError` and no other exception.

Segments, scans and reads are limited, so that small files cannot take seconds to decode. Pillow reads headers
segment by segment, in Python: 19 MB of empty segments hold the interpreter lock for seconds. Each scan of a
JPEG visits all of its pixels, so 240 kB of empty scans take half a minute to decode.
"""

import contextlib
import io
import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.errors import ImageError
from sopdeploy.images.pixels import list_changes, match_transparency, preprocess_image, upright_size
from sopdeploy.images.preprocess import Preprocess

ACCEPTED = "send a JPEG, PNG, WebP, BMP or GIF file"
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
FIRST_BYTES = (*SIGNATURES, b"RIFF")  # of every accepted format; WAV files also begin with RIFF
REJECTED_SIGNATURES = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
}
ALIASES = {"JPG": "JPEG", "PJPEG": "JPEG", "APNG": "PNG", "X-PNG": "PNG", "X-BMP": "BMP", "X-MS-BMP": "BMP"}
ANIMATED = {"GIF", "PNG", "WEBP"}  # the second image of a JPEG is a thumbnail
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heif", b"avif", b"avis"}

UNSUPPORTED_FRAMES = {0xC3: "lossless", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded"}  # by SOF marker
SCAN, END, SEQUENTIAL = 0xDA, 0xD9, {0xC0, 0xC1}
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of segments with a length; bytes between are skipped
MARKER_BYTES = 2
MAX_SCANS = 100  # progressive files have about ten
MAX_SEGMENTS = 10_000
TOO_MANY_SEGMENTS = "the image has too many segments"
MAX_READS = 10_000  # of a small file; a PNG in 8 kB chunks or a GIF in 255-byte blocks needs far fewer
BYTES_PER_READ = 100
MAX_BMP_READS = 2_000_000  # a run-length-encoded BMP is decoded in Python, one or two bytes at a time
FILL_COLOR = {127, 128}  # libjpeg's gray for missing data; Pillow inverts it in CMYK
NOISE = random.Random(0).randbytes(2048).replace(b"\xff", b"")  # noqa: S311 - data that changes pixels
# Pillow, unlike libjpeg, fails on Adobe segments shorter than 12 bytes: make them segments that it skips.
SHORT_ADOBE, SKIPPED_SEGMENT = re.compile(rb"\xff\xee(\0[\x07\x08]Adobe)"), b"\xff\xef\\1"
RESTART = re.compile(rb"\xff([\xd0-\xd7])")

log = logging.getLogger("sopdeploy.service")


class EncodedImage(NamedTuple):
    """The bytes of one image and its media type, if the client sent one."""

    body: bytes
    media_type: str = ""


class Decoded(NamedTuple):
    """The network's input (crop, crop, 3) uint8, and warning codes for changes made while decoding.

    *size* is the (width, height) of the upright image in the file.
    """

    pixels: NDArray[np.uint8]
    warnings: tuple[str, ...]
    size: tuple[int, int]


# (image with only its header read, file, preprocessing) -> image with its pixels.
Load = Callable[[Image.Image, bytes, Preprocess], Image.Image]
Decode = Callable[[EncodedImage, Preprocess], Decoded]


def load_exact(image: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG001
    """Load the same pixels as in training."""
    image.load()
    return image


def decode(
    encoded: EncodedImage, preprocess: Preprocess, *, max_bytes: int, max_pixels: int, load: Load = load_exact
) -> Decoded:
    """Decode *encoded*, with its pixels from *load*, and apply *preprocess*.

    Only the first frame of an animation is decoded. Raises `ImageError` with a code and an HTTP status.
    """
    body = encoded.body
    if not body:
        raise ImageError("the body is empty; " + ACCEPTED, code="empty_body", status=400)
    if len(body) > max_bytes:
        raise too_large_error(max_bytes)
    kind = _image_format(body)
    limit = f"more than {max_pixels} pixels, the limit of this server"
    try:
        with _open(body, kind) as header:
            if header.width * header.height > max_pixels:
                message = f"{header.width} x {header.height} is {limit}"
                raise ImageError(message, code="too_many_pixels", status=413)
            match_transparency(header)
            size = upright_size(header, preprocess)
            image = load(header, body, preprocess)
            if kind == "JPEG" and is_truncated(image, body):
                raise EOFError("the data ends before the last pixel")
            pixels = preprocess_image(image, preprocess)
            warnings = (*list_changes(image, preprocess), *_file_warnings(header, kind, encoded.media_type))
            return Decoded(pixels, tuple(sorted(warnings)), size)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the image has {limit}", code="too_many_pixels", status=413) from error
    except Exception as error:  # untrusted bytes: a parser or decoder may raise anything
        if isinstance(error, MemoryError):
            raise ImageError("the image needs too much memory", code="too_many_pixels", status=413) from error
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise ImageError("the image is truncated", code="truncated_image", status=422) from error
        raise ImageError("the image is damaged", code="damaged_image", status=422) from error


def too_large_error(max_bytes: int) -> ImageError:
    """Build the error of a body longer than *max_bytes*."""
    message = f"the body is larger than {max_bytes} bytes, the limit of this server"
    return ImageError(message, code="too_large", status=413)


def _image_format(body: bytes) -> str:
    """Detect the format of *body*; raise `ImageError` if it is not accepted."""
    for signature, kind in SIGNATURES.items():
        if body.startswith(signature):
            if kind == "JPEG":
                _check_jpeg_segments(body)
            return kind
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return "WEBP"
    if body[4:8] == b"ftyp" and body[8:12] in HEIF_BRANDS:
        camera = "phones take JPEG with the camera setting `most compatible`"
        raise ImageError(
            f"HEIC and AVIF files are not accepted; {ACCEPTED} ({camera})",
            code="unsupported_format",
            status=415,
        )
    known = next((name for magic, name in REJECTED_SIGNATURES.items() if body.startswith(magic)), None)
    if known is not None:
        raise ImageError(f"{known} files are not accepted; {ACCEPTED}", code="unsupported_format", status=415)
    raise ImageError(f"this is not an image; {ACCEPTED}", code="not_an_image", status=415)


def _check_jpeg_segments(body: bytes) -> None:
    """Raise `ImageError` for too many segments or scans and for rare codings.

    Not every build of libjpeg reads lossless and arithmetic-coded files.
    """
    scans = components = 0  # `components` of a sequential file, which may hold all of them in one scan
    for number, (marker, start) in enumerate(_jpeg_segments(body)):
        if marker in UNSUPPORTED_FRAMES and number < MAX_SEGMENTS:
            message = f"{UNSUPPORTED_FRAMES[marker]} JPEG files are not accepted; {ACCEPTED}"
            raise ImageError(message, code="unsupported_format", status=415)
        if marker in SEQUENTIAL:
            components = int.from_bytes(body[start + 7 : start + 8], "big")
        last = marker == END or (marker == SCAN and body[start + 2 : start + 3] == bytes([components]))
        scans += marker == SCAN and not last
        if number == MAX_SEGMENTS or scans > MAX_SCANS:
            raise ImageError(TOO_MANY_SEGMENTS, code="damaged_image", status=422)
        if last:
            return


def _jpeg_segments(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each JPEG segment and the position of its length.

    The search for the segment after a scan skips the data of the scan.
    """
    position = 2
    while found := MARKER.search(body, position):
        position = found.end()
        yield body[position - 1], position
        position += int.from_bytes(body[position : position + 2], "big")


class LimitedReader(io.BytesIO):
    """The bytes of a file; `read` raises `ImageError` after *reads* calls."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next *size* bytes."""
        self.reads -= 1
        if self.reads < 0:
            raise ImageError(TOO_MANY_SEGMENTS, code="damaged_image", status=422)
        return super().read(size)


def open_image(body: bytes) -> Image.Image:
    """Open the image file *body*, which `decode` accepts, and read its header."""
    return _open(body, _image_format(body))


def _open(body: bytes, kind: str) -> Image.Image:
    """Read the header with Pillow, if needed without short Adobe segments, which only Pillow rejects."""
    reader = LimitedReader(body)
    reader.reads = MAX_BMP_READS if kind == "BMP" else MAX_READS + len(body) // BYTES_PER_READ
    try:
        return Image.open(reader, formats=(kind,))
    except UnidentifiedImageError:
        plain = SHORT_ADOBE.sub(SKIPPED_SEGMENT, body)
        if kind != "JPEG" or plain == body:
            raise
        return _open(plain, kind)


def is_truncated(image: Image.Image, body: bytes) -> bool:
    """Check whether the data of a JPEG *body* ends before its last pixel.

    libjpeg fills missing pixels with gray, and Pillow hides its warning. If the last pixel has this gray, the
    image is decoded twice more at 1/8 scale, once with noise appended to its first scan. The noise changes
    the pixels of a truncated file and has no effect on a complete one.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if not FILL_COLOR.issuperset(last if isinstance(last, tuple) else (last,)):
        return False
    end, before = len(body), None
    for marker, start in _jpeg_segments(body):
        if before == SCAN:
            end = start - MARKER_BYTES
            break
        before = marker
    # A decoder that expects a restart marker reads noise only after it, so all eight markers follow in turn.
    restarts = RESTART.findall(body[:end])
    due = restarts[-1][0] + 1 if restarts else 0
    noise = NOISE + b"".join(b"\xff%c" % (0xD0 | (due + count) & 7) + NOISE for count in range(8))
    thumbnails = []
    for data in (body, body[:end] + noise + body[end:]):
        plain = SHORT_ADOBE.sub(SKIPPED_SEGMENT, data)
        thumbnail = Image.open(io.BytesIO(plain), formats=("JPEG",))
        thumbnail.draft(thumbnail.mode, (1, 1))
        thumbnails.append(thumbnail.tobytes())
    return thumbnails[0] != thumbnails[1]


def _file_warnings(image: Image.Image, kind: str, media_type: str) -> list[str]:
    """Return the warning codes for a wrong media type and for several frames, even damaged ones."""
    warnings = []
    family, _, subtype = media_type.partition(";")[0].strip().upper().partition("/")
    if family == "IMAGE" and subtype != "*" and ALIASES.get(subtype, subtype) != kind:
        warnings.append("content_type_mismatch")
    if kind in ANIMATED:
        try:
            more_frames = getattr(image, "is_animated", False)
        except Exception:  # untrusted bytes after the first frame
            more_frames = True
        if more_frames:
            warnings.append("first_frame_only")
    return warnings


class PoolClosedError(Exception):
    """The pool was stopped before it decoded the image."""


class _Job(NamedTuple):
    image: EncodedImage
    preprocess: Preprocess
    on_done: Callable[[Decoded | Exception, float], None]
    cancelled: Callable[[], bool]


@dataclass(slots=True)
class DecodePool:
    """Runs *decode* in daemon *threads*, so that a hung decoder cannot block an exit."""

    decode: Decode
    threads: int
    _jobs: queue.SimpleQueue[_Job | None] = field(init=False, default_factory=queue.SimpleQueue)

    def start(self) -> None:
        """Start the threads, and let Pillow keep a few freed memory blocks of 16 MB for the next images.

        Without these, every page of the next image is mapped and cleared again: a quarter of the time of a
        500 x 375 JPEG.
        """
        Image.core.set_blocks_max(2 * self.threads)  # type: ignore[attr-defined]
        for number in range(self.threads):
            threading.Thread(target=self._run, name=f"decoder_{number}", daemon=True).start()

    def submit(
        self,
        image: EncodedImage,
        preprocess: Preprocess,
        on_done: Callable[[Decoded | Exception, float], None],
        *,
        cancelled: Callable[[], bool],
    ) -> None:
        """Decode *image* in a thread, which calls *on_done* with the result and the seconds.

        Nothing happens if *cancelled* returns True when a thread is free.
        """
        self._jobs.put(_Job(image, preprocess, on_done, cancelled))

    def stop(self) -> None:
        """End the threads; queued jobs that no thread has begun fail with `PoolClosedError`."""
        with contextlib.suppress(queue.Empty):
            while job := self._jobs.get_nowait():
                job.on_done(PoolClosedError(), 0.0)
        for _ in range(self.threads):
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.cancelled():
                started = time.monotonic()
                result: Decoded | Exception
                try:
                    result = self.decode(job.image, job.preprocess)
                except ImageError as error:
                    result = error
                except Exception as error:  # a bug fails its own image, not the others of the request
                    log.exception("the decoder failed on an image of %d bytes", len(job.image.body))
                    result = error
                job.on_done(result, time.monotonic() - started)
                del result
            del job  # an idle thread must not keep an image or a model alive
