"""Decode images in worker processes, which write the pixels into memory shared with this process.

Blocks are assigned to the workers in turn, and each worker has up to `DEPTH` of them, so results arrive in
order and memory is bounded. A worker ends when its parent ends, because its socket is closed then. If a
worker dies, for example because a decoder crashes on an image, another worker decodes the block again, image
by image; an image that kills this worker too gets an error.

Workers are plain subprocesses: `multiprocessing` would import the main module of the parent again, which may
be a script or a notebook.
"""

import hashlib
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import ImageError, RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.commands.batch.reader import Entry, Reader
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.results import DECODER_FAILED
from sopdeploy_service.settings import Settings

DEPTH = 3  # blocks of one worker: one is decoded, one waits, and the pixels of one are in use
DECODER_SETTINGS = ("decode", "max_body_bytes", "max_pixels")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory
PROGRAM = "from sopdeploy_service.commands.batch.decoders import work; work()"


class Read(NamedTuple):
    """Result of decoding one image, without its pixels.

    *sha256* is empty if the image was not read to its end; *error* (a code) and *message* are empty if there
    is no error.
    """

    sha256: str
    warnings: tuple[str, ...] = ()
    error: str = ""
    message: str = ""


class Block(NamedTuple):
    """Consecutive decoded images of a part: *pixels* (n, H, W, 3) uint8, zeros for an image with an error.

    The pixels are overwritten when the block after the next one is requested.
    """

    reads: list[Read]
    pixels: NDArray[np.uint8]


