"""Classify parts of a list: decoder processes, full batches, one row per image.

The last bits of a runtime's results may depend on the size of the batch and on the position in
the batch. Therefore batches are fixed ranges of a part, and zeros replace an image that cannot
be decoded. The outputs of an image then depend neither on interruptions nor on images that
cannot be decoded.
"""

import asyncio
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sopdeploy.base.environment import usable_cores
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.errors import ConfigError, ImageError, RuntimeUnavailableError
from sopdeploy.images.formats import too_large_error
from sopdeploy_commands.classify.options import ClassifyOptions
from sopdeploy_commands.classify.output import OutputFolder, RowsState
from sopdeploy_commands.classify.sources import ListedImage, read_listed
from sopdeploy_commands.tables import make_schema
from sopdeploy_service.inference.daemon_threads import running_loop
from sopdeploy_service.inference.decoders import Decoders
from sopdeploy_service.inference.loader import largest_batch, load_model
from sopdeploy_service.inference.model_worker import OutputsOrError, check_device, run_bisected
from sopdeploy_service.inference.results import (
    INFERENCE_FAILED,
    OUT_OF_MEMORY,
    HttpError,
    RejectedError,
)
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import DeviceLostError
from sopdeploy_service.settings import Settings

IMAGES_AHEAD = 16  # of each worker
MAX_WORKERS = 16  # unless more are requested
# The columns of a row; docs/batch.md describes them.
COLUMNS = {
    "path": pa.string(),
    "sha256": pa.string(),
    "classes": pa.list_(pa.string()),
    "probabilities": pa.list_(pa.float64()),
    "known": pa.bool_(),
    "score": pa.float64(),
    "warnings": pa.list_(pa.string()),
    "error": pa.string(),
    "error_message": pa.string(),
    "bundle": pa.string(),
}


# The cells of an image, in `COLUMNS` and in columns that were requested; missing ones become null
ImageRow: TypeAlias = dict[str, object]
# A row, and the pixels (H, W, 3): zeros for an image with an error
RowAndPixels: TypeAlias = tuple[ImageRow, NDArray[np.uint8]]
OnImages = Callable[[int], None]  # called with the number of images of each classified batch


