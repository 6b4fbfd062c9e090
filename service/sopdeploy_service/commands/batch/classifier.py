"""Classify parts of a list: decoder processes, full batches, the rows of the images and the table of a part.

The last bits of a runtime's results may depend on the size of the batch and on the position in the batch.
Therefore batches are fixed ranges of a part, and zeros replace an image that cannot be decoded.
The outputs of an image then depend neither on interruptions nor on errors of other images.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.bundle.probes import Outputs
from sopdeploy.environment import usable_cores
from sopdeploy.errors import ConfigError, ImageError, RuntimeUnavailableError
from sopdeploy_service.commands.batch.decoders import DecodedImage, DecoderProcesses
from sopdeploy_service.commands.batch.listing import Listing
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.output import OutputFolder, RunState
from sopdeploy_service.commands.batch.parquet import import_pyarrow
from sopdeploy_service.commands.batch.reader import ListedImage, Reader
from sopdeploy_service.inference.loader import LoadedModel, largest_batch
from sopdeploy_service.inference.model_worker import ImageOutputs, run_bisected
from sopdeploy_service.inference.results import INFERENCE_FAILED, OUT_OF_MEMORY, HttpError, rank_classes
from sopdeploy_service.keep import PredictedPhoto, keep_photo, reasons_to_keep
from sopdeploy_service.kept_folder import KeptFolder
from sopdeploy_service.runtime.base import DeviceLostError
from sopdeploy_service.settings import Settings

BLOCK_IMAGES = 32  # at least, of a message to a decoder process
MAX_WORKERS = 16  # unless more are requested: their blocks need memory
DECODER_SETTINGS = {"decode", "max_body_bytes", "max_pixels"}


class RowFormat:
    """Converts outputs of *bundle* to rows with the columns of *options*, documented in docs/batch.md.

    *top_k* limits the classes of an image; without it, a multi-label network gives all of its classes above
    their thresholds.
    """

    def __init__(self, bundle: Bundle, top_k: int | None, options: ClassifyOptions) -> None:
        self._bundle, self._top_k = bundle, top_k
        self._arrow = arrow = import_pyarrow("pyarrow")
        text, floats = arrow.string(), arrow.list_(arrow.float32())
        columns = {
            "path": text,
            "sha256": text,
            "classes": arrow.list_(text),
            "probabilities": arrow.list_(arrow.float64()),
            "known": arrow.bool_(),
            "score": arrow.float64(),
            "warnings": arrow.list_(text),
            "error": text,
            "error_message": text,
            "bundle": text,
            **({"logits": floats} if options.logits else {}),
            **({"features": floats} if options.features else {}),
        }
        self._schema = arrow.schema(columns)

    def row(self, image: DecodedImage, output: ImageOutputs) -> dict[str, Any]:
        """Return the columns of *image*; the *output* of an image that was not decoded is ignored."""
        manifest, labels = self._bundle.manifest, self._bundle.labels
        row = {**image._asdict(), "bundle": manifest.id}
        if image.error is not None:
            return row
        if isinstance(output, HttpError):
            return {**row, "error": output.code, "error_message": output.message}
        logits = output[manifest.outputs[0].name]
        (ranking,) = rank_classes(logits[None], self._top_k, manifest.thresholds)
        known, score = manifest.rejection.recognize(logits) if manifest.rejection else (None, None)
        return {
            **row,
            "classes": [labels[index] for index, _ in ranking],
            "probabilities": [probability for _, probability in ranking],
            "known": known,
            "score": score,
            "logits": logits,
            "features": output.get(EMBEDDING),
        }

    def table(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Build the table of a part; its metadata `errors` is the number of images with an error."""
        errors = sum(row["error"] is not None for row in rows)
        schema = self._schema.with_metadata({"num_errors": str(errors)})
        return self._arrow.Table.from_pylist(rows, schema=schema)


