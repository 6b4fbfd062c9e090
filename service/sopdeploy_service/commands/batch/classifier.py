"""Classify parts of a list: decoder processes, full batches, one row per image.

The last bits of a runtime's results may depend on the size of the batch and on the position in the batch.
Therefore batches are fixed ranges of a part, and zeros replace an image that cannot be decoded. The outputs
of an image then depend neither on interruptions nor on errors of other images.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.environment import usable_cores
from sopdeploy.errors import ConfigError, RuntimeUnavailableError
from sopdeploy_service.commands.batch.decoders import Row, decode_blocks
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.output import OutputFolder
from sopdeploy_service.inference.loader import largest_batch, load_model
from sopdeploy_service.inference.model_worker import ImageOutputs, run_bisected
from sopdeploy_service.inference.results import INFERENCE_FAILED, OUT_OF_MEMORY, HttpError
from sopdeploy_service.runtime.base import DeviceLostError
from sopdeploy_service.settings import Settings

BLOCK_IMAGES = 32  # at least, of a message to a decoder process
MAX_WORKERS = 16  # unless more are requested: their blocks need memory
DECODER_SETTINGS = {"decode", "max_body_bytes", "max_pixels"}
COLUMNS = {  # of a row; docs/batch.md
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
OnImages = Callable[[int], None]  # is called with a number of images when they are classified


class BatchClassifier:
    """Classifies parts in this process, with the bundle in the folder *path*.

    `state` is what the rows depend on, besides the images. Raises what `load_model` raises, and `ConfigError`
    if the bundle does not have the requested features.
    """

    def __init__(self, path: Path, settings: Settings, options: ClassifyOptions) -> None:
        loaded = load_model(path, settings)
        self._bundle, self._runtime, self._settings = loaded.bundle, loaded.runtime, settings
        manifest = loaded.bundle.manifest
        optional = {"logits": manifest.outputs[0].name} if options.logits else {}
        if options.features:
            if EMBEDDING not in {output.name for output in manifest.outputs}:
                raise ConfigError(f"{path} has no features; export it with_features", setting="features")
            optional["features"] = EMBEDDING
        self._optional = optional  # column: output
        self._workers = options.workers or min(usable_cores(), MAX_WORKERS)
        self._batch = largest_batch(loaded.runtime, settings)
        self._top_k = settings.classes_per_image(multi_label=manifest.thresholds is not None)
        self.state: dict[str, Any] = {
            "bundle": manifest.id,
            "runtime": f"{self._runtime.name} on {self._runtime.device}",
            "batch": self._batch,
            "top_k": self._top_k,
            "columns": list(optional),
            **settings.model_dump(mode="json", include=DECODER_SETTINGS),
        }

    def close(self) -> None:
        """Close the runtime."""
        self._runtime.close()

    def write_parts(self, folder: OutputFolder, parts: Sequence[int], on_images: OnImages) -> None:
        """Classify *parts* of the list in *folder* and write their rows.

        Raises `RuntimeUnavailableError` if the device fails.
        """
        sizes, rules = folder.sizes(), self._bundle.manifest.preprocess
        schema = pa.schema(COLUMNS | dict.fromkeys(self._optional, pa.list_(pa.float32())))
        in_block = self._batch * math.ceil(BLOCK_IMAGES / self._batch)
        blocks = (
            images[first : first + in_block]
            for images in map(folder.images, parts)
            for first in range(0, len(images), in_block)
        )
        with closing(decode_blocks(blocks, rules, self._settings, self._workers)) as decoded_blocks:
            for part in parts:
                rows: list[Row] = []
                for decoded, pixels in itertools.islice(decoded_blocks, math.ceil(sizes[part] / in_block)):
                    outputs: list[ImageOutputs] = []
                    for first in range(0, len(pixels), self._batch):
                        outputs += self._run(pixels[first : first + self._batch])
                    rows += map(self._complete, decoded, outputs)
                    on_images(len(decoded))
                folder.write(part, rows, schema)

    def _run(self, pixels: NDArray[np.uint8]) -> list[ImageOutputs]:
        """Return the outputs of a batch; if it fails, halve it until the image that fails is alone."""
        names = list({self._bundle.manifest.outputs[0].name, *self._optional.values()})
        try:
            rows = run_bisected(lambda images: self._runtime.run(np.stack(images)), list(pixels), names)
        except DeviceLostError as error:
            raise RuntimeUnavailableError(f"the device is lost ({error}); run again to continue") from error
        all_failed = len(rows) > 1 and all(row is INFERENCE_FAILED for row in rows)
        if all_failed or any(row is OUT_OF_MEMORY for row in rows):
            raise RuntimeUnavailableError(
                f"{self._runtime.name} failed on a batch of {len(rows)}; run again to continue, or choose "
                "a smaller max_batch and another folder"
            )
        return rows

    def _complete(self, row: Row, output: ImageOutputs) -> Row:
        """Add the prediction to the *row* of an image; the *output* of one with an error is ignored."""
        manifest, labels = self._bundle.manifest, self._bundle.labels
        row = {**row, "bundle": manifest.id}
        if row["error"] is not None:
            return row
        if isinstance(output, HttpError):
            return {**row, "error": output.code, "error_message": output.message}
        answer = manifest.answer(output[manifest.outputs[0].name], self._top_k)
        return {
            **row,
            **answer.fields(labels),
            "classes": [labels[index] for index, _ in answer.ranked],
            "probabilities": [probability for _, probability in answer.ranked],
            **{column: output[name] for column, name in self._optional.items()},
        }
