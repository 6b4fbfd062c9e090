"""Classify parts of a list: decoder processes, full batches, and the outputs of each part.

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
from sopdeploy.environment import usable_cores
from sopdeploy.errors import ConfigError, RuntimeUnavailableError
from sopdeploy_service.commands.batch.decoders import DecoderProcesses, Read
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.output import RunState
from sopdeploy_service.commands.batch.reader import Entry
from sopdeploy_service.inference.loader import LoadedModel, largest_batch
from sopdeploy_service.inference.model_worker import Images, Row, run_bisected
from sopdeploy_service.inference.results import ENGINE_FAILED, OUT_OF_MEMORY, Rejection
from sopdeploy_service.runtime.base import DeviceLostError, OverlappingRuntime, SelectiveRuntime
from sopdeploy_service.settings import Settings

BLOCK_IMAGES = 32  # at least, so that messages between processes cost little
MAX_WORKERS = 16  # unless more are requested: their blocks need memory
DECODER_SETTINGS = {"decode", "max_body_bytes", "max_pixels"}

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
    wait: Callable[[], Outputs] | None  # returns the outputs if the batch has begun


class PartClassifier:
    """Classifies parts with a loaded bundle in this process.

    Raises `ConfigError` if the bundle does not have the requested features.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, options: ClassifyOptions) -> None:
        self.loaded, self._settings, self._options = loaded, settings, options
        self._runtime, self._batch = loaded.runtime, largest_batch(loaded.runtime, settings)
        self._block = self._batch * math.ceil(BLOCK_IMAGES / self._batch)
        names = [output.name for output in loaded.bundle.manifest.outputs]
        if options.features and FEATURES not in names:
            raise ConfigError(
                f"{loaded.bundle.path} has no output `{FEATURES}`; export it with class activation maps",
                setting="features",
            )
        self._names = (names[0], FEATURES) if options.features else (names[0],)
        self._overlapping = loaded.runtime if isinstance(loaded.runtime, OverlappingRuntime) else None

    @property
    def top_k(self) -> int | None:
        """The number of classes per image; None for all above the thresholds of a multi-label network."""
        decision = self.loaded.bundle.manifest.decision
        multi_label = decision is not None and decision.thresholds is not None
        return self._settings.classes_per_image(multi_label=multi_label)

    def state(self) -> RunState:
        """Describe what the rows depend on, without their images."""
        options = self._options
        return RunState(
            bundle=self.loaded.bundle.manifest.id,
            runtime=f"{self._runtime.name} on {self._runtime.device}",
            source="",
            images=1,
            part_images=self._block * math.ceil(options.part_images / self._block),
            batch=self._batch,
            top_k=self.top_k,
            logits=options.logits,
            features=options.features,
            settings=self._settings.model_dump(mode="json", include=DECODER_SETTINGS),
        )

    def decoders(self) -> DecoderProcesses:
        """Create the decoder processes, which start when their context is entered."""
        return DecoderProcesses(
            self.loaded.bundle.manifest.preprocess,
            self._settings,
            workers=self._options.workers or min(usable_cores(), MAX_WORKERS),
            block=self._block,
        )

    def run(
        self,
        parts: Iterable[Part],
        decoders: DecoderProcesses,
        on_batch: Callable[[int, int], None] = lambda _images, _errors: None,
    ) -> Iterator[PartOutputs]:
        """Classify *parts* with pixels from *decoders*; yield each part when it is complete, in order.

        Calls *on_batch* with the images and errors of each batch. Raises `RuntimeUnavailableError` if the
        device fails.
        """
        open_parts: deque[PartOutputs] = deque()

        def blocks() -> Iterator[Sequence[Entry]]:
            for number, entries in parts:
                open_parts.append(PartOutputs(number, entries))
                for first in range(0, len(entries), decoders.block):
                    yield entries[first : first + decoders.block]

        for batch in self._run_batches(decoders, blocks()):
            rows = self._finish(batch)
            part = open_parts[0]
            part.reads += batch.reads
            part.rows += rows
            pairs = zip(batch.reads, rows, strict=True)
            on_batch(len(rows), sum(bool(read.error) or isinstance(row, Rejection) for read, row in pairs))
            if len(part.rows) == len(part.entries):
                yield open_parts.popleft()

    def _run_batches(self, decoders: DecoderProcesses, blocks: Iterable[Sequence[Entry]]) -> Iterator[_Batch]:
        """Yield the batches of *blocks*; a runtime that allows it begins the next one before."""
        begun: _Batch | None = None
        for block in decoders.decode(blocks):
            for first in range(0, len(block.reads), self._batch):
                chosen = slice(first, first + self._batch)
                pixels = block.pixels[chosen]
                batch = _Batch(block.reads[chosen], pixels, self._begin(pixels))
                if self._overlapping is None:
                    yield batch
                    continue
                if begun is not None:
                    yield begun
                begun = batch
        if begun is not None:
            yield begun

    def _begin(self, pixels: NDArray[np.uint8]) -> Callable[[], Outputs] | None:
        if self._overlapping is None:
            return None
        try:
            return self._overlapping.begin(list(pixels))
        except Exception:  # `_finish` runs the batch again, after the earlier one
            return None

    def _finish(self, batch: _Batch) -> list[Row]:
        """Return the rows of *batch*; if it fails, halve it until the image that fails is alone."""
        begun = [batch.wait] if batch.wait else []

        def run(images: Images) -> Outputs:
            if begun:
                return begun.pop()()
            pixels = cast(NDArray[np.uint8], images)
            if isinstance(self._runtime, SelectiveRuntime):
                return self._runtime.run_outputs(pixels, self._names)
            return self._runtime.run(pixels)

        try:
            rows = run_bisected(run, cast(Any, batch.pixels), self._names)
        except DeviceLostError as error:
            raise RuntimeUnavailableError(f"the device is lost ({error}); run again to continue") from error
        failed = sum(row is ENGINE_FAILED for row in rows)
        if any(row is OUT_OF_MEMORY for row in rows) or (failed == len(rows) > 1):
            raise RuntimeUnavailableError(
                f"{self._runtime.name} failed on a batch of {len(rows)}; run again to continue, or choose "
                "a smaller max_batch and another folder"
            )
        for row in rows:
            if not isinstance(row, Rejection) and FEATURES in row:  # maps would fill the memory
                row[FEATURES] = row[FEATURES].mean(axis=(1, 2), dtype=np.float32)
        return rows