class PartClassifier:
    """Classifies parts in this process; as a context manager, it owns the decoders and the loaded bundle.

    Raises `ConfigError` if the bundle does not have the requested features, or the folder `keep` of *options*
    cannot be written.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, options: ClassifyOptions) -> None:
        manifest = loaded.bundle.manifest
        names = [output.name for output in manifest.outputs]
        if options.features and EMBEDDING not in names:
            message = f"{loaded.bundle.path} has no features; export it with_features"
            raise ConfigError(message, setting="features")
        self._outputs = (names[0], EMBEDDING) if options.features else (names[0],)
        self._runtime, self._bundle = loaded.runtime, loaded.bundle
        self._settings, self._options = settings, options
        self._batch = largest_batch(loaded.runtime, settings)
        self.part_images = self._batch * math.ceil(options.part_images / self._batch)
        self._top_k = settings.classes_per_image(multi_label=manifest.thresholds is not None)
        self._format = RowFormat(loaded.bundle, self._top_k, options)
        self._kept, self._reader = None, Reader(settings.max_body_bytes)
        if options.keep is not None:
            self._kept = KeptFolder(options.keep, settings.keep_bytes, settings.keep_days)
        workers = options.workers or min(usable_cores(), MAX_WORKERS)
        self._decoders = DecoderProcesses(manifest.preprocess, settings, workers)

    def __enter__(self) -> "PartClassifier":
        self._decoders.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.__exit__()
        self._reader.close()
        self._runtime.close()

    def run_state(self, source: str, num_images: int) -> RunState:
        """Return what the rows of a run depend on; *source* is the hash of the list of its images."""
        return RunState(
            bundle=self._bundle.manifest.id,
            runtime=f"{self._runtime.name} on {self._runtime.device}",
            source=source,
            num_images=num_images,
            part_images=self.part_images,
            batch=self._batch,
            top_k=self._top_k,
            logits=self._options.logits,
            features=self._options.features,
            settings=self._settings.model_dump(mode="json", include=DECODER_SETTINGS),
        )

    def tables(
        self,
        parts: Iterable[tuple[int, Sequence[ListedImage]]],
        on_block: Callable[[int, int], None],
    ) -> Iterator[tuple[int, Any]]:
        """Classify *parts*, each a number and a list of images; yield each number with its table of rows.

        Calls *on_block* with the numbers of images and of errors in each block. Raises
        `RuntimeUnavailableError` if the device fails.
        """
        block_images = self._batch * math.ceil(BLOCK_IMAGES / self._batch)
        blocks = (
            (number, entries[first : first + block_images])
            for number, entries in parts
            for first in range(0, len(entries), block_images)
        )
        given, listed = itertools.tee(blocks)
        for number, decoded_blocks in itertools.groupby(self._decoders.decode(given), key=itemgetter(0)):
            rows: list[dict[str, Any]] = []
            for _, (images, pixels) in decoded_blocks:
                outputs: list[ImageOutputs] = []
                for first in range(0, len(images), self._batch):
                    outputs += self._run(pixels[first : first + self._batch])
                _, entries = next(listed)
                if self._kept is not None:
                    self._keep(self._kept, zip(entries, images, pixels, outputs, strict=True))
                block_rows = list(map(self._format.row, images, outputs))
                on_block(len(block_rows), sum(row["error"] is not None for row in block_rows))
                rows += block_rows
            yield number, self._format.table(rows)

    def _keep(
        self,
        folder: KeptFolder,
        classified: Iterable[tuple[ListedImage, DecodedImage, NDArray[np.uint8], ImageOutputs]],
    ) -> None:
        """Copy photographs that are worth a label to *folder*."""
        for entry, image, pixels, output in classified:
            if image.sha256 is None or image.error is not None or isinstance(output, HttpError):
                continue
            logits = output[self._outputs[0]]
            reasons = reasons_to_keep(self._bundle, logits, image.sha256, self._settings.keep_sample)
            if reasons:
                with suppress(ImageError):  # it can no longer be read
                    body, name = self._reader.read(entry), self._bundle.manifest.project
                    photo = PredictedPhoto(
                        body, pixels, logits, self._bundle, name, datetime.now(UTC), reasons
                    )
                    keep_photo(photo, image.sha256, folder.add)

    def write_parts(
        self,
        folder: OutputFolder,
        listing: Listing,
        parts: Iterable[int],
        on_block: Callable[[int, int], None],
    ) -> None:
        """Classify the *parts* of *listing* and write them to *folder*; raises what `tables` raises."""
        for part, table in self.tables(((part, listing.read(part)) for part in parts), on_block):
            folder.write_part(part, table)

    def _run(self, pixels: NDArray[np.uint8]) -> list[ImageOutputs]:
        """Return the outputs of a batch; if it fails, halve it until the image that fails is alone."""

        def run(images: Sequence[NDArray[np.uint8]]) -> Outputs:
            return self._runtime.run(cast(NDArray[np.uint8], images))

        try:
            rows = run_bisected(run, cast(Any, pixels), self._outputs)
        except DeviceLostError as error:
            raise RuntimeUnavailableError(f"the device is lost ({error}); run again to continue") from error
        all_failed = len(rows) > 1 and all(row is INFERENCE_FAILED for row in rows)
        if all_failed or any(row is OUT_OF_MEMORY for row in rows):
            raise RuntimeUnavailableError(
                f"{self._runtime.name} failed on a batch of {len(rows)}; run again to continue, or choose "
                "a smaller max_batch and another folder"
            )
        return rows
