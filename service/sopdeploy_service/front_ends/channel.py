"""Messages between a front end and its inference process: a header and a body on a stream socket.

A stream ends when the other process dies, however it dies. A front end gets the small files of each bundle
and the facts about its runtime as a message, so it needs no access to files.
"""

import asyncio
import io
import json
import socket
import struct
import zipfile
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, cast

from sopdeploy.bundle.folder import MANIFEST, SMALL_FILES, Bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.http_api import FastDecode
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model import Model
from sopdeploy_service.runtime.base import Runtime

HEADER = struct.Struct("=BII")  # kind, number, bytes of the body
IMAGE_HEAD = struct.Struct("=I?dd")  # model, features, arrived, deadline
RESULT_HEAD = struct.Struct("=BIIdd")  # error or 0, batch, row; seconds of queue and inference
FACTS, LABELS = "runtime.json", "labels.json"  # files of an archive
BUFFER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 27


class MessageKind(IntEnum):
    """Kinds of messages and what their number counts; the first group is sent by front ends."""

    IMAGE = 1  # images of this front end; `IMAGE_HEAD` and the pixels
    CANCEL = 2  # an image whose request has ended

    MODEL = 16  # a model, counted backwards to 0; its archive
    RESULT = 17  # an image; `RESULT_HEAD` and its outputs, float32


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


@dataclass(slots=True)
class RemoteRuntime:
    """What a front end knows of a runtime, which only the inference process runs and closes."""

    name: str
    device: str
    largest_batch: int


def archive_model(model: Model) -> bytes:
    """Write the archive of *model*."""
    loaded = model.loaded
    facts: dict[str, Any] = {
        "name": model.name,
        "runtime": loaded.runtime.name,
        "device": loaded.runtime.device,
        "largest_batch": model.largest_batch,
        "timings": loaded.timings,
        "fast_decode": None if loaded.fast_decode is None else loaded.fast_decode.model_dump(),
    }
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        archive.writestr(FACTS, json.dumps(facts))
        archive.writestr(MANIFEST, loaded.bundle.manifest.to_bytes())
        archive.writestr(LABELS, json.dumps(loaded.bundle.labels))
        for file in (loaded.bundle.path / name for name in SMALL_FILES):
            if file.is_file():
                archive.writestr(file.name, file.read_bytes())
    return output.getvalue()


def read_model(data: bytes) -> tuple[str, LoadedModel]:
    """Read the result of `archive_model`; return the name of the model and the model."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    facts: dict[str, Any] = json.loads(archive.read(FACTS))
    manifest = Manifest.from_bytes(archive.read(MANIFEST))
    folder = cast(Path, zipfile.Path(archive))  # has the methods that readers of bundles use
    fast_decode = facts["fast_decode"]
    return facts["name"], LoadedModel(
        bundle=Bundle(path=folder, manifest=manifest, labels=tuple(json.loads(archive.read(LABELS)))),
        runtime=cast(Runtime, RemoteRuntime(facts["runtime"], facts["device"], facts["largest_batch"])),
        replays={},
        timings=tuple((images, seconds) for images, seconds in facts["timings"]),
        fast_decode=None if fast_decode is None else FastDecode(**fast_decode),
    )
