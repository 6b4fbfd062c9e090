"""The output of a part as an Arrow table, one row per image."""

from collections.abc import Iterator, Sequence
from typing import Any

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import FEATURES
from sopdeploy_service.commands.batch.decoders import Read
from sopdeploy_service.commands.batch.listing import printable
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.reader import Entry, import_pyarrow
from sopdeploy_service.inference.model_worker import Row
from sopdeploy_service.inference.results import Rejection, rank_classes


class RowFormat:
    """Converts outputs of *bundle* to tables with the columns of *options*, documented in docs/batch.md.

    *top_k* limits the classes of an image; without it, a multi-label network gives all of its classes above
    their thresholds.
    """

    def __init__(self, bundle: Bundle, top_k: int | None, options: ClassifyOptions) -> None:
        self._bundle, self._top_k, self._options = bundle, top_k, options
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
        self._schema = arrow.schema(list(columns.items()))

    def table(self, entries: Sequence[Entry], reads: Sequence[Read], outputs: Sequence[Row]) -> Any:
        """Build the table of a part; its metadata `errors` is the number of images with an error.

        The output of an image that was not decoded is ignored.
        """
        errors: list[tuple[str, str] | None] = [
            (read.error, read.message)
            if read.error
            else ((output.code, output.message) if isinstance(output, Rejection) else None)
            for read, output in zip(reads, outputs, strict=True)
        ]
        good = [output for output, error in zip(outputs, errors, strict=True) if error is None]
        predictions, rows = self._predictions(good), []
        for entry, read, error in zip(entries, reads, errors, strict=True):
            code, message = error or (None, None)
            rows.append(
                {
                    "path": printable(entry.path),
                    "sha256": read.sha256 or None,
                    "warnings": read.warnings,
                    "error": code,
                    "error_message": message,
                    "bundle": self._bundle.manifest.id,
                    **(next(predictions) if error is None else {}),
                }
            )
        schema = self._schema.with_metadata({"errors": str(len(rows) - len(good))})
        return self._arrow.Table.from_pylist(rows, schema=schema)

    def _predictions(self, outputs: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Yield the columns of each image with an output."""
        manifest, labels = self._bundle.manifest, self._bundle.labels
        thresholds = None if manifest.decision is None else manifest.decision.thresholds
        for output in outputs:
            values = output[manifest.outputs[0].name]
            ranking = rank_classes(values, self._top_k, thresholds)
            known, score = manifest.rejection.recognize(values) if manifest.rejection else (None, None)
            yield {
                "classes": [labels[index] for index, _ in ranking],
                "probabilities": [probability for _, probability in ranking],
                "known": known,
                "score": score,
                "logits": values,
                "features": output.get(FEATURES),
            }
