"""The rows of the images, and the Arrow table of a part."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import EMBEDDING, FEATURES
from sopdeploy_service.commands.batch.decoders import DecodedImage
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.parquet import import_pyarrow
from sopdeploy_service.inference.model_worker import ImageOutputs
from sopdeploy_service.inference.results import HttpError, rank_classes


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
            "stable": arrow.bool_(),
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
        logits, features = output[manifest.outputs[0].name], output.get(EMBEDDING)
        if FEATURES in output:
            features = output[FEATURES].mean(axis=(1, 2), dtype=np.float32)  # maps would fill the memory
        (ranking,) = rank_classes(logits[None], self._top_k, manifest.thresholds)
        known, score = manifest.rejection.recognize(logits) if manifest.rejection else (None, None)
        return {
            **row,
            "classes": [labels[index] for index, _ in ranking],
            "probabilities": [probability for _, probability in ranking],
            "known": known,
            "score": score,
            "stable": None if manifest.stability is None else manifest.stability.is_stable(logits),
            "logits": logits,
            "features": features,
        }

    def table(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Build the table of a part; its metadata `errors` is the number of images with an error."""
        errors = sum(row["error"] is not None for row in rows)
        schema = self._schema.with_metadata({"num_errors": str(errors)})
        return self._arrow.Table.from_pylist(rows, schema=schema)
