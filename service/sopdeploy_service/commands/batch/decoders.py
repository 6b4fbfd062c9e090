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
from sopdeploy_service.commands.batch.reader import ListedImage, Reader
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.results import DECODER_FAILED
from sopdeploy_service.settings import Settings

BLOCKS_PER_WORKER = 2  # one is decoded, one waits


class DecodedImage(NamedTuple):
    """The columns of an image that are known after decoding.

    *sha256* is None if the image was not read to its end; *error* is a code, or None.
    """

    path: str
    sha256: str | None
    warnings: tuple[str, ...] = ()
    error: str | None = None
    error_message: str | None = None


# The images of a block, and their pixels (n, H, W, 3) uint8, zeros for an image with an error.
DecodedBlock: TypeAlias = tuple[list[DecodedImage], NDArray[np.uint8]]


class DecoderProcesses:
    """Several *workers*, processes that decode blocks as a server with *settings* does.

    Use it as a context manager; the processes start in the background. `decode` raises
    `RuntimeUnavailableError` if they do not start.
    """

    def __init__(self, rules: Preprocess, settings: Settings, workers: int) -> None:
        self._rules, self._settings, self._workers = rules, settings, workers

    def __enter__(self) -> "DecoderProcesses":
        self._executor = self._start(self._workers)
        self._single: ProcessPoolExecutor | None = None  # for images that may crash it
        return self

    def __exit__(self, *_: object) -> None:
        for executor in (self._executor, self._single):
            if executor is not None:
                executor.shutdown(wait=False, cancel_futures=True)

    def decode(
        self, blocks: Iterable[tuple[int, Sequence[ListedImage]]]
    ) -> Iterator[tuple[int, DecodedBlock]]:
        """Decode *blocks*, each with the number of its part, in advance; yield them in order."""
        waiting: deque[tuple[int, Sequence[ListedImage], Future[DecodedBlock]]] = deque()
        for number, entries in blocks:
            waiting.append((number, entries, self._submit(entries)))
            if len(waiting) > BLOCKS_PER_WORKER * self._workers:
                yield self._wait(*waiting.popleft())
        while waiting:
            yield self._wait(*waiting.popleft())

    def _start(self, workers: int) -> ProcessPoolExecutor:
        executor = ProcessPoolExecutor(
            workers, _DecoderContext(), start_worker, (self._rules, self._settings)
        )
        for _ in range(workers):  # a process starts with the first task that waits for it
            executor.submit(os.getpid)
        return executor

    def _submit(self, entries: Sequence[ListedImage]) -> "Future[DecodedBlock]":
        try:
            return self._executor.submit(decode_entries, entries)
        except BrokenProcessPool:  # a worker has died
            self._executor = self._start(self._workers)
            return self._executor.submit(decode_entries, entries)

    def _wait(
        self, number: int, entries: Sequence[ListedImage], decoded: "Future[DecodedBlock]"
    ) -> tuple[int, DecodedBlock]:
        try:
            return number, decoded.result()
        except BrokenProcessPool:
            images, pixels = zip(*map(self._decode_alone, entries), strict=True)
            return number, ([image for (image,) in images], np.concatenate(pixels))

    def _decode_alone(self, entry: ListedImage) -> DecodedBlock:
        if self._single is None:
            self._single = self._start(1)
            try:
                self._single.submit(os.getpid).result()
            except BrokenProcessPool as error:
                raise RuntimeUnavailableError(
                    "a decoder process did not start; see its message above"
                ) from error
        try:
            return self._single.submit(decode_entries, [entry]).result()
        except BrokenProcessPool:
            self._single = None
            failed = DecodedImage(entry.path, None, (), DECODER_FAILED.code, DECODER_FAILED.message)
            return [failed], np.zeros((1, self._rules.crop, self._rules.crop, 3), np.uint8)


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
        self.rules, self._max_bytes = rules, settings.max_body_bytes
        self._reader, self._decode = Reader(settings.max_body_bytes), make_decoder(settings)

    def __call__(self, entry: ListedImage, pixels: NDArray[np.uint8]) -> DecodedImage:
        """Write the network's input of *entry* to *pixels* (H, W, 3), unless it has an error."""
        sha256 = None
        try:
            body = self._reader.read(entry)
            if len(body) <= self._max_bytes:
                sha256 = hashlib.sha256(body).hexdigest()
            decoded = self._decode(EncodedImage(body), self.rules)
        except ImageError as error:
            return DecodedImage(entry.path, sha256, (), error.code, str(error))
        except Exception:  # a bug of the decoder fails its own image only
            return DecodedImage(entry.path, sha256, (), DECODER_FAILED.code, DECODER_FAILED.message)
        pixels[:] = decoded.pixels
        return DecodedImage(entry.path, sha256, decoded.warnings)


_worker: list[EntryDecoder] = []  # the decoder of a worker process


def start_worker(rules: Preprocess, settings: Settings) -> None:
    """Prepare a worker process; it ends when its parent has ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Image.core.set_blocks_max(2)  # type: ignore[attr-defined]
    _worker.append(EntryDecoder(rules, settings))


def decode_entries(entries: Sequence[ListedImage]) -> DecodedBlock:
    """Decode *entries* in a worker process."""
    (decoder,) = _worker
    pixels = np.zeros((len(entries), decoder.rules.crop, decoder.rules.crop, 3), np.uint8)
    return list(map(decoder, entries, pixels)), pixels


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
