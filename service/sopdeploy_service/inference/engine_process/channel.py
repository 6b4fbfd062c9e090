"""The messages between a front end and the engine process: records of 8 bytes on a stream socket.

Stream sockets end when the other process dies, however it dies, and one read returns all records that have
arrived. A record may carry a file: slots, or an archive with the small files of a bundle.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from enum import IntEnum

RECORD = struct.Struct("=BBHI")  # kind, number of the slots' memory, slot, generation or number
READ_BYTES = 1 << 16
SEND_BUFFER = 1 << 20  # the system may grant less; 256 records of 8 bytes need 200 kB of its memory
MAX_FILES = 1  # of one record


class Kind(IntEnum):
    """Kinds of records; the first group is sent by front ends, the second by the engine."""

    SUBMIT = 1  # a slot
    APPLIED = 2  # the number of the last `MODELS` that was applied
    RELEASE = 3  # the number of a model that this front end no longer uses
    UNMAPPED = 4  # the number of a slots' memory that this front end no longer uses

    REPLY = 16  # a slot
    SLOTS = 17  # with the file of new slots, to be used from now on
    BUNDLE = 18  # the number of a model, with its archive
    MODELS = 19  # a number, with a file: which models to serve


CARRIES_FILE = frozenset({Kind.SLOTS, Kind.BUNDLE, Kind.MODELS})


class ChannelError(Exception):
    """The other process has violated the protocol of the channel."""


def open_pair() -> tuple[socket.socket, socket.socket]:
    """Create the two ends of a channel."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        end.setblocking(False)
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return pair


class Outbox:
    """Records to be sent on a non-blocking *channel*, with at most one file each."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._parts: list[tuple[bytearray, int | None]] = []

    def add(self, kind: int, memory: int, slot: int, number: int, file: int | None = None) -> None:
        """Queue a record; *file* is closed after it was sent."""
        record = RECORD.pack(kind, memory, slot, number)
        if file is None and self._parts and self._parts[-1][1] is None:
            self._parts[-1][0].extend(record)
        else:
            self._parts.append((bytearray(record), file))

    def flush(self) -> bool:
        """Send what the socket accepts; return whether everything was sent.

        Raises `OSError` if the other end is closed.
        """
        while self._parts:
            data, file = self._parts[0]
            try:
                if file is None:
                    sent = self._channel.send(data)
                else:
                    sent = socket.send_fds(self._channel, [data], [file])
            except BlockingIOError:
                return False
            if file is not None:  # it was sent with the first byte
                os.close(file)
            if sent < len(data):
                self._parts[0] = (data[sent:], None)
            else:
                del self._parts[0]
        return True

    @property
    def num_bytes(self) -> int:
        """The number of bytes that the channel has not accepted."""
        return sum(len(data) for data, _ in self._parts)

    def close(self) -> None:
        """Close the channel and the files that were not sent."""
        for _, file in self._parts:
            if file is not None:
                os.close(file)
        self._parts.clear()
        self._channel.close()


def split_records(pending: bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Yield the complete records in *pending* and remove them from it."""
    whole = len(pending) - len(pending) % RECORD.size
    data = bytes(pending[:whole])
    del pending[:whole]
    return RECORD.iter_unpack(data)
