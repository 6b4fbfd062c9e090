"""Decode images in worker processes.

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
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import NamedTuple, TypeAlias

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


class Read(NamedTuple):
    """Result of decoding one image, without its pixels.

    *sha256* is empty if the image was not read to its end; *error* (a code) and *message* are empty if there
    is no error.
    """

    sha256: str
    warnings: tuple[str, ...] = ()
    error: str = ""
    message: str = ""


# Results of a block, and its pixels (n, H, W, 3) uint8, zeros for an image with an error.
DecodedBlock: TypeAlias = tuple[list[Read], NDArray[np.uint8]]


class DecoderProcesses:
    """Several *workers*, processes that decode blocks as a server with *settings* does.

    Use it as a context manager; the processes start in the background. `decode` raises
    `RuntimeUnavailableError` if they do not start.
    """

    def __init__(self, rules: Preprocess, settings: Settings, workers: int) -> None:
        self._crop, self._ahead = rules.crop, BLOCKS_PER_WORKER * workers
        self._pool = _Pool(workers, rules, settings)
        self._single = _Pool(1, rules, settings)

    def __enter__(self) -> "DecoderProcesses":
        self._pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._single.stop()

    def decode(self, blocks: Iterable[Sequence[Entry]]) -> Iterator[DecodedBlock]:
        """Decode *blocks* in advance; yield their results in order."""
        waiting: deque[tuple[Sequence[Entry], Future[DecodedBlock]]] = deque()
        for entries in blocks:
            waiting.append((entries, self._pool.submit(entries)))
            if len(waiting) > self._ahead:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _result(self, entries: Sequence[Entry], decoded: "Future[DecodedBlock]") -> DecodedBlock:
        try:
            return decoded.result()
        except BrokenProcessPool:
            reads, pixels = zip(*map(self._decode_alone, entries), strict=True)
            return [read for (read,) in reads], np.concatenate(pixels)

    def _decode_alone(self, entry: Entry) -> DecodedBlock:
        try:
            return self._single.submit([entry]).result()
        except BrokenProcessPool:
            failed = Read("", error=DECODER_FAILED.code, message=DECODER_FAILED.message)
            return [failed], np.zeros((1, self._crop, self._crop, 3), np.uint8)


class _Pool:
    """A process pool that starts again after one of its *workers* has died."""

    def __init__(self, workers: int, rules: Preprocess, settings: Settings) -> None:
        self._workers, self._arguments = workers, (rules, settings)
        self._executor: ProcessPoolExecutor | None = None

    def start(self) -> ProcessPoolExecutor:
        """Start all processes."""
        self._executor = ProcessPoolExecutor(self._workers, _DecoderContext(), start_worker, self._arguments)
        self._ready = [self._executor.submit(_do_nothing) for _ in range(self._workers)]
        return self._executor

    def submit(self, entries: Sequence[Entry]) -> "Future[DecodedBlock]":
        """Decode *entries*; raise `RuntimeUnavailableError` if a process ends before it can decode."""
        executor = self._executor or self.start()
        try:
            self._ready[0].result()
        except BrokenProcessPool as error:
            raise RuntimeUnavailableError("a decoder process did not start; see its message above") from error
        try:
            return executor.submit(decode_entries, entries)
        except BrokenProcessPool:
            self._executor = None
            return self.submit(entries)

    def stop(self) -> None:
        """End the processes after their current blocks."""
        if self._executor is not None:
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
    """Reads, hashes and decodes images as the server does."""

    def __init__(self, rules: Preprocess, settings: Settings) -> None:
        self._rules, self._max_bytes = rules, settings.max_body_bytes
        self._reader, self._decode = Reader(settings.max_body_bytes), make_decoder(settings)

    def __call__(self, entry: Entry, pixels: NDArray[np.uint8]) -> Read:
        """Write the network's input of *entry* to *pixels* (H, W, 3), unless it has an error."""
        digest = ""
        try:
            body = self._reader.read(entry)
            if len(body) <= self._max_bytes:
                digest = hashlib.sha256(body).hexdigest()
            decoded = self._decode(EncodedImage(body), self._rules)
        except ImageError as error:
            return Read(digest, error=error.code, message=str(error))
        except Exception:  # a bug of the decoder fails its own image only
            return Read(digest, error=DECODER_FAILED.code, message=DECODER_FAILED.message)
        pixels[:] = decoded.pixels
        return Read(digest, decoded.warnings)

    def decode(self, entries: Sequence[Entry]) -> DecodedBlock:
        """Decode the block *entries*."""
        pixels = np.zeros((len(entries), self._rules.crop, self._rules.crop, 3), np.uint8)
        return list(map(self, entries, pixels)), pixels


_worker: list[EntryDecoder] = []  # the decoder of a worker process


def start_worker(rules: Preprocess, settings: Settings) -> None:
    """Prepare a worker process; it ends when its parent has ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Image.core.set_blocks_max(2)  # type: ignore[attr-defined]
    _worker.append(EntryDecoder(rules, settings))


def decode_entries(entries: Sequence[Entry]) -> DecodedBlock:
    """Decode *entries* in a worker process."""
    return _worker[0].decode(entries)


def _do_nothing() -> None:
    """Run when a worker process is ready."""


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
