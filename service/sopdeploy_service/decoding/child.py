"""The program of decoder processes: a template, which never sees an image, forks children that decode.

A child has no environment, files, sockets or keys, only its end of a socket pair, the pipe of standard error
and as much memory as its options say. A fork shares the imported libraries and takes milliseconds.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.decoding import sandbox
from sopdeploy_service.images.decode import LOADERS, EncodedImage, decode
from sopdeploy_service.runtime.device_memory import limit_heaps

# Number of the request; bytes of the rules, of the media type and of the image, which follow.
REQUEST = struct.Struct("<QIHI")
# Number of the request, kind, warnings as bits, bytes of the message that follows; pixels follow kind PIXELS.
REPLY = struct.Struct("<QBBH")
TEMPLATE_REPLY = struct.Struct("<I")  # the reply of a template
READY, PIXELS, LARGER, FAILED, FIRST_ERROR = range(5)
MAX_MESSAGE = 500
ERRORS = (  # codes and statuses of `ImageError`; the kind of a reply is FIRST_ERROR + index
    ("empty_body", 400),
    ("too_large", 413),
    ("too_many_pixels", 413),
    ("too_much_memory", 413),
    ("unsupported_format", 415),
    ("not_an_image", 415),
    ("truncated_image", 422),
    ("damaged_image", 422),
)
WARNINGS = (
    "alpha_flattened",
    "content_type_mismatch",
    "exif_rotated",
    "first_frame_only",
    "sixteen_bit_scaled",
)
PIXEL_BYTES = 20  # that the decoder of an ordinary file needs at most, lossless WebP with a rotation
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class ChildOptions(NamedTuple):
    """Limits of a child: bytes beyond its own need, and of the images, as in `Settings`.

    A child with *max_light_pixels* decodes no larger images. It ends if one takes *cpu_seconds*. 0: no limit.
    """

    memory: int
    niceness: int
    max_light_pixels: int
    cpu_seconds: float
    max_bytes: int
    max_pixels: int
    load: str
    formats: tuple[str, ...]
    sandbox: str


class LargerImageError(Exception):
    """Ends the decoding of an image that is too large for this child, before a pixel is decoded."""


@functools.lru_cache(maxsize=64)
def read_rules(text: bytes) -> Preprocess:
    """Parse the rules of a request."""
    return Preprocess.model_validate_json(text)


def answer(number: int, rules: bytes, image: EncodedImage, options: ChildOptions) -> list[bytes]:
    """Decode *image*; return the parts of the reply."""
    pixels = in_header = webp_pixels(image.body)
    if options.max_light_pixels and pixels > options.max_light_pixels:
        return [REPLY.pack(number, LARGER, 0, 0)]

    def admit(opened: Image.Image) -> None:
        nonlocal pixels
        pixels = opened.width * opened.height
        if options.max_light_pixels and pixels > options.max_light_pixels:
            raise LargerImageError

    try:
        decoded = decode(
            image,
            read_rules(rules),
            max_bytes=options.max_bytes,
            max_pixels=options.max_pixels,
            load=LOADERS[options.load],
            formats=options.formats,
            admit=admit,
        )
    except LargerImageError:
        return [REPLY.pack(number, LARGER, 0, 0)]
    except ImageError as error:
        lacked_memory = isinstance(error.__cause__, MemoryError)
        if lacked_memory or (error.code == "damaged_image" and in_header * PIXEL_BYTES > options.memory):
            error = _memory_error(pixels, options.memory)
        text = str(error).encode()[:MAX_MESSAGE]
        kind = FIRST_ERROR + ERRORS.index((error.code, error.status))
        return [REPLY.pack(number, kind, 0, len(text)), text]
    except Exception:  # a bug fails its own image
        sys.excepthook(*sys.exc_info())
        return [REPLY.pack(number, FAILED, 0, 0)]
    changes = sum(1 << WARNINGS.index(name) for name in decoded.warnings)
    return [REPLY.pack(number, PIXELS, changes, 0), decoded.pixels.tobytes()]


def webp_pixels(body: bytes) -> int:
    """Read the number of pixels from the header of a WebP; 0 for other formats.

    libwebp allocates them before Pillow knows the size, and does not say that it lacks memory.
    """
    kind, tail = body[8:16], body[16:30]
    if kind == b"WEBPVP8X":
        return (int.from_bytes(tail[8:11], "little") + 1) * (int.from_bytes(tail[11:14], "little") + 1)
    if kind == b"WEBPVP8L":
        size = int.from_bytes(tail[5:9], "little")
        return ((size & 0x3FFF) + 1) * ((size >> 14 & 0x3FFF) + 1)
    if kind == b"WEBPVP8 ":
        return (int.from_bytes(tail[10:12], "little") & 0x3FFF) * (
            int.from_bytes(tail[12:14], "little") & 0x3FFF
        )
    return 0


def _memory_error(pixels: int, limit: int) -> ImageError:
    """Describe an image of *pixels* whose decoder needs more than *limit* bytes."""
    if pixels * PIXEL_BYTES <= limit:
        return ImageError("the image is damaged", code="damaged_image", status=422)
    message = f"decoding needs more than {limit // 10**6} MB, the memory for an image; send it smaller"
    return ImageError(message, code="too_much_memory", status=413)


def serve_requests(end: socket.socket, options: ChildOptions) -> None:
    """Answer the requests that arrive at *end* until its other end is closed."""
    while header := receive_bytes(end, REQUEST.size):
        number, rules_size, type_size, size = REQUEST.unpack(header)
        rules, media_type = receive_bytes(end, rules_size), receive_bytes(end, type_size).decode("latin-1")
        image = EncodedImage(receive_bytes(end, size), media_type)
        if options.cpu_seconds:
            signal.setitimer(signal.ITIMER_PROF, options.cpu_seconds)  # SIGPROF ends this process
        reply = answer(number, rules, image, options)
        signal.setitimer(signal.ITIMER_PROF, 0)
        del image
        for part in reply:
            end.sendall(part)


def receive_bytes(end: socket.socket, count: int) -> bytes:
    """Receive *count* bytes, or none if the other end is closed."""
    parts = []
    while count and (part := end.recv(count, socket.MSG_WAITALL)):
        parts.append(part)
        count -= len(part)
    return b"" if count else parts[0] if len(parts) == 1 else b"".join(parts)


def restrict(options: ChildOptions) -> str:
    """Limit this process until it ends; return the names of the restrictions."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + options.memory,) * 2)
    os.nice(options.niceness)
    Image.core.set_blocks_max(1 if options.max_light_pixels else 0)  # type: ignore[attr-defined]
    return "" if options.sandbox == "off" else sandbox.enter()


