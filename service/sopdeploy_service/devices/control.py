"""The messages between the supervisor and the other processes of a server, and the memory that they share.

Each process has a socket to the supervisor of its own: who sends a message is known by its
socket, not by what it says. A message arrives as a whole (`SOCK_SEQPACKET`), with a limited size;
it has a kind and, after a space, the rest. An empty one means that the other process has ended
or left.

The supervisor sends the connections of clients, the ends of channels, and new API keys. Each
process reports its status ten times per second, with what it lacks, so a lost report does not
matter. A process that does not report is replaced. The supervisor asks for metrics, and sends
the metrics of all processes to those that serve HTTP.

Two files in shared memory have no lock: the number of images that each process has admitted,
and the state of every bucket of a rate limit. If two processes charge a key in the same
microsecond, one of the charges is lost.
"""

import asyncio
import contextlib
import socket
import struct
from typing import NamedTuple

# To a process, with a file; for `CHANNEL`, the name of the process at the other end follows.
CLIENT = b"client"
CHANNEL = b"channel"
KEYS = b"keys"  # with two files: the keys and the state of their limits
SEND_METRICS = b"send-metrics"  # its metrics, to the socket that comes with it
PAGE = b"page"  # with a file: the metrics of all processes
RELOAD = b"reload"  # the bundles
# To the supervisor
STATUS = b"status"  # a `Status` follows
METRICS = b"metrics"  # asks for a `PAGE`
NEW_MODELS = b"models"  # of a device process, after a reload
MAX_MESSAGE = 1 << 14
BUFFER_BYTES = 1 << 16  # of a socket: few messages wait while the supervisor is stopped

# Of `Status`: received; open; whether the process is ready, works, and has the keys
COUNTS = struct.Struct("=QI???")
ADMITTED_BYTES = 4096  # of the shared memory of admitted images
# Time for the metrics of a process, which then counts as down; for those of all, it is twice as long
METRICS_SECONDS = 1.0
MAX_PAGE_BYTES = 1 << 20  # of the metrics of a process


class Message(NamedTuple):
    """A message and the files that came with it, which its receiver closes."""

    kind: bytes
    rest: bytes
    files: list[int]


class Status(NamedTuple):
    """What a process reports: how many connections it has *received*, how many are *open*, and its *bundles*.

    A device process has no connections; its images are *open*. A process that starts has no *bundles*.
    One that does not *work* answers images with 503. *lost* are the device processes to which a
    front end needs another channel. A process has no keys if it could not receive the new ones.
    """

    received: int
    open: int
    bundles: str | None
    works: bool = True
    has_keys: bool = True
    lost: frozenset[str] = frozenset()

    def to_bytes(self) -> bytes:
        """Convert the status to the rest of a message."""
        is_ready = self.bundles is not None
        counts = COUNTS.pack(self.received, self.open, is_ready, self.works, self.has_keys)
        bundles = (self.bundles or "").encode()[: MAX_MESSAGE // 2]  # of many, not all fit
        return counts + ",".join(self.lost).encode() + b"\n" + bundles

    @classmethod
    def from_bytes(cls, data: bytes) -> "Status":
        """Convert what `to_bytes` returned."""
        received, num_open, is_ready, works, has_keys = COUNTS.unpack_from(data)
        names, _, bundles = data[COUNTS.size :].partition(b"\n")
        lost = frozenset(names.decode().split(",")) if names else frozenset()
        text = bundles.decode(errors="replace")  # of many, the last one may be cut
        return cls(received, num_open, text if is_ready else None, works, has_keys, lost)

    def send(self, supervisor: socket.socket) -> None:
        """Report the status to the *supervisor*."""
        send_message(supervisor, STATUS, self.to_bytes())


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Create two connected sockets for messages, with small buffers; raises `OSError`."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return pair


def receive_message(control: socket.socket, num_files: int = 2) -> Message:
    """Receive a waiting message, and up to *num_files* of its files; the kernel closes the others.

    The kind is empty if the other end has ended or left. Raises `ValueError` if the message is
    too long.
    """
    try:
        data, files, flags, _ = socket.recv_fds(control, MAX_MESSAGE, num_files)
    except OSError:
        return Message(b"", b"", [])

    kind, _, rest = data.partition(b" ")
    if flags & socket.MSG_TRUNC:
        raise ValueError("a message is too long")
    return Message(kind, rest, files)


def send_message(control: socket.socket, kind: bytes, rest: bytes = b"", *files: int) -> bool:
    """Send a message with *files*; return whether the other end gets it."""
    try:
        socket.send_fds(control, [kind + b" " + rest], files)
    except OSError:
        return False
    return True


async def request_metrics(control: socket.socket | None) -> bytes:
    """Return the metrics of the process at the other end of *control*.

    They are empty without *control*, and if the process sends too many bytes, or too late.
    """
    # Without a free file, or without an answer in time (`TimeoutError`), there is an OSError.
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        ours, theirs = map(stack.enter_context, socket.socketpair())
        if control is None or not send_message(control, SEND_METRICS, b"", theirs.fileno()):
            return b""

        # The page ends when the other process closes its copy of the socket.
        theirs.close()
        ours.setblocking(False)
        async with asyncio.timeout(METRICS_SECONDS):
            page = b""
            while piece := await asyncio.get_running_loop().sock_recv(ours, 1 << 16):
                page += piece
                if len(page) > MAX_PAGE_BYTES:
                    return b""
            return page

    return b""


async def send_metrics(file: int, page: bytes) -> None:
    """Answer `request_metrics`, which sent the socket *file*, with *page*."""
    with contextlib.suppress(OSError), socket.socket(fileno=file) as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(connection, page)
