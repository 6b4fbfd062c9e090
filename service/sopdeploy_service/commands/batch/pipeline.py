"""Classify parts of a list: decode in worker processes, run full batches, collect the outputs of each part.

The last bits of a runtime's results may depend on the size of the batch and on the position in the batch.
Therefore batches are fixed ranges of a part, and zeros replace an image that cannot be decoded.
The outputs of an image then depend neither on interruptions nor on errors of other images.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.class_maps import FEATURES
from sopdeploy.bundle.probes import Outputs
from sopdeploy.errors import ConfigError, RuntimeUnavailableError
from sopdeploy_service.commands.batch.decoders import Block, DecoderProcesses, Read
from sopdeploy_service.commands.batch.reader import Entry
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.model_worker import Images, Row, run_bisected
from sopdeploy_service.inference.results import ENGINE_FAILED, OUT_OF_MEMORY, Rejection
from sopdeploy_service.runtime.base import DeviceLostError, OverlappingRuntime, SelectiveRuntime

BLOCK_IMAGES = 32  # at least, so that messages between processes cost little

Part = tuple[int, Sequence[Entry]]  # its number and its images


@dataclass(slots=True)
class PartOutputs:
    """The outputs of part *number*: decoding results *reads* and network outputs *rows* of its *entries*.

    The row of an image that was not decoded is meaningless; `RowFormat` ignores it.
    """

    number: int
    entries: Sequence[Entry]
    reads: list[Read] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class _Batch(NamedTuple):
    reads: Sequence[Read]
    pixels: NDArray[np.uint8]


class Pipeline:
    """Classifies parts with the runtime of *loaded* in batches of *batch* images.

    *features* requests the output of class activation maps, averaged over positions; raises `ConfigError` if
    the bundle has none.
    """

    def __init__(self, loaded: LoadedModel, batch: int, *, features: bool = False) -> None:
        self._runtime, self._batch = loaded.runtime, batch
        names = [output.name for output in loaded.bundle.manifest.outputs]
        if features and FEATURES not in names:
            raise ConfigError(
                f"--features: {loaded.bundle.path} has no output `{FEATURES}`; export it with --with-cam"
            )
        self._logits = names[0]
        self._names = (names[0], FEATURES) if features else (names[0],)
        self._selective = loaded.runtime if isinstance(loaded.runtime, SelectiveRuntime) else None
        self._overlapping = loaded.runtime if isinstance(loaded.runtime, OverlappingRuntime) else None

    @staticmethod
    def block_images(batch: int) -> int:
        """Return the number of images in a block: whole batches of *batch*, at least `BLOCK_IMAGES`."""
        return batch * math.ceil(BLOCK_IMAGES / batch)

    def run(
        self,
        parts: Iterable[Part],
        decoders: DecoderProcesses,
        on_batch: Callable[[Sequence[Read], Sequence[Row]], None] = lambda _reads, _rows: None,
    ) -> Iterator[PartOutputs]:
        """Classify *parts* with pixels from *decoders*; yield each part when it is complete, in order.

        Calls *on_batch* with the images of each batch. Raises `RuntimeUnavailableError` if the device fails.
        """
        open_parts: deque[PartOutputs] = deque()

        def tasks() -> Iterator[Sequence[Entry]]:
            for number, entries in parts:
                open_parts.append(PartOutputs(number, entries))
                for first in range(0, len(entries), decoders.block):
                    yield entries[first : first + decoders.block]

        for batch, rows in self._run_batches(self._split(decoders.decode(tasks()))):
            part = open_parts[0]
            part.reads += batch.reads
            part.rows += rows
            on_batch(batch.reads, rows)
            if len(part.rows) == len(part.entries):
                yield open_parts.popleft()

    def _split(self, blocks: Iterable[Block]) -> Iterator[_Batch]:
        for block in blocks:
            for first in range(0, len(block.reads), self._batch):
                chosen = slice(first, first + self._batch)
                yield _Batch(block.reads[chosen], block.pixels[chosen])

    def _run_batches(self, batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, list[Row]]]:
        """Run *batches*; a runtime that allows it begins a batch before the previous one has ended."""
        begun: deque[tuple[_Batch, Callable[[], Outputs] | None]] = deque()
        for batch in batches:
            wait = None
            if self._overlapping is not None:
                wait = self._begin(self._overlapping, batch)
            begun.append((batch, wait))
            if self._overlapping is None or len(begun) > 1:
                yield self._finish(*begun.popleft())
        while begun:
            yield self._finish(*begun.popleft())

    def _begin(self, runtime: OverlappingRuntime, batch: _Batch) -> Callable[[], Outputs]:
        try:
            return runtime.begin(list(batch.pixels))
        except Exception as error:  # raised when this batch is finished: an earlier one still runs
            failure = error

            def fail() -> Outputs:
                raise failure

            return fail

    def _finish(self, batch: _Batch, wait: Callable[[], Outputs] | None) -> tuple[_Batch, list[Row]]:
        """Wait for the rows of *batch*; if it fails, halve it until the image that fails is alone."""
        first = [wait]

        def run(images: Images) -> Outputs:
            begun = first.pop() if first else None
            pixels = cast(NDArray[np.uint8], images)
            if begun is not None:
                return begun()
            if self._selective is not None:
                return self._selective.run_outputs(pixels, self._names)
            return self._runtime.run(pixels)

        try:
            rows = run_bisected(run, cast(Any, batch.pixels), self._names)
        except DeviceLostError as error:
            raise RuntimeUnavailableError(f"the device is lost ({error}); run again to continue") from error
        failed = sum(row is ENGINE_FAILED for row in rows)
        if any(row is OUT_OF_MEMORY for row in rows) or (failed == len(rows) > 1):
            raise RuntimeUnavailableError(
                f"{self._runtime.name} failed on a batch of {len(rows)}; run again to continue, or give a "
                "smaller --batch with another --out"
            )
        for row in rows:
            if not isinstance(row, Rejection) and FEATURES in row:
                row[FEATURES] = row[FEATURES].mean(
                    axis=(1, 2), dtype=np.float32
                )  # maps would fill the memory
        return batch, rows
