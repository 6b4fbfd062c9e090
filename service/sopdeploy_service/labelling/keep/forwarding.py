"""Photographs on their way from processes of a server to the one that keeps them.

Each process has a socket of messages of its own to the keeping process. A message has a sealed
file in memory: the size of the record, the record as JSON, and the photograph. If too many are
on their way, the socket is full and a photograph is dropped. The keeping process does not trust
the others: it reads so many bytes per second from each, and drops the photographs beyond.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

from sopdeploy.bundle.sealed import create_memory, read_memory
from sopdeploy_service.http.api_keys import TokenBucket
from sopdeploy_service.inference import results
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.labelling.kept import KeptRecord

MAX_BYTES = 64_000_000  # of a message
MAX_RECORD_BYTES = 1 << 17
# Tokens are kilobytes.
MIN_TOKENS = 640  # of a message, however small it is
TOKENS_PER_SECOND = 64_000
MAX_TOKENS = 160_000
PAUSE_SECONDS = 0.1  # without tokens
SIZE = struct.Struct("=I")  # bytes of the record
Receive: TypeAlias = Callable[[bytes, KeptRecord], None]

log = logging.getLogger("sopdeploy.keep")


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

        self._tokens = TokenBucket(TOKENS_PER_SECOND, MAX_TOKENS, [0.0, 0.0])
        self._loop = asyncio.get_running_loop()
        self._resume()

    def _resume(self) -> None:
        self._loop.add_reader(self._end, self._receive_next)

    def _receive_next(self) -> None:
        """Receive the photograph that waits; without tokens or a file, drop it and pause."""
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

        # Read its record; a sender of anything else is not heard any more.
        try:
            data = self._read(files)
            (size,) = SIZE.unpack_from(data)
            if size > MAX_RECORD_BYTES:
                raise ValueError(f"a record of {size} bytes")
            record = KeptRecord.model_validate_json(data[SIZE.size : SIZE.size + size])
        except RejectedError:  # no tokens, or this process cannot open more files
            self._on_drop()
            self._loop.remove_reader(self._end)
            self._loop.call_later(PAUSE_SECONDS, self._resume)
        except (OSError, struct.error, ValueError):
            log.error("another process has sent no photo; its next ones are not received")
            self._loop.remove_reader(self._end)
            self._end.close()
        else:
            self._receive(data[SIZE.size + size :], record)

    def _read(self, files: Sequence[int]) -> bytes:
        """Read and close the only one of *files*.

        Raises `RejectedError` if there is none, or if there are no tokens for its bytes.
        """
        if not files:  # this process can open no more
            raise RejectedError(results.OUT_OF_MEMORY)

        try:
            self._tokens.spend(max(MIN_TOKENS, os.fstat(files[0]).st_size // 1000))
        except RejectedError:
            os.close(files[0])
            raise
        return read_memory(files[0], MAX_BYTES)
