"""Slots in shared memory: pixels and outputs between one front end and the engine process.

The engine creates one sealed memory file per front end. Its size cannot change, so no process can make
another one fail when it reads or writes. A slot has a descriptor (request and reply) and page-aligned memory
for one image (H, W, 3) uint8; the reply replaces the pixels by the outputs, float32, one after the other.
Page-aligned memory can be registered as pinned memory of a GPU.

    page 0               heartbeat, images in the engine, number of slots, bytes of a slot
    descriptors          DESCRIPTOR_BYTES each
    slots                page-aligned

A slot belongs to the front end until the engine has received its number, and from then on to the engine until
the front end has received the number back. The engine trusts nothing in the memory: it reads each value once
and checks it, and keeps number, size and owner of the slots in its own memory.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
MAX_SLOTS = 256
MAX_BYTES = 39_000_000  # per front end; more if the smallest number of slots needs it
DESCRIPTOR_BYTES = 128
HEADER = struct.Struct("=dQQQ")  # heartbeat (time.monotonic), images in the engine, slots, bytes of a slot
HEARTBEAT = struct.Struct("=dQ")
REQUEST = struct.Struct("=IIIddI")  # model, flags, bytes, arrived, deadline, generation
REPLY = struct.Struct("=IIIIdd")  # code, bytes, batch, row, queue seconds, seconds of the batch
CANCELLED, REPLY_OFFSET = 40, 48  # in a descriptor
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Request(NamedTuple):
    """A request, written by a front end; *length* is the size of a command, times are `time.monotonic`."""

    model: int
    flags: int
    length: int
    arrived: float
    deadline: float
    generation: int


class Reply(NamedTuple):
    """A reply, written by the engine: *code* 0 with *length* bytes of outputs, or the code of a rejection.

    *row* is the position of the image among the predictions of its *batch*.
    """

    code: int
    length: int = 0
    batch: int = 0
    row: int = 0
    queue_seconds: float = 0.0
    infer_seconds: float = 0.0


def slot_bytes(image: Sequence[int], outputs: Sequence[Sequence[int | None]]) -> int:
    """Compute the size of a slot in bytes, a multiple of the page size.

    It holds an *image* (H, W, 3), or all *outputs* of one image; their shapes include the batch.
    """
    floats = sum(int(np.prod([side or 1 for side in shape[1:]])) for shape in outputs)
    return -(-max(int(np.prod(image)), 4 * floats) // PAGE) * PAGE


class Slots:
    """The shared memory of one front end, mapped into this process."""

    def __init__(self, file: int, count: int, size: int) -> None:
        """Map *count* slots of *size* bytes in the memory file *file*, which this object closes."""
        self.file, self.count, self.size = file, count, size
        self._first = _first_slot(count)
        self._memory = mmap.mmap(file, self._first + count * size)
        self._views: dict[tuple[int, tuple[int, ...]], NDArray[np.uint8]] = {}
        self._floats = [
            np.frombuffer(self._memory, np.float32, size // 4, self._first + slot * size)
            for slot in range(count)
        ]

    @classmethod
    def create(cls, size: int, smallest: int = 1) -> "Slots":
        """Create a sealed memory file with slots of *size* bytes, at least *smallest* of them."""
        count = max(smallest, min(MAX_SLOTS, (MAX_BYTES - _first_slot(MAX_SLOTS)) // size))
        file = os.memfd_create("sopdeploy-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, _first_slot(count) + count * size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
        slots = cls(file, count, size)
        HEADER.pack_into(slots._memory, 0, 0.0, 0, count, size)
        return slots

    @classmethod
    def open(cls, file: int) -> "Slots":
        """Map the memory *file* that the engine has created."""
        _, _, count, size = HEADER.unpack(os.pread(file, HEADER.size, 0))
        return cls(file, count, size)

    @property
    def heartbeat(self) -> tuple[float, int]:
        """Read when the engine's loop ran last, and how many images of all front ends it had then."""
        moment, images = HEARTBEAT.unpack_from(self._memory)
        return moment, images

    def beat(self, now: float, images: int) -> None:
        """Record that the engine's loop is running and has so many *images*."""
        HEARTBEAT.pack_into(self._memory, 0, now, images)

    def pixels(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return the image of *shape* (H, W, 3) in *slot*; writing to it changes the slot."""
        view = self._views.get((slot, shape))
        if view is None:
            count, start = int(np.prod(shape)), self._first + slot * self.size
            view = np.frombuffer(self._memory, np.uint8, count, start).reshape(shape)
            self._views[slot, shape] = view
        return view

    def floats(self, slot: int) -> NDArray[np.float32]:
        """Return the whole memory of *slot* as float32."""
        return self._floats[slot]

    def read_bytes(self, slot: int, length: int) -> bytes:
        """Copy the first *length* bytes of *slot*, or the whole slot if it is smaller."""
        start = self._first + slot * self.size
        return self._memory[start : start + min(length, self.size)]

    def write_bytes(self, slot: int, data: bytes) -> int:
        """Write as many bytes of *data* as fit into *slot*; return their number."""
        start, length = self._first + slot * self.size, min(len(data), self.size)
        self._memory[start : start + length] = data[:length]
        return length

    def write_request(self, slot: int, request: Request) -> None:
        """Write the request of *slot*."""
        start = PAGE + slot * DESCRIPTOR_BYTES
        REQUEST.pack_into(self._memory, start, *request)
        self._memory[start + CANCELLED] = 0

    def read_request(self, slot: int) -> Request:
        """Read the request of *slot*, each value once; none of them has been checked."""
        return Request._make(REQUEST.unpack_from(self._memory, PAGE + slot * DESCRIPTOR_BYTES))

    def cancel(self, slot: int) -> None:
        """Tell the engine that the request of *slot* has ended."""
        self._memory[PAGE + slot * DESCRIPTOR_BYTES + CANCELLED] = 1

    def is_cancelled(self, slot: int) -> bool:
        """Check whether the request of *slot* has ended."""
        return self._memory[PAGE + slot * DESCRIPTOR_BYTES + CANCELLED] != 0

    def write_reply(self, slot: int, reply: Reply) -> None:
        """Write the reply of *slot*."""
        REPLY.pack_into(self._memory, PAGE + slot * DESCRIPTOR_BYTES + REPLY_OFFSET, *reply)

    def read_reply(self, slot: int) -> Reply:
        """Read the reply of *slot*."""
        return Reply._make(REPLY.unpack_from(self._memory, PAGE + slot * DESCRIPTOR_BYTES + REPLY_OFFSET))

    def close(self) -> None:
        """Close the file; the memory is unmapped when its last view is gone, for example that of a batch."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        self._views.clear()
        self._floats.clear()


def _first_slot(count: int) -> int:
    return PAGE + -(-count * DESCRIPTOR_BYTES // PAGE) * PAGE