class DecoderProcesses:
    """Several *workers*, processes that decode blocks of at most *block* images as a server with *settings*.

    Use it as a context manager; the processes start in the background. `decode` raises
    `RuntimeUnavailableError` if one of them does not start.
    """

    def __init__(self, rules: Preprocess, settings: Settings, *, workers: int, block: int) -> None:
        self.block = block
        shape = (workers, DEPTH, block, rules.crop, rules.crop, 3)
        self._memory = _shared_file(int(np.prod(shape)))
        self._pixels = np.ndarray(shape, np.uint8, buffer=mmap.mmap(self._memory.fileno(), 0))
        self._start = {
            "shape": shape,
            "rules": rules.model_dump_json(),
            "settings": settings.model_dump(mode="json", include=set(DECODER_SETTINGS)),
        }
        self._workers: list[Worker] = []
        self._count = workers

    def __enter__(self) -> "DecoderProcesses":
        self._workers = [self._start_worker(number) for number in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._memory.close()

    def decode(self, tasks: Iterable[Sequence[Entry]]) -> Iterator[Block]:
        """Decode *tasks* of at most `block` images in advance; yield their blocks in order."""
        for worker in self._workers:
            worker.wait_until_ready()
        waiting: deque[tuple[int, int, Sequence[Entry]]] = deque()  # (worker, slot, task)
        upcoming = enumerate(tasks)

        def send_next() -> None:
            for number, task in upcoming:
                turn, index = divmod(number, self._count)
                waiting.append((index, turn % DEPTH, task))
                self._workers[index].send(turn % DEPTH, task)
                return

        for _ in range(self._count * DEPTH):
            send_next()
        for done in count():
            if done >= 2:
                send_next()
            if not waiting:
                return
            index, slot, task = waiting.popleft()
            reads = self._workers[index].receive()
            if reads is None:
                later = [(slot, task) for other, slot, task in waiting if other == index]
                reads = self._repeat(index, slot, task)
                for later_slot, later_task in later:
                    self._workers[index].send(later_slot, later_task)
            yield Block(reads, self._pixels[index, slot, : len(reads)])

    def _start_worker(self, number: int) -> "Worker":
        return Worker({**self._start, "number": number}, self._memory.fileno())

    def _repeat(self, index: int, slot: int, task: Sequence[Entry]) -> list[Read]:
        """Decode the images of *task* one by one after worker *index* died; restart it whenever it dies."""
        found: list[Read] = []
        pixels = np.zeros_like(self._pixels[index, slot])
        alive = False
        for position, entry in enumerate(task):
            if not alive:
                self._workers[index].stop()
                self._workers[index] = self._start_worker(index)
                self._workers[index].wait_until_ready()
            self._workers[index].send(slot, [entry])
            reads = self._workers[index].receive()
            alive = reads is not None
            if reads is None:
                reads = [Read("", error=DECODER_FAILED.code, message=DECODER_FAILED.message)]
            else:
                pixels[position] = self._pixels[index, slot, 0]
            found += reads
        if not alive:
            self._workers[index].stop()
            self._workers[index] = self._start_worker(index)
            self._workers[index].wait_until_ready()
        self._pixels[index, slot] = pixels
        return found


class Worker:
    """One process, which reads tasks from a socket until it is closed."""

    def __init__(self, start: dict[str, Any], memory: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            descriptors = (theirs.fileno(), memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, *map(str, descriptors)],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                process_group=0,  # Ctrl-C reaches only the parent, which stops its workers
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._ready = False
        self._send(start)

    def wait_until_ready(self) -> None:
        """Wait until the process has imported the decoder; raise `RuntimeUnavailableError` if it ends."""
        if not self._ready and self.receive() is None:
            self.stop()
            raise RuntimeUnavailableError("a decoder process did not start; see its message above")
        self._ready = True

    def send(self, slot: int, entries: Sequence[Entry]) -> None:
        """Make the process decode *entries* into *slot*."""
        self._send((slot, [tuple(entry) for entry in entries]))

    def receive(self) -> list[Read] | None:
        """Wait for the result of the oldest task; None if the process has died."""
        try:
            return [Read(*one) for one in self._connection.recv()]
        except (EOFError, OSError):
            return None

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:  # it has died, which `receive` reports
            return


def _shared_file(size: int) -> Any:
    """Create an unnamed file of *size* bytes, in memory if possible; it disappears when it is closed."""
    folder = None
    if SHARED_MEMORY.is_dir():
        status = os.statvfs(SHARED_MEMORY)
        folder = SHARED_MEMORY if status.f_bavail * status.f_frsize > 2 * size else None
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the context manager is the caller
    file.truncate(size)
    return file


def work() -> None:
    """Run a worker: `python -c PROGRAM SOCKET MEMORY`, both as file descriptors."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        start = connection.recv()
        shape = start["shape"]
        memory = mmap.mmap(int(sys.argv[2]), 0)
        pixels: NDArray[np.uint8] = np.ndarray(shape, np.uint8, buffer=memory)[start["number"]]
        rules = Preprocess.model_validate_json(start["rules"])
        settings = Settings(**start["settings"])
        Image.core.set_blocks_max(2)  # type: ignore[attr-defined]
        decode = EntryDecoder(rules, settings)
        tasks: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_receive_tasks, args=(connection, tasks), daemon=True).start()
        connection.send([])
        while (task := tasks.get()) is not None:
            slot, entries = task
            found = [decode(Entry(*entry), pixels[slot, n]) for n, entry in enumerate(entries)]
            connection.send([tuple(one) for one in found])
    except (EOFError, ConnectionError):
        return


def _receive_tasks(connection: Any, tasks: "SimpleQueue[Any]") -> None:
    """Put the received tasks into *tasks*, then None when the parent has closed *connection*.

    Reading never waits for decoding: else the parent could wait until it has sent a large task, while this
    process waits until the parent reads its results.
    """
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        tasks.put(None)


class EntryDecoder:
    """Reads, hashes and decodes one image as the server does with *settings*."""

    def __init__(self, rules: Preprocess, settings: Settings) -> None:
        self._rules, self._max_bytes = rules, settings.max_body_bytes
        self._reader, self._decode = Reader(settings.max_body_bytes), make_decoder(settings)

    def __call__(self, entry: Entry, pixels: NDArray[np.uint8]) -> Read:
        """Write the network's input of *entry* to *pixels* (H, W, 3), zeros if it has an error."""
        digest = ""
        try:
            body = self._reader.read(entry)
            if len(body) <= self._max_bytes:
                digest = hashlib.sha256(body).hexdigest()
            decoded = self._decode(EncodedImage(body), self._rules)
        except ImageError as error:
            pixels[:] = 0
            return Read(digest, error=error.code, message=str(error))
        except Exception:  # a bug of the decoder fails its own image only
            pixels[:] = 0
            return Read(digest, error=DECODER_FAILED.code, message=DECODER_FAILED.message)
        pixels[:] = decoded.pixels
        return Read(digest, decoded.warnings)
