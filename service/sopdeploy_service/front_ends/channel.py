"""Messages between a front end and its inference process: a header and a body on a stream socket.

A stream ends when the other process dies, however it dies.
"""

import asyncio
import socket
import struct
from enum import IntEnum

HEADER = struct.Struct("=BII")  # kind, number, bytes of the body
IMAGE_HEAD = struct.Struct("=I?dd")  # model, features, arrived, deadline
RESULT_HEAD = struct.Struct("=BIIdd")  # rejection or 0, batch, row, queue seconds, inference seconds
BUFFER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 27


class MessageKind(IntEnum):
    """Kinds of messages and what their number counts; the first group is sent by front ends."""

    IMAGE = 1  # images of this front end; `IMAGE_HEAD` and the pixels
    CANCEL = 2  # an image whose request has ended

    MODEL = 16  # a model, counted backwards to 0; its archive
    RESULT = 17  # an image; `RESULT_HEAD` and its outputs, float32, one after the other
    LOAD = 18  # images in the inference process


class ChannelError(Exception):
    """The other process has violated the protocol of the channel."""


async def open_channel(connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open an end of the channel on the event loop."""
    return await asyncio.open_unix_connection(sock=connection, limit=BUFFER_BYTES)


def send_message(writer: asyncio.StreamWriter, kind: MessageKind, number: int, *parts: bytes) -> None:
    """Send a message whose body are *parts*, without waiting."""
    writer.write(b"".join((HEADER.pack(kind, number, sum(map(len, parts))), *parts)))


async def receive_message(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """Wait for the next message; return kind, number and body.

    Raises `ConnectionError` at the end of the stream, and `ChannelError` for a body that is too long.
    """
    try:
        kind, number, size = HEADER.unpack(await reader.readexactly(HEADER.size))
        if size > MAX_MESSAGE_BYTES:
            raise ChannelError(f"a message of {size} bytes is too long")
        return kind, number, await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("the other process has ended") from error


def receive_blocking(connection: socket.socket) -> tuple[int, int, bytes]:
    """Receive a message from a blocking socket, before there is an event loop; see `receive_message`."""
    kind, number, size = HEADER.unpack(_receive_exactly(connection, HEADER.size))
    return kind, number, _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionResetError("the inference process has ended")
    return data
