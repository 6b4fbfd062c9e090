"""The channel between a front end and a device process: short records on a stream socket, pixels in shared memory.

A front end sends records of one size, which say which slot of the memory has the pixels of an
image for which model. The device process answers each image once; the outputs are in the same slot,
which is then free. The device process opens a channel with a description of its models, which stay the
same until the channel ends; after a reload, the front ends get new channels.

The device process creates the memory. However a process ends, its streams end with it.
"""

import errno
import json
import math
import mmap
import os
import socket
import struct
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import EMBEDDING, Manifest
from sopdeploy.bundle.sealed import create_memory, map_memory
from sopdeploy_service.decoding.child import receive
from sopdeploy_service.inference.model import Model, RuntimeFacts
from sopdeploy_service.inference.results import HttpError

REQUEST = struct.Struct("=BBHId")  # kind, flags, number of the model, slot, deadline
# kinds
RUN = 1
CANCEL = 2  # of the image in a slot; the other fields are not read
# flags
FEATURES = 1  # the answer needs the features, too
# slot; number of images in the batch, or `FAILED`; seconds in the queue and of the batch
RESULT = struct.Struct("=IHdd")
FAILED = 0  # in place of the images in the batch: the slot has the error
# number of slots; bytes of the outputs and of the pixels in each; bytes of the models
OPENING = struct.Struct("=IIII")
ERROR_SIZE = struct.Struct("=I")
MAX_ERROR_BYTES = 1020
# One bundle needs up to 40 MB: its manifest, labels, card and certificate; an ordinary one 50 kB.
MAX_MODELS_BYTES = 1 << 26
OPENING_SECONDS = 30.0  # for the opening to arrive
MAX_UNSENT_BYTES = 1 << 20  # of results that a front end does not read
LINE = 64  # bytes of a cache line; outputs and pixels begin where one does


class ChannelError(Exception):
    """There is no channel: the other end has ended, or the models are too large."""


class ModelFields(TypedDict):
    """The values of `ModelFacts` in JSON; bytes are in base64, so that nothing in them counts as JSON."""

    name: str
    path: str
    manifest: str
    labels: str
    contents: dict[str, str]
    runtime: tuple[str, str, int]
    timings: Sequence[tuple[int, float]]


class ModelFacts(NamedTuple):
    """A model of a device process, as a front end knows it."""

    name: str
    bundle: Bundle
    runtime: RuntimeFacts
    timings: Sequence[tuple[int, float]]

    @classmethod
    def describe(cls, model: Model) -> "ModelFacts":
        """Describe *model*."""
        return cls(model.name, model.bundle, model.runtime, model.pace.measured())

    def to_fields(self) -> ModelFields:
        """Convert the facts to values of JSON."""
        bundle = self.bundle
        return {
            "name": self.name,
            "path": _as_text(os.fsencode(bundle.path)),
            "manifest": _as_text(bundle.manifest.to_bytes()),
            "labels": _as_text("\n".join(bundle.labels).encode()),
            "contents": {name: _as_text(data) for name, data in bundle.contents.items()},
            "runtime": self.runtime,
            "timings": self.timings,
        }

    @classmethod
    def from_fields(cls, fields: ModelFields) -> "ModelFacts":
        """Convert what `to_fields` returned, after JSON."""
        bundle = Bundle(
            path=Path(os.fsdecode(b64decode(fields["path"]))),
            manifest=Manifest.from_bytes(b64decode(fields["manifest"])),
            labels=tuple(b64decode(fields["labels"]).decode().split("\n")),
            contents={name: b64decode(text) for name, text in fields["contents"].items()},
        )
        return cls(fields["name"], bundle, RuntimeFacts(*fields["runtime"]), fields["timings"])


def _as_text(data: bytes) -> str:
    return b64encode(data).decode()


