"""The channel between a front end and an engine: short records on a stream socket, pixels in shared memory.

A front end sends records of one size, which say which slot of the memory has the pixels of an image for which
model. The engine answers each image once; the outputs are in the same slot, which is then free. The engine
opens a channel with a description of its models, which stay the same until the channel ends; after a reload,
the front ends get new channels.

The engine creates the memory and seals its size. Nothing that a front end sends has a length, and nothing
that it writes into a slot is anything else than pixels. A stream ends when the other process ends, however.
"""

import fcntl
import json
import math
import mmap
import os
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import EMBEDDING, Manifest
from sopdeploy_service.inference.model import Model, RuntimeFacts
from sopdeploy_service.inference.results import HttpError

REQUEST = struct.Struct("=BBHId")  # kind, flags, number of the model, slot, deadline
RUN, CANCEL = 1, 2  # kinds; the others are numbers of a slot in use
FEATURES, FOR_DRIFT = 1, 2  # flags
FRAME = struct.Struct("=BI")  # of the engine: kind and bytes of what follows
RESULTS, LOADED = 1, 2  # kinds: `RESULT` structures; the runtime and timings of each model by name, as JSON
RESULT = struct.Struct("=IHddd")  # slot; images in the batch, or `FAILED`; seconds of queue, batch, load
FAILED = 0  # in place of the images in the batch: the slot has the error
OPENING = struct.Struct("=IIII")  # slots, bytes of the outputs and of the pixels in each, bytes of the models
ERROR_SIZE = struct.Struct("=I")
MAX_ERROR_BYTES = 1020
MAX_UNSENT_BYTES = 1 << 20  # of results that a front end does not read
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # else a front end could shrink the file
LINE = 64  # bytes of a cache line; outputs and pixels begin where one does


class ChannelError(Exception):
    """A front end has sent what no front end sends."""


class ModelFields(TypedDict):
    """The values of `ModelFacts` in JSON."""

    name: str
    path: str
    manifest: str
    labels: Sequence[str]
    contents: dict[str, str]
    runtime: tuple[str, str, int]
    timings: Sequence[tuple[int, float]]


class ModelFacts(NamedTuple):
    """A model of an engine, as a front end knows it."""

    name: str
    bundle: Bundle
    runtime: RuntimeFacts
    timings: Sequence[tuple[int, float]]

    @classmethod
    def describe(cls, model: Model) -> "ModelFacts":
        """Describe *model*."""
        return cls(model.name, model.bundle, model.runtime, model.latency.measured())

    def to_fields(self) -> ModelFields:
        """Convert the facts to values of JSON."""
        bundle = self.bundle
        return {
            "name": self.name,
            "path": str(bundle.path),
            "manifest": bundle.manifest.to_bytes().decode(),
            "labels": bundle.labels,
            "contents": {name: data.decode("latin-1") for name, data in bundle.contents.items()},
            "runtime": self.runtime,
            "timings": self.timings,
        }

    @classmethod
    def from_fields(cls, fields: ModelFields) -> "ModelFacts":
        """Convert what `to_fields` returned, after JSON."""
        manifest = Manifest.from_bytes(fields["manifest"].encode())
        contents = {name: text.encode("latin-1") for name, text in fields["contents"].items()}
        path, labels = Path(fields["path"]), tuple(fields["labels"])
        bundle = Bundle(path=path, manifest=manifest, labels=labels, contents=contents)
        return cls(fields["name"], bundle, RuntimeFacts(*fields["runtime"]), fields["timings"])


class Slots:
    """The slots of a channel: in each, the outputs of an image or an error, then its pixels."""

    def __init__(self, memory: mmap.mmap, count: int, output_bytes: int, pixel_bytes: int) -> None:
        self.count, self._output_bytes, self._pixel_bytes = count, output_bytes, pixel_bytes
        self._memory = np.frombuffer(memory, np.uint8).reshape(count, output_bytes + pixel_bytes)

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
        outputs, begin = {}, 0
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


def output_shapes(bundle: Bundle, *, features: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the shape of each output of an image by name, in order; the embedding only with *features*."""
    shapes: dict[str, tuple[int, ...]] = {}
    for output in bundle.manifest.outputs:
        if features or output.name != EMBEDDING:
            # Only the number of images is None in a manifest; 1 is for the type.
            shapes[output.name] = tuple(side or 1 for side in output.shape[1:])
    return shapes


def open_channel(
    connection: socket.socket, models: Sequence[ModelFacts], num_slots: int
) -> tuple[Slots, bytes]:
    """Create *num_slots* slots, and send their memory on the new *connection*.

    Each slot is large enough for an image of any of *models*. Returns the slots, and the description of
    *models*, which the caller sends next.
    """
    output_bytes, pixel_bytes = MAX_ERROR_BYTES + ERROR_SIZE.size, 0  # a slot has outputs or an error
    for model in models:
        num_values = sum(map(math.prod, output_shapes(model.bundle).values()))
        output_bytes = max(output_bytes, 4 * num_values)
        pixel_bytes = max(pixel_bytes, math.prod(model.bundle.manifest.image_shape))
    output_bytes = math.ceil(output_bytes / LINE) * LINE
    pixel_bytes = math.ceil(pixel_bytes / LINE) * LINE
    described = json.dumps([model.to_fields() for model in models]).encode()
    opening = OPENING.pack(num_slots, output_bytes, pixel_bytes, len(described))
    file = os.memfd_create("sopdeploy-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, num_slots * (output_bytes + pixel_bytes))
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
        memory = mmap.mmap(file, 0)
        socket.send_fds(connection, [opening], [file])  # a few bytes, which a new connection takes at once
    finally:
        os.close(file)
    return Slots(memory, num_slots, output_bytes, pixel_bytes), described


def receive_opening(connection: socket.socket) -> tuple[list[ModelFacts], Slots]:
    """Wait for what `open_channel` sends; raises `ConnectionError` if the engine ends."""
    connection.setblocking(True)
    opening, files, _, _ = socket.recv_fds(connection, OPENING.size, 1, socket.MSG_WAITALL)
    if len(opening) < OPENING.size or not files:
        raise ConnectionResetError("the engine has ended")
    num_slots, output_bytes, pixel_bytes, size = OPENING.unpack(opening)
    try:
        memory = mmap.mmap(files[0], 0)
    finally:
        os.close(files[0])
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the engine has ended")
        data += part
    models = [ModelFacts.from_fields(fields) for fields in json.loads(data)]
    return models, Slots(memory, num_slots, output_bytes, pixel_bytes)
