"""`sopdeploy classify`: classify all images of some sources into parquet files; continue after a stop."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sopdeploy.config import Count, StrictModel
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.errors import DataError
from sopdeploy_service.batch.decoders import DECODER_SETTINGS, DecoderProcesses, Read
from sopdeploy_service.batch.listing import Fingerprint, Hasher, Listing
from sopdeploy_service.batch.output import OutputFolder, RunState
from sopdeploy_service.batch.pipeline import Part, PartOutputs, Pipeline
from sopdeploy_service.batch.rows import RowFormat
from sopdeploy_service.batch.sources import list_entries
from sopdeploy_service.inference.loader import LoadedModel, largest_batch, load_model
from sopdeploy_service.inference.model_worker import Row
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.settings import Settings

PART_IMAGES = 4096
MAX_WORKERS = 16  # unless more are requested: their blocks need memory

OnProgress = Callable[[int, int, int], None]


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
    max_errors: int | None = None
    workers: Count | None = None
    part_images: Count = PART_IMAGES


class Classified(StrictModel):
    """A finished run: its images, how many of them have an error, and how many this process classified."""

    out: Path
    bundle: str
    images: int
    errors: int
    parts: int
    classified: int


@dataclass(slots=True)
class Progress:
    """How many images are done and have an error; calls *show* with both and the number of all images."""

    total: int
    max_errors: int | None
    show: OnProgress
    done: int = 0
    errors: int = 0

    def add(self, images: int, errors: int) -> None:
        """Count *images*, of which *errors* have an error; raise `DataError` for more than `max_errors`."""
        self.done += images
        self.errors += errors
        self.show(self.done, self.errors, self.total)
        if self.max_errors is not None and self.errors > self.max_errors:
            raise DataError(
                f"{self.errors} of {self.done} images have an error, more than --max-errors "
                f"{self.max_errors}; run again with a higher limit to continue"
            )

    def add_batch(self, reads: Sequence[Read], rows: Sequence[Row]) -> None:
        """Count a batch."""
        pairs = zip(reads, rows, strict=True)
        self.add(len(rows), sum(bool(read.error) or isinstance(row, Rejection) for read, row in pairs))


@dataclass(frozen=True, slots=True)
class PartClassifier:
    """Classifies parts with a loaded bundle in this process and its decoder processes."""

    loaded: LoadedModel
    settings: Settings
    options: ClassifyOptions

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return largest_batch(self.loaded.runtime, self.settings)

    @property
    def part_images(self) -> int:
        """Images of a part: full blocks."""
        block = Pipeline.block_images(self.batch)
        return block * math.ceil(self.options.part_images / block)

    @property
    def top_k(self) -> int | None:
        """Classes of an image; None for all classes above the thresholds of a multi-label network."""
        decision = self.loaded.bundle.manifest.decision
        several = decision is not None and decision.thresholds is not None
        return None if several and "top_k" not in self.settings.model_fields_set else self.settings.top_k

    def row_format(self) -> RowFormat:
        """Create the converter from outputs to tables."""
        options = self.options
        return RowFormat(self.loaded.bundle, self.top_k, logits=options.logits, features=options.features)

    def state(self, source: Fingerprint) -> RunState:
        """Describe what the rows of *source* depend on."""
        runtime, options = self.loaded.runtime, self.options
        return RunState(
            bundle=self.loaded.bundle.manifest.id,
            runtime=f"{runtime.name} on {runtime.device}",
            source=source.sha256,
            images=source.images,
            part_images=self.part_images,
            batch=self.batch,
            top_k=self.top_k,
            logits=options.logits,
            features=options.features,
            settings=self.settings.model_dump(mode="json", include=set(DECODER_SETTINGS)),
        )

    def run(
        self,
        parts: Iterator[Part],
        on_batch: Callable[[Sequence[Read], Sequence[Row]], None] = lambda _reads, _rows: None,
    ) -> Iterator[PartOutputs]:
        """Classify *parts* in order; calls *on_batch* with each batch."""
        pipeline = Pipeline(self.loaded, self.batch, features=self.options.features)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = self.options.workers or min(cores, MAX_WORKERS)
        rules, block = self.loaded.bundle.manifest.preprocess, Pipeline.block_images(self.batch)
        with DecoderProcesses(rules, self.settings, workers=workers, block=block) as decoders:
            yield from pipeline.run(parts, decoders, on_batch)


def classify(
    bundle: Path,
    sources: Sequence[str],
    out: Path,
    settings: Settings,
    options: ClassifyOptions | None = None,
    on_progress: OnProgress = lambda _done, _errors, _total: None,
) -> Classified:
    """Classify the images of *sources* with *bundle* and write one row per image below *out*.

    Continues a run that was stopped: parts that are complete are kept. An image that cannot be decoded gets a
    row with its error. Calls *on_progress* with the numbers of images done, with an error, and in total.
    Raises `DataError` for unusable sources and too many errors, `ConfigError` for a folder of another run,
    and the errors of `load_model`.
    """
    options, folder = options or ClassifyOptions(), OutputFolder(out)
    loaded = load_model(bundle, settings)
    try:
        classifier = PartClassifier(loaded, settings, options)
        with folder.locked():
            listing, images = _begin(folder, sources, classifier)
            progress = Progress(images, options.max_errors, on_progress)
            pending = _unfinished(folder, listing, progress)
            _write_parts(folder, listing, classifier, pending, progress)
            return Classified(
                out=out,
                bundle=loaded.bundle.name,
                images=images,
                errors=progress.errors,
                parts=listing.parts(),
                classified=sum(map(listing.images_of, pending)),
            )
    finally:
        loaded.runtime.close()


def _begin(folder: OutputFolder, sources: Sequence[str], classifier: PartClassifier) -> tuple[Listing, int]:
    """List the images of *sources*; write the state of a new run, or check that it is the one to continue."""
    listing = Listing(folder.path)
    entries = list_entries(sources, OpenOptions())
    if folder.read_state() is None:
        source = listing.write(entries, classifier.part_images)
    else:
        source = Hasher.fingerprint_of(entries)
    folder.begin(classifier.state(source))
    return listing, source.images


def _unfinished(folder: OutputFolder, listing: Listing, progress: Progress) -> list[int]:
    """Return the parts to classify; count the images of the others."""
    pending = []
    for part in range(listing.parts()):
        images = listing.images_of(part)
        errors = folder.errors_in(part, images)
        if errors is None:
            pending.append(part)
        else:
            progress.add(images, errors)
    return pending


def _write_parts(
    folder: OutputFolder,
    listing: Listing,
    classifier: PartClassifier,
    pending: Sequence[int],
    progress: Progress,
) -> None:
    """Classify the parts *pending*; another thread writes a part while the next one is classified."""
    if not pending:
        return
    form = classifier.row_format()

    def write(part: PartOutputs) -> None:
        folder.write_part(part.number, form.table(part))

    parts = ((number, listing.read(number)) for number in pending)
    written: Future[Any] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for part in classifier.run(parts, progress.add_batch):
            if written is not None:
                written.result()
            written = writer.submit(write, part)
        if written is not None:
            written.result()
