"""Messages between a front end and its inference process: a header and a body on a stream socket.

A stream ends when the other process dies, however it dies.
"""

import asyncio
import socket
import struct
from enum import IntEnum

HEADER = struct.Struct("=BII")  # kind, number, bytes of the body
IMAGE = struct.Struct("=IqBdd")  # model, offset in the shared memory, features, arrived, deadline
RESULT = struct.Struct("=BIIIdd")  # rejection or 0, images, batch, row, queue seconds, inference seconds
INLINE = -1  # offset: the pixels follow in the message, because the shared memory is full
BUFFER_BYTES = 1 << 20


class Kind(IntEnum):
    """Kinds of messages and what their number counts; the first group is sent by front ends."""

    IMAGE = 1  # images of this front end; `IMAGE`
    CANCEL = 2  # an image whose request has ended
    COMMAND = 3  # commands of this front end; JSON
    APPLIED = 4  # the last change of the models that is in use
    RELEASE = 5  # a model that is no longer used

    RESULT = 16  # an image; `RESULT` and its outputs, float32, one after the other
    ANSWER = 17  # a command; the JSON of a rejection, or null
    MODEL = 18  # a model; its archive
    MODELS = 19  # a change of the models; JSON: the numbers of the models by name, the current one first
    LOAD = 20  # images in the inference process


class ChannelError(Exception):
    """The other process has violated the protocol of the channel."""


class Channel:
    """One end of the stream between two processes, on an event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, connection: socket.socket) -> "Channel":
        """Open the channel on a connected socket."""
        return cls(*await asyncio.open_unix_connection(sock=connection, limit=BUFFER_BYTES))

    def send(self, kind: Kind, number: int, *parts: bytes) -> None:
        """Send a message whose body are *parts*, without waiting."""
        size = sum(map(len, parts))
        self._writer.write(b"".join((HEADER.pack(kind, number, size), *parts)))

    async def receive(self, max_bytes: int) -> tuple[int, int, bytes]:
        """Wait for the next message; return kind, number and body.

        Raises `ConnectionError` at the end of the stream, and `ChannelError` for a body above *max_bytes*.
        """
        try:
            kind, number, size = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if size > max_bytes:
                raise ChannelError(f"a message of {size} bytes")
            return kind, number, await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the other process has ended") from error

    @property
    def unsent_bytes(self) -> int:
        """The number of bytes that the other process has not read."""
        return self._writer.transport.get_write_buffer_size()

    def close(self) -> None:
        """End the stream."""
        self._writer.close()


def receive_blocking(connection: socket.socket) -> tuple[int, int, bytes]:
    """Receive a message from a blocking socket, before there is an event loop; see `Channel.receive`."""
    kind, number, size = HEADER.unpack(_receive_exactly(connection, HEADER.size))
    return kind, number, _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionResetError("the inference process has ended")
    return data
