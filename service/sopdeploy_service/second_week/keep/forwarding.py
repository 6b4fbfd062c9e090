"""Photographs on their way from processes of a server to the one that keeps them.

All processes write to one end of a socket pair of messages, and the keeping process reads the other one. A
message has a file in memory: the size of the record, the record as JSON, and the photograph. If too many are
on their way, the socket is full and a photograph is dropped.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import TypeAlias

from sopdeploy_service.second_week.kept import KeptRecord

MAX_BYTES = 64_000_000  # of a message
SIZE = struct.Struct("=I")  # bytes of the record
Receive: TypeAlias = Callable[[bytes, KeptRecord], None]

log = logging.getLogger("sopdeploy.keep")


def forward(end: socket.socket, image: bytes, record: KeptRecord) -> bool:
    """Send *image* with its *record*; return whether there was room. Thread-safe."""
    described = record.model_dump_json().encode()
    file = os.memfd_create("sopdeploy-photo", os.MFD_CLOEXEC)
    try:
        os.writev(file, [SIZE.pack(len(described)), described, image])
        socket.send_fds(end, [b"photo"], [file])
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def receive_next(end: socket.socket, receive: Receive) -> None:
    """Pass the photograph that waits at *end*, which the running event loop reads, to *receive*."""
    try:
        message, files, _, _ = socket.recv_fds(end, 16, 1)
    except BlockingIOError:
        return
    if not message:  # all other processes have ended
        asyncio.get_running_loop().remove_reader(end)
    for number in files:
        with os.fdopen(number, "rb") as file:
            file.seek(0)
            data = file.read(MAX_BYTES)
        try:
            (size,) = SIZE.unpack_from(data)
            record = KeptRecord.model_validate_json(data[SIZE.size : SIZE.size + size])
        except (struct.error, ValueError):
            log.error("another process has sent no photograph")
        else:
            receive(data[SIZE.size + size :], record)
