"""Decode images in worker processes, which write the pixels into memory shared with this process.

Blocks of images are decoded in advance and arrive in order. If a worker dies, for example because a decoder
crashes on an image, the blocks in work are decoded again in another process, image by image. An image that
kills this process, too, gets an error.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import prod
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
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

BLOCKS_PER_WORKER = 2  # one is decoded, one waits
BLOCKS_IN_USE = 2  # the runtime may still need the pixels of the previous block


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
    `RuntimeUnavailableError` if they do not start.
    """

    def __init__(self, rules: Preprocess, settings: Settings, *, workers: int, block: int) -> None:
        self.block = block
        self._slots = BLOCKS_PER_WORKER * workers + BLOCKS_IN_USE
        shape = (self._slots, block, rules.crop, rules.crop, 3)
        memory = multiprocessing.RawArray("B", prod(shape))
        self._pixels = np.frombuffer(memory, np.uint8).reshape(shape)
        self._pool = _Pool(workers, memory, shape, rules, settings)
        self._single = _Pool(1, memory, shape, rules, settings)

    def __enter__(self) -> "DecoderProcesses":
        self._pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._single.stop()

    def decode(self, tasks: Iterable[Sequence[Entry]]) -> Iterator[Block]:
        """Decode *tasks* of at most `block` images in advance; yield their blocks in order."""
        self._pool.wait_until_ready()
        waiting: deque[tuple[int, Sequence[Entry], Future[list[Read]]]] = deque()
        for number, entries in enumerate(tasks):
            slot = number % self._slots
            waiting.append((slot, entries, self._pool.submit(slot, 0, entries)))
            if len(waiting) > self._slots - BLOCKS_IN_USE:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _finish(self, slot: int, entries: Sequence[Entry], reads: "Future[list[Read]]") -> Block:
        pixels = self._pixels[slot, : len(entries)]
        try:
            return Block(reads.result(), pixels)
        except BrokenProcessPool:
            return Block([self._decode_alone(slot, n, entry) for n, entry in enumerate(entries)], pixels)

    def _decode_alone(self, slot: int, position: int, entry: Entry) -> Read:
        try:
            return self._single.submit(slot, position, [entry]).result()[0]
        except BrokenProcessPool:
            self._pixels[slot, position] = 0
            return Read("", error=DECODER_FAILED.code, message=DECODER_FAILED.message)


class _Pool:
    """A process pool that starts again after one of its *workers* has died; *arguments* are for them.

    The workers end when the writing end of a pipe is closed: by `stop`, or because this process has ended.
    """

    def __init__(self, workers: int, *arguments: Any) -> None:
        self._workers, self._arguments = workers, arguments
        self._executor: ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Start all processes."""
        self._pipe = multiprocessing.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(
            self._workers, _DecoderContext(), start_worker, (self._pipe[0], *self._arguments)
        )
        self._ready = [self._executor.submit(_do_nothing) for _ in range(self._workers)]

    def wait_until_ready(self) -> None:
        """Wait until a process can decode; raise `RuntimeUnavailableError` if it ends instead."""
        try:
            self._ready[0].result()
        except BrokenProcessPool as error:
            raise RuntimeUnavailableError("a decoder process did not start; see its message above") from error

    def submit(self, slot: int, position: int, entries: Sequence[Entry]) -> "Future[list[Read]]":
        """Decode *entries* into the pixels of *slot* from *position* on."""
        if self._executor is not None:
            try:
                return self._executor.submit(decode_entries, slot, position, entries)
            except BrokenProcessPool:
                self.stop()
        self.start()
        self.wait_until_ready()
        return self.submit(slot, position, entries)

    def stop(self) -> None:
        """End the processes without waiting for their images."""
        if self._executor is not None:
            for end in self._pipe:
                end.close()
            self._executor.shutdown(wait=False, cancel_futures=True)


class _DecoderProcess(SpawnProcess):
    """A process that Ctrl-C in a terminal does not reach; its parent stops it.

    It does not import the main module again, which may be a script without `if __name__ == "__main__"`.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _DecoderContext(SpawnContext):
    """Lets a `ProcessPoolExecutor` start such processes."""

    Process = _DecoderProcess


class EntryDecoder:
    """Reads, hashes and decodes images as the server does, into *pixels* (slots, n, H, W, 3)."""

    def __init__(self, pixels: NDArray[np.uint8], rules: Preprocess, settings: Settings) -> None:
        self._pixels, self._rules, self._max_bytes = pixels, rules, settings.max_body_bytes
        self._reader, self._decode = Reader(settings.max_body_bytes), make_decoder(settings)

    def __call__(self, slot: int, position: int, entry: Entry) -> Read:
        """Write the network's input of *entry* to *position* of *slot*, zeros if it has an error."""
        pixels = self._pixels[slot, position]
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


_worker: list[EntryDecoder] = []  # the decoder of a worker process


def start_worker(
    pipe: "Connection[Any, Any]", memory: Any, shape: tuple[int, ...], rules: Preprocess, settings: Settings
) -> None:
    """Prepare a worker process; it ends when the other end of *pipe* is closed."""
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    Image.core.set_blocks_max(2)  # type: ignore[attr-defined]
    _worker.append(EntryDecoder(np.frombuffer(memory, np.uint8).reshape(shape), rules, settings))


def decode_entries(slot: int, position: int, entries: Sequence[Entry]) -> list[Read]:
    """Decode *entries* in a worker process."""
    return [_worker[0](slot, number, entry) for number, entry in enumerate(entries, position)]


def _do_nothing() -> None:
    """Run when a worker process is ready."""


def _end_with(pipe: "Connection[Any, Any]") -> None:
    pipe.poll(None)
    os._exit(1)
