"""Decode images in child processes, so that an image that crashes a decoder fails alone.

python -m sopdeploy_service.commands.batch.decoders DESCRIPTOR    the child; its parent starts it
"""

import hashlib
import multiprocessing
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import ImageError, RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.commands.batch.sources import ListedImage, read_listed
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.results import DECODER_FAILED
from sopdeploy_service.settings import Settings

CHILD_MODULE = "sopdeploy_service.commands.batch.decoders"
BLOCKS_PER_PROCESS = 2  # one is decoded, one waits
DIED = (EOFError, OSError)  # raised by a pipe to a child that has died
_FAILED = {"error": DECODER_FAILED.code, "error_message": DECODER_FAILED.message}

Row: TypeAlias = dict[str, Any]  # the columns of an image by name
# The rows of images as far as they are known, and the pixels (n, H, W, 3), zeros for an image with an error.
DecodedBlock: TypeAlias = tuple[list[Row], NDArray[np.uint8]]


def decode_block(images: Sequence[ListedImage], rules: Preprocess, settings: Settings) -> DecodedBlock:
    """Read, hash and decode *images* as a server with *settings* does."""
    decode, pixels = make_decoder(settings), np.zeros((len(images), rules.crop, rules.crop, 3), np.uint8)
    rows = []
    for image, target in zip(images, pixels, strict=True):
        row: Row = {"path": image.path, "sha256": None, "warnings": (), "error": None, "error_message": None}
        try:
            body = read_listed(image, settings.max_body_bytes + 1)  # enough to reject a larger one
            if len(body) <= settings.max_body_bytes:
                row["sha256"] = hashlib.sha256(body).hexdigest()
            decoded = decode(EncodedImage(body), rules)
            target[:], row["warnings"] = decoded.pixels, decoded.warnings
        except ImageError as error:
            row |= {"error": error.code, "error_message": str(error)}
        except Exception:  # a bug of the decoder fails its own image only
            row |= _FAILED
        rows.append(row)
    return rows, pixels


class BatchDecoder:
    """A child that decodes; Ctrl-C in a terminal does not reach it, and it ends with its parent."""

    def __init__(self, rules: Preprocess, settings: Settings) -> None:
        self._rules, self._settings = rules, settings
        self._start()

    def decode(self, images: Sequence[ListedImage]) -> DecodedBlock:
        """Decode *images*; if the child dies, one by one, and fail each image at which it dies again.

        Raises `RuntimeUnavailableError` if the child does not start.
        """
        with suppress(*DIED):
            return self._request(images)
        self._restart()
        rows, pixels = zip(*map(self._decode_alone, images), strict=True)
        return [row for (row,) in rows], np.concatenate(pixels)

    def close(self) -> None:
        """Kill the child."""
        self._pipe.close()
        self._child.kill()
        self._child.wait()

    def _start(self) -> None:
        self._pipe, end = multiprocessing.Pipe()
        with end:
            command = [sys.executable, "-m", CHILD_MODULE, str(end.fileno())]
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[end.fileno()], start_new_session=True
            )
        with suppress(*DIED):  # `decode` finds out
            self._pipe.send((self._rules, self._settings))

    def _restart(self) -> None:
        self.close()
        self._start()
        try:
            self._request(())
        except DIED as error:
            message = "a decoder process did not start; see its message above"
            raise RuntimeUnavailableError(message) from error

    def _request(self, images: Sequence[ListedImage]) -> DecodedBlock:
        self._pipe.send(images)
        decoded: DecodedBlock = self._pipe.recv()
        return decoded

    def _decode_alone(self, image: ListedImage) -> DecodedBlock:
        try:
            return self._request([image])
        except DIED:
            self._restart()
            row = {"path": image.path, "sha256": None, "warnings": (), **_FAILED}
            return [row], np.zeros((1, self._rules.crop, self._rules.crop, 3), np.uint8)


def decode_blocks(
    blocks: Iterable[Sequence[ListedImage]], rules: Preprocess, settings: Settings, num_processes: int
) -> Generator[DecodedBlock, None, None]:
    """Decode *blocks* in advance in child processes; yield them in order.

    Raises `RuntimeUnavailableError` if the child processes do not start.
    """
    idle: SimpleQueue[BatchDecoder] = SimpleQueue()
    for _ in range(num_processes):
        idle.put(BatchDecoder(rules, settings))

    def decode_next(images: Sequence[ListedImage]) -> DecodedBlock:
        process = idle.get()
        try:
            return process.decode(images)
        finally:
            idle.put(process)

    waiting: deque[Future[DecodedBlock]] = deque()
    threads = ThreadPoolExecutor(num_processes)  # each waits for one child
    try:
        for images in blocks:
            waiting.append(threads.submit(decode_next, images))
            if len(waiting) > BLOCKS_PER_PROCESS * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
        while not idle.empty():
            idle.get().close()


def main() -> None:
    """Decode the blocks that arrive at the descriptor of the command line until its other end is closed."""
    pipe = Connection(int(sys.argv[1]))
    Image.core.set_blocks_max(2)  # type: ignore[attr-defined]
    with suppress(*DIED):
        rules, settings = pipe.recv()
        while True:
            pipe.send(decode_block(pipe.recv(), rules, settings))


if __name__ == "__main__":
    main()
