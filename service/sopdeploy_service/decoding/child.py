"""The program of decoder processes: a template, which never sees an image, forks children that decode.

A child has no environment, files, sockets or keys, only its end of a socket pair, the pipe of
standard error and as much memory as its options say. A fork shares the imported libraries and
takes milliseconds.
"""

import contextlib
import functools
import gc
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.cost import estimate_cost
from sopdeploy.images.decode import decode
from sopdeploy.images.metadata import copy_without_metadata
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.images.signatures import HEAD_BYTES, find_format
from sopdeploy_service import templates
from sopdeploy_service.decoding import sandbox
from sopdeploy_service.runtime.device_memory import keep_freed, limit_heaps

# Number of the request; bytes of the rules (none: copy the image) and of the image; seconds of
# CPU time after which the child ends (0: no limit).
REQUEST = struct.Struct("<QIId")
# Number of the request, kind, warnings as bits (of a copy 1: a PNG), bytes of the result or
# message.
REPLY = struct.Struct("<QBBI")
UNKNOWN_CODE = 1 << 16  # the exit code of a child that the template does not know
READY, FAILED, PIXELS, COPY, FIRST_ERROR = range(5)
MAX_MESSAGE = 500  # bytes of a text in a reply
TOO_MUCH_MEMORY = "too_much_memory"
# Codes and statuses of `ImageError`; the kind of a reply is FIRST_ERROR + index
ERRORS = (
    ("empty_body", 400),
    ("too_large", 413),
    ("too_many_pixels", 413),
    (TOO_MUCH_MEMORY, 413),
    ("unsupported_format", 415),
    ("not_an_image", 415),
    ("truncated_image", 422),
    ("damaged_image", 422),
    ("decoder_failed", 500),
)
WARNINGS = ("alpha_flattened", "exif_rotated", "first_frame_only", "sixteen_bit_scaled")
PIXEL_BYTES = (
    20  # that the decoder of an ordinary file needs at most: lossless WebP with a rotation
)


class ChildOptions(NamedTuple):
    """Limits of a child: *memory* in bytes beyond its own need; the limits of images are as in `Settings`."""

    memory: int
    niceness: int
    is_light: bool
    max_bytes: int
    max_pixels: int
    sandbox: str


@functools.lru_cache(maxsize=64)
def read_rules(text: bytes) -> Preprocess:
    """Parse the rules of a request."""
    return Preprocess.model_validate_json(text)


def answer(number: int, rules: bytes, image: bytes, options: ChildOptions) -> list[bytes]:
    """Decode *image* by *rules*, or copy it if there are none; return the reply to *number* in parts."""
    # Answer with the copy, or with the pixels and the warnings.
    try:
        if not rules:
            copy, suffix = copy_without_metadata(image, options.max_pixels)
            return [REPLY.pack(number, COPY, int(suffix == ".png"), len(copy)), copy]

        decoded = decode(
            image,
            read_rules(rules),
            max_bytes=options.max_bytes,
            max_pixels=options.max_pixels,
        )

        pixels = decoded.pixels.data
        bits = sum(1 << WARNINGS.index(name) for name in decoded.warnings)

        # The reply is one part, which wakes the server once.
        return [b"".join([REPLY.pack(number, PIXELS, bits, pixels.nbytes), pixels])]
    except ImageError as error:
        # *error* is not kept beyond this block: its traceback holds the memory of the failed decoder.
        code = error.code
        status = error.status
        message = str(error)

        # Without memory, most decoders raise `MemoryError`, but some say that the image is damaged.
        cost = estimate_cost(image, None)
        is_large = cost is not None and cost.encoded * PIXEL_BYTES > options.memory
        is_vague = find_format(image[:HEAD_BYTES]) in {"WEBP", "AVIF"}
        if isinstance(error.__cause__, MemoryError) or (
            code == "damaged_image" and is_vague and is_large
        ):
            code = TOO_MUCH_MEMORY
            status = 413
            limit = f"{options.memory // 10**6} MB, the memory for an image"
            message = f"decoding the image needs more than {limit}; send a smaller image"
    except Exception:  # a bug fails its own image
        sys.excepthook(*sys.exc_info())
        code = "decoder_failed"
        status = 500
        message = "the decoder failed on this image"

    # Answer with the error.
    kind = FIRST_ERROR + ERRORS.index((code, status))
    data = message.encode()[:MAX_MESSAGE]
    return [REPLY.pack(number, kind, 0, len(data)), data]