def run_child(end: socket.socket, options: ChildOptions) -> None:
    """Restrict this process, say so, and serve. Does not return."""
    try:
        try:
            text, kind = restrict(options), READY
        except OSError as error:
            text, kind = str(error.strerror), FAILED
        end.sendall(REPLY.pack(0, kind, 0, len(text)) + text.encode())
        serve_requests(end, options)
    except OSError:  # the server has ended
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def run_template(control: socket.socket) -> None:
    """Fork and kill children as *control* says, until its other end is closed; then kill all."""
    children: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            break
        request = json.loads(message)
        if descriptors:
            process = os.fork()
            if process == 0:
                control.close()
                if sys.platform == "linux":
                    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
                run_child(socket.socket(fileno=descriptors[0]), ChildOptions(**request))
            os.close(descriptors[0])
            children.add(process)
        else:
            process = request
            _end(children, process)
        for ended in list(children):  # not yet waited for, so no other process has its id
            if os.waitpid(ended, os.WNOHANG)[0]:
                children.discard(ended)
        control.sendall(TEMPLATE_REPLY.pack(process))
    for process in list(children):
        _end(children, process)


def _end(children: set[int], process: int) -> None:
    """Kill *process* if it is one of *children* and wait for its end."""
    if process in children:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        children.discard(process)


def main() -> None:
    """Run the template on the descriptor of the command line."""
    os.environ.clear()
    limit_heaps()
    warnings.filterwarnings("ignore", module="PIL")
    sandbox.preload()
    gc.freeze()
    run_template(socket.socket(fileno=int(sys.argv[1])))
