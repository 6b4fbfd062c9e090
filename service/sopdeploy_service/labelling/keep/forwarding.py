"""Photographs on their way from processes of a server to the one that keeps them.

Each process has a socket of messages of its own to the keeping process. A message has a sealed
file in memory: the size of the record, the record as JSON, and the photograph. If too many are
on their way, the socket is full and a photograph is dropped.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import TypeAlias

from sopdeploy.bundle.sealed import create_memory, read_memory
from sopdeploy_service.labelling.kept import KeptRecord

MAX_BYTES = 64_000_000  # of a message
SIZE = struct.Struct("=I")  # bytes of the record
Receive: TypeAlias = Callable[[bytes, KeptRecord], None]


def forward(end: socket.socket, image: bytes, record: KeptRecord) -> bool:
    """Send *image* with its *record*; return whether there was room. Thread-safe."""
    record_json = record.model_dump_json().encode()

    try:
        file = create_memory(
            "sopdeploy-photo", [SIZE.pack(len(record_json)), record_json, image]
        )
        try:
            socket.send_fds(end, [b"photo"], [file])
        finally:
            os.close(file)
    except OSError:
        return False
    return True


class Receiver:
    """Passes the photographs that come from another process at *end* to *receive*, on the running loop."""

    def __init__(
        self, end: socket.socket, receive: Receive, on_drop: Callable[[], None]
    ) -> None:
        """Begin; *on_drop* is called for a photograph that is not read."""
        self._end = end
        self._receive = receive
        self._on_drop = on_drop

        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._end, self._receive_next)

    def _receive_next(self) -> None:
        """Receive the photograph that waits; drop it if this process can open no more files."""
        # Receive the file descriptor of one photograph.
        try:
            message, files, _, _ = socket.recv_fds(self._end, len(b"photo"), 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
            files = []

        if not message:  # the other process has ended
            self._loop.remove_reader(self._end)
            self._end.close()
            return

        try:
            data = read_memory(files[0], MAX_BYTES)
        except (IndexError, OSError):  # no file, or no memory for it
            self._on_drop()
            return

        (size,) = SIZE.unpack_from(data)
        record = KeptRecord.model_validate_json(data[SIZE.size : SIZE.size + size])
        self._receive(data[SIZE.size + size :], record)
