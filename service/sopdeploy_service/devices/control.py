"""The socket between the supervisor and another process of a server, and the memory that processes share.

The supervisor sends the connections of clients, and to front ends and engines the ends of their channels.
Each process reports its status ten times per second. Both sides may ask the other for metrics. An empty
message means that the other one has ended or left.

The shared memory has the state of every bucket of a rate limit and the number of images that each process has
admitted, without a lock: if two processes charge a key in the same microsecond, one of the charges is lost.
"""

import asyncio
import contextlib
import socket
import struct

# Messages with a file; the name of the engine or front end at the other end of a channel follows
CLIENT, SEND_METRICS, CHANNEL = b"client", b"metrics", b"channel "
RELOAD = b"reload"  # the bundles
SPEED = b"speed "  # seconds that the loaded models of a device need for an image
FRONT_ENDS = b"front ends "  # the answer: their number; with 0, the device serves HTTP itself
NEW_MODELS, BAD_FRONT_END = b"models", b"bad "  # of an engine: after a reload; with the name of a front end
STATUS = struct.Struct("=QI")  # connections received and open ones, or images; then names of bundles
ADMITTED_BYTES, LIMIT_BYTES = 4096, 16  # of the shared memory: for all processes, then for each key
METRICS_SECONDS = 1.0  # a process that takes longer counts as down; the supervisor has twice the time
MAX_METRICS_BYTES = 16_000_000  # of a page


def receive_message(control: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a waiting message and its files; both are empty if the other end has ended or left."""
    try:
        data, files, _, _ = socket.recv_fds(control, 4096, 2)
    except OSError:
        return b"", []
    return data, files


def send_message(control: socket.socket, message: bytes, *files: int) -> bool:
    """Send *message* with *files*; return whether the other end gets it."""
    try:
        socket.send_fds(control, [message], files)
    except OSError:
        return False
    return True


async def request_metrics(control: socket.socket | None, seconds: float) -> bytes:
    """Return the metrics of the process or supervisor at the other end; empty after *seconds*."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # no free file, or a TimeoutError
        ours, theirs = map(stack.enter_context, socket.socketpair())
        if control is None or not send_message(control, SEND_METRICS, theirs.fileno()):
            return b""
        theirs.close()  # the page ends when the other process closes its copy
        ours.setblocking(False)
        async with asyncio.timeout(seconds):
            page = b""
            while piece := await asyncio.get_running_loop().sock_recv(ours, 1 << 16):
                page += piece
                if len(page) > MAX_METRICS_BYTES:
                    return b""
            return page
    return b""  # no answer in time, or an error


async def send_metrics(file: int, page: bytes) -> None:
    """Answer `request_metrics`, which sent the socket *file*, with *page*."""
    with contextlib.suppress(OSError), socket.socket(fileno=file) as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(connection, page)