class Slots:
    """The slots of a channel: in each, the outputs of an image or an error, then its pixels."""

    def __init__(
        self, memory: mmap.mmap, count: int, output_bytes: int, pixel_bytes: int
    ) -> None:
        self.count = count
        self._output_bytes = output_bytes
        self._memory = np.frombuffer(memory, np.uint8).reshape(
            count, output_bytes + pixel_bytes
        )

    def pixels(self, slot: int, shape: Sequence[int]) -> NDArray[np.uint8]:
        """Return the pixels in *slot* as an array of *shape*, which shares the memory."""
        begin = self._output_bytes  # behind the outputs
        return self._memory[slot, begin : begin + math.prod(shape)].reshape(shape)

    def write_outputs(
        self, slot: int, outputs: Mapping[str, NDArray[np.float32]], names: Iterable[str]
    ) -> None:
        """Write the *outputs* with *names*, in this order."""
        begin = 0
        for name in names:
            values = np.ascontiguousarray(outputs[name]).reshape(-1).view(np.uint8)
            self._memory[slot, begin : begin + len(values)] = values
            begin += len(values)

    def read_outputs(
        self, slot: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, NDArray[np.float32]]:
        """Copy the outputs with *shapes* by name, in the order in which `write_outputs` wrote them."""
        outputs = {}
        begin = 0

        for name, shape in shapes.items():
            end = begin + 4 * math.prod(shape)
            outputs[name] = self._memory[slot, begin:end].copy().view(np.float32).reshape(shape)
            begin = end
        return outputs

    def write_error(self, slot: int, error: HttpError) -> None:
        """Write *error* where outputs would be."""
        # Half of the bytes, because the other fields and what JSON adds need some, too.
        message = error.message.encode()[: MAX_ERROR_BYTES // 2].decode(errors="ignore")
        data = json.dumps({**asdict(error), "message": message}, ensure_ascii=False).encode()
        data = ERROR_SIZE.pack(len(data)) + data
        self._memory[slot, : len(data)] = np.frombuffer(data, np.uint8)

    def read_error(self, slot: int) -> HttpError:
        """Read what `write_error` wrote."""
        (size,) = ERROR_SIZE.unpack(self._memory[slot, : ERROR_SIZE.size].tobytes())
        data = self._memory[slot, ERROR_SIZE.size : ERROR_SIZE.size + size].tobytes()
        return HttpError(**json.loads(data))


def output_shapes(
    bundle: Bundle,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return two tables of the outputs of an image, without and with the embedding: shapes by name, in order."""
    # Only the number of images is None in a manifest; 1 is for the type.
    shapes = {
        one.name: tuple(side or 1 for side in one.shape[1:]) for one in bundle.manifest.outputs
    }
    return {name: shape for name, shape in shapes.items() if name != EMBEDDING}, shapes


def needed_bytes(bundle: Bundle) -> tuple[int, int]:
    """Return how many bytes the outputs and the pixels of an image need."""
    _, shapes = output_shapes(bundle)
    num_values = sum(map(math.prod, shapes.values()))
    return 4 * num_values, math.prod(bundle.manifest.image_shape)


def open_channel(
    connection: socket.socket, models: Sequence[ModelFacts], num_slots: int
) -> tuple[Slots, bytes]:
    """Create *num_slots* slots, and send their memory on the new *connection*.

    Each slot is large enough for an image of any of *models*. Returns the slots, and the
    description of *models*, which the caller sends next. Raises `OSError`, or `ChannelError` if
    no front end would take the description.
    """
    # A slot has outputs or an error, and pixels.
    output_bytes = MAX_ERROR_BYTES + ERROR_SIZE.size
    pixel_bytes = 0

    for model in models:
        needed_outputs, needed_pixels = needed_bytes(model.bundle)
        output_bytes = max(output_bytes, needed_outputs)
        pixel_bytes = max(pixel_bytes, needed_pixels)
    output_bytes = math.ceil(output_bytes / LINE) * LINE
    pixel_bytes = math.ceil(pixel_bytes / LINE) * LINE

    description = json.dumps([model.to_fields() for model in models]).encode()
    check_size(len(description))

    # The opening has a few bytes, which a new connection takes at once.
    opening = OPENING.pack(num_slots, output_bytes, pixel_bytes, len(description))

    file = create_memory("sopdeploy-slots", num_slots * (output_bytes + pixel_bytes))
    try:
        socket.send_fds(connection, [opening], [file])
    except OSError:
        os.close(file)
        raise

    return Slots(map_memory(file), num_slots, output_bytes, pixel_bytes), description


def check_size(size: int) -> None:
    """Raise `ChannelError` for a description of *size* bytes that no front end reads."""
    if size > MAX_MODELS_BYTES:
        raise ChannelError(
            f"the models need {size} bytes, more than {MAX_MODELS_BYTES}; serve fewer"
        )


def receive_opening(connection: socket.socket) -> tuple[list[ModelFacts], Slots]:
    """Wait for what `open_channel` sends.

    Raises `OSError` if the device process ends or takes longer than `OPENING_SECONDS`.
    """
    # The memory, and how long the description is.
    end = time.monotonic() + OPENING_SECONDS
    connection.settimeout(OPENING_SECONDS)
    opening, files, _, _ = socket.recv_fds(connection, OPENING.size, 1, socket.MSG_WAITALL)

    if len(opening) < OPENING.size or not files:
        for file in files:
            os.close(file)
        raise ConnectionResetError(errno.ECONNRESET, "the device process has ended")

    num_slots, output_bytes, pixel_bytes, size = OPENING.unpack(opening)
    memory = map_memory(files[0])

    # The models.
    check_size(size)
    description = receive(connection, size, end)
    models = [ModelFacts.from_fields(fields) for fields in json.loads(description)]
    return models, Slots(memory, num_slots, output_bytes, pixel_bytes)