class BatchClassifier:
    """Classifies parts in this process, with the bundle in the folder *path*.

    `state` is what the rows depend on, besides the images; a run with another one must not
    continue this run. Raises what `load_model` raises, and `ConfigError` if the bundle does not
    have the requested features.
    """

    def __init__(self, path: Path, settings: Settings, options: ClassifyOptions) -> None:
        loaded = load_model(path, settings)
        self._bundle = loaded.bundle
        self._runtime = loaded.runtime
        self._settings = settings

        manifest = loaded.bundle.manifest
        optional: dict[str, str] = {}
        if options.logits:
            optional["logits"] = manifest.outputs[0].name
        if options.features:
            if EMBEDDING not in {output.name for output in manifest.outputs}:
                raise ConfigError(
                    f"{path} has no features; export it with_features", setting="features"
                )
            optional["features"] = EMBEDDING

        self._optional = optional  # the outputs that become columns, by the name of the column
        self._workers = options.workers or min(usable_cores(), MAX_WORKERS)
        self._batch_size = largest_batch(loaded.runtime, settings)
        self._top_k = settings.classes_per_image(multi_label=manifest.rules.is_multi_label)

        # What the rows depend on: a run with another state cannot continue these files.
        self.state = RowsState(
            bundle=manifest.id,
            runtime=f"{self._runtime.name} on {self._runtime.device}",
            batch=self._batch_size,
            top_k=self._top_k,
            columns=tuple(optional),
            max_body_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
        )

    def close(self) -> None:
        """Close the runtime."""
        self._runtime.close()

    def classify_parts(
        self, folder: OutputFolder, parts: Sequence[int], on_images: OnImages
    ) -> None:
        """Classify the images of *parts* and write their rows.

        Raises `RuntimeUnavailableError` if the device or the decoders fail.
        """
        sizes = folder.sizes()
        schema = make_schema(COLUMNS | dict.fromkeys(self._optional, pa.list_(pa.float32())))
        images = (image for part in parts for image in folder.images(part))

        # `decoded` yields the images of all parts, in order.
        with closing(self._decode_ahead(images)) as decoded:
            for part in parts:
                # The batches of a part in order: predictions depend on nothing but the part.
                rows: list[ImageRow] = []
                for start in range(0, sizes[part], self._batch_size):
                    batch = list(
                        itertools.islice(decoded, min(self._batch_size, sizes[part] - start))
                    )
                    outputs = self._run_batch([pixels for _, pixels in batch])
                    for (row, _), output in zip(batch, outputs, strict=True):
                        self._add_prediction(row, output)
                        rows.append(row)
                    on_images(len(batch))

                folder.write(part, rows, schema)

    def _decode_ahead(
        self, images: Iterable[ListedImage]
    ) -> Generator[RowAndPixels, None, None]:
        """Decode *images* in child processes, some in advance; yield them in order."""
        decoders = Decoders(self._workers, self._settings, Metrics())
        threads = ThreadPoolExecutor(self._workers)  # each waits for one child
        waiting: deque[Future[RowAndPixels]] = deque()

        with running_loop() as loop:
            asyncio.run_coroutine_threadsafe(decoders.start(), loop).result()
            try:
                for image in images:
                    waiting.append(threads.submit(self._decode, image, decoders))
                    if len(waiting) > self._batch_size + IMAGES_AHEAD * self._workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                threads.shutdown(cancel_futures=True)
                asyncio.run_coroutine_threadsafe(decoders.stop(), loop).result()

    def _decode(self, image: ListedImage, decoders: Decoders) -> RowAndPixels:
        """Read, hash and decode *image* as a server does; one with an error becomes black."""
        rules = self._bundle.manifest.preprocess
        max_bytes = self._settings.max_body_bytes
        row: ImageRow = {"path": image.path, "warnings": ()}

        try:
            body = read_listed(image, max_bytes + 1)  # enough to reject a larger one
            if len(body) > max_bytes:
                raise too_large_error(max_bytes)
            row["sha256"] = hashlib.sha256(body).hexdigest()
            pixels, row["warnings"], _ = decoders.wait_for(decoders.decode(body, rules))
        except (ImageError, RejectedError) as error:
            code = error.code if isinstance(error, ImageError) else error.reason.code
            row["error"] = code
            row["error_message"] = str(error)
            pixels = np.zeros((rules.crop, rules.crop, 3), np.uint8)
        return row, pixels

    def _run_batch(self, pixels: list[NDArray[np.uint8]]) -> list[OutputsOrError]:
        """Return the outputs of a batch, which is halved if it fails; raises `RuntimeUnavailableError`."""
        # The outputs that the rows need, each once
        names = list({self._bundle.manifest.outputs[0].name, *self._optional.values()})

        try:
            outputs = run_bisected(
                lambda images: self._runtime.run(np.stack(images)), pixels, names
            )
            if all(output is INFERENCE_FAILED for output in outputs):
                # Raises `DeviceLostError` if a blank image fails, too
                check_device(self._runtime, pixels[0].shape)
        except DeviceLostError as error:
            raise RuntimeUnavailableError(
                f"the device is lost ({error}); run again to continue"
            ) from error

        # A row may record that inference fails on its image, but not a lack of memory, which may
        # be over in the next run. Smaller batches need another folder, because the last bits of
        # results depend on their size.
        if any(output is OUT_OF_MEMORY for output in outputs):
            raise RuntimeUnavailableError(
                f"{self._runtime.name} failed on a batch of {len(pixels)}; run again to continue, or choose "
                "a smaller max_batch and another folder"
            )

        return outputs

    def _add_prediction(self, row: ImageRow, output: OutputsOrError) -> None:
        """Add the prediction or the error of *output* to the *row* of an image.

        If the row has an error already, *output* is that of zeros, and is ignored.
        """
        manifest = self._bundle.manifest
        labels = self._bundle.labels
        row["bundle"] = manifest.id
        if "error" in row:
            return
        if isinstance(output, HttpError):
            row["error"] = output.code
            row["error_message"] = output.message
            return

        answer = manifest.rules.answer(output[manifest.outputs[0].name], self._top_k)
        row["known"] = answer.known
        row["score"] = answer.score
        row["classes"] = [labels[index] for index, _ in answer.ranked]
        row["probabilities"] = [probability for _, probability in answer.ranked]
        for column, name in self._optional.items():
            row[column] = output[name]
