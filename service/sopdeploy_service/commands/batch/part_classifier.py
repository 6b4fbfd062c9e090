"""Classify parts in one process: a runtime, decoder processes, and the options that change rows."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.environment import usable_cores
from sopdeploy_service.commands.batch.decoders import DECODER_SETTINGS, DecoderProcesses, Read
from sopdeploy_service.commands.batch.output import RunState
from sopdeploy_service.commands.batch.pipeline import Part, PartOutputs, Pipeline
from sopdeploy_service.commands.batch.rows import RowFormat
from sopdeploy_service.inference.loader import LoadedModel, largest_batch
from sopdeploy_service.inference.model_worker import Row
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.settings import Settings

PART_IMAGES = 4096
MAX_WORKERS = 16  # unless more are requested: their blocks need memory


class ClassifyOptions(StrictModel):
    """Options of a run.

    Attributes:
        logits: Add a column with the logits.
        features: Add a column with the last feature map, averaged over positions.
        max_errors: Stop when more images than this have an error; `None` never stops.
        workers: Decoder processes; `None` is one per core, at most `MAX_WORKERS`.
        part_images: Images of one parquet file, rounded up to full batches.
    """

    logits: bool = False
    features: bool = False
    max_errors: Annotated[int, pydantic.Field(ge=0)] | None = None
    workers: Annotated[int, pydantic.Field(ge=1, le=1024)] | None = None
    part_images: Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)] = PART_IMAGES


@dataclass(frozen=True, slots=True)
class PartClassifier:
    """Classifies parts with a loaded bundle in this process and its decoder processes."""

    loaded: LoadedModel
    settings: Settings
    options: ClassifyOptions

    @property
    def batch(self) -> int:
        """The number of images in a batch."""
        return largest_batch(self.loaded.runtime, self.settings)

    @property
    def part_images(self) -> int:
        """The number of images in a part, rounded up to full blocks."""
        block = Pipeline.block_images(self.batch)
        return block * math.ceil(self.options.part_images / block)

    @property
    def top_k(self) -> int | None:
        """The number of classes per image; None for all above the thresholds of a multi-label network."""
        decision = self.loaded.bundle.manifest.decision
        multi_label = decision is not None and decision.thresholds is not None
        return self.settings.classes_per_image(multi_label=multi_label)

    def row_format(self) -> RowFormat:
        """Create the converter from outputs to tables."""
        options = self.options
        return RowFormat(self.loaded.bundle, self.top_k, logits=options.logits, features=options.features)

    def state(self) -> RunState:
        """Describe what the rows depend on, without their images."""
        runtime, options = self.loaded.runtime, self.options
        return RunState(
            bundle=self.loaded.bundle.manifest.id,
            runtime=f"{runtime.name} on {runtime.device}",
            source="",
            images=1,
            part_images=self.part_images,
            batch=self.batch,
            top_k=self.top_k,
            logits=options.logits,
            features=options.features,
            settings=self.settings.model_dump(mode="json", include=set(DECODER_SETTINGS)),
        )

    def decoders(self) -> DecoderProcesses:
        """Create the decoder processes, which start when their context is entered."""
        return DecoderProcesses(
            self.loaded.bundle.manifest.preprocess,
            self.settings,
            workers=self.options.workers or min(usable_cores(), MAX_WORKERS),
            block=Pipeline.block_images(self.batch),
        )

    def run(
        self,
        parts: Iterable[Part],
        decoders: DecoderProcesses,
        on_batch: Callable[[int, int], None] = lambda _images, _errors: None,
    ) -> Iterator[PartOutputs]:
        """Classify *parts* in order; calls *on_batch* with the images and errors of each batch."""

        def count(reads: Sequence[Read], rows: Sequence[Row]) -> None:
            pairs = zip(reads, rows, strict=True)
            errors = sum(bool(read.error) or isinstance(row, Rejection) for read, row in pairs)
            on_batch(len(rows), errors)

        pipeline = Pipeline(self.loaded, self.batch, features=self.options.features)
        return pipeline.run(parts, decoders, count)