def receive(end: socket.socket, count: int, deadline: float = math.inf) -> bytes:
    """Receive *count* bytes; raises `OSError` if the other end is closed, `TimeoutError` after *deadline*."""
    parts = []
    while count:
        part = end.recv(count, socket.MSG_WAITALL)
        if not part:
            raise BrokenPipeError

        # The timeout of the socket limits each wait; *deadline* limits a sender of one byte at
        # a time.
        if time.monotonic() > deadline:
            raise TimeoutError

        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def restrict(options: ChildOptions) -> str:
    """Limit this process until it ends; return the names of the restrictions."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # The limit counts addresses: also those of shared memory, of stacks and of pages that are
    # only read. Only Linux has this file.
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/self/status").read_text().splitlines()
        used_bytes = (
            next(int(line.split()[1]) for line in lines if line.startswith("VmSize:")) * 1024
        )
        limit = used_bytes + options.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.nice(options.niceness)

    # A light child decodes all the time, and keeps its memory for the next image. One for large
    # images is mostly idle, and would occupy memory for nothing.
    if options.is_light:
        keep_freed(options.memory)
    Image.core.set_blocks_max(int(options.is_light))  # type: ignore[attr-defined]
    return "" if options.sandbox == "off" else sandbox.enter()


def run_child(end: socket.socket, options: ChildOptions) -> NoReturn:
    """Restrict this process, tell the server at *end* whether this succeeded, and serve it until it ends."""
    # Tell the server whether the restrictions are in force.
    try:
        try:
            kind = READY
            text = restrict(options).encode()
        except OSError as error:
            kind = FAILED
            text = str(error.strerror).encode()

        end.sendall(REPLY.pack(0, kind, 0, len(text)) + text)  # number 0: of no request

        # After FAILED, a server that requires a sandbox closes its end; other servers use
        # this child without a sandbox.
        while True:
            number, rules_size, size, cpu_seconds = REQUEST.unpack(receive(end, REQUEST.size))
            rules = receive(end, rules_size)
            image = receive(end, size)

            # SIGPROF ends this process; with 0 seconds there is no timer.
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            reply = answer(number, rules, image, options)
            signal.setitimer(signal.ITIMER_PROF, 0)

            del image  # frees it before the reply is sent
            for part in reply:
                end.sendall(part)
    except OSError:  # the server has ended, or has closed its end
        os._exit(0)
    except BaseException:  # a forked child must not return into the code of its template
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def run_template(control: socket.socket) -> None:
    """Fork and kill children as *control* says, until its other end is closed; then kill all."""
    children: set[int] = set()
    ended: dict[int, int] = {}  # exit codes of children that ended by themselves
    while True:
        # Wait for a message; without one, the server has ended.
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            break

        request = json.loads(message)

        # Fork or kill a child.
        if descriptors:  # *request* are the options of a child to fork
            code = 0
            try:
                process = _fork(control, descriptors[0], ChildOptions(**request))
            except OSError as error:
                control.sendall(templates.REPLY.pack(0, error.errno or 0))
                continue

            children.add(process)
            ended.pop(process, None)  # of an earlier child with this id
        else:  # *request* is the id of a child to kill
            process = request
            code = (
                _kill(children, process)
                if process in children
                else ended.pop(process, UNKNOWN_CODE)
            )

        # Forget the children that ended by themselves. The system gives the id of a process to
        # another one only after `waitpid` has returned it, so an id in *children* is always
        # that of a child.
        for child in list(children):  # a copy, because the loop changes *children*
            waited, status = os.waitpid(child, os.WNOHANG)
            if waited == child:
                children.discard(child)
                ended[child] = os.waitstatus_to_exitcode(status)

        control.sendall(templates.REPLY.pack(process, code))

    for process in list(children):
        _kill(children, process)


def _fork(control: socket.socket, descriptor: int, options: ChildOptions) -> int:
    """Fork a child, which alone keeps the socket *descriptor*; return its id, or raise `OSError`."""
    template = os.getpid()

    try:
        process = os.fork()
        if process == 0:  # this is the child
            control.close()
            templates.end_with_parent(template)
            run_child(socket.socket(fileno=descriptor), options)  # never returns
    finally:
        os.close(descriptor)
    return process


def _kill(children: set[int], process: int) -> int:
    """Kill *process*, one of *children*, if it has not ended; forget it and return its exit code."""
    os.kill(process, signal.SIGKILL)
    children.discard(process)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    """Run the template on the socket whose file descriptor is the argument of the command line."""
    os.environ.clear()
    limit_heaps()
    sandbox.preload()  # before the forks, so that the children share these pages of memory
    # The garbage collector of a child would write to the pages, and thereby copy them.
    gc.freeze()
    run_template(socket.socket(fileno=int(sys.argv[1])))
