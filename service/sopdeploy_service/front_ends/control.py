"""The socket between the supervisor and one of its processes.

The supervisor sends file descriptors: connections of clients, and channels between front ends and inference
processes. The process reports its status ten times per second. Both may ask the other for metrics. An empty
message means that the other one has ended or left.
"""

import asyncio
import contextlib
import socket
import struct

CLIENT, SEND_METRICS, CHANNEL = b"client", b"metrics", b"channel"  # messages with a file
RELOAD = b"reload"  # to a process that loads bundles
# From an inference process: it has new models, cannot start (and why), or a front end breaks the protocol.
NEWS = NEW_MODELS, FAILED, BAD_FRONT_END = b"models", b"failed", b"broken"
STATUS = struct.Struct("=QI?")  # connections received, open ones, ready for images; then names of bundles
_METRICS_SECONDS = 2.0  # a process that takes longer counts as down


def pair() -> tuple[socket.socket, socket.socket]:
    """Create a control socket; return the supervisor's end and the process's end."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)


def receive_files(control: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a waiting message and its files."""
    try:
        data, files, _, _ = socket.recv_fds(control, 4096, 2)
    except OSError:
        return b"", []
    return data, files


def send_files(control: socket.socket, message: bytes, *files: int) -> bool:
    """Send *message* with *files*; return whether the other end gets it."""
    try:
        socket.send_fds(control, [message], files)
    except OSError:
        return False
    return True


async def request_metrics(control: socket.socket | None) -> bytes:
    """Return the metrics of the process or supervisor at the other end; empty if it does not answer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if control is None or not send_files(control, SEND_METRICS, theirs.fileno()):
            return b""
        theirs.close()
        ours.setblocking(False)
        with contextlib.suppress(OSError):  # also a TimeoutError
            async with asyncio.timeout(_METRICS_SECONDS):
                page = b""
                while piece := await asyncio.get_running_loop().sock_recv(ours, 1 << 16):
                    page += piece
                return page
    return b""


async def send_metrics(file: int, page: bytes) -> None:
    """Answer `request_metrics`, which sent the socket *file*, with *page*."""
    with contextlib.suppress(OSError), socket.socket(fileno=file) as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(connection, page)
