"""The output of a part as an Arrow table, one row per image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.class_maps import FEATURES
from sopdeploy.bundle.folder import Bundle
from sopdeploy.decision import known_score
from sopdeploy_service.commands.batch.classifier import PartOutputs
from sopdeploy_service.commands.batch.listing import printable
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.reader import import_pyarrow
from sopdeploy_service.inference.results import Rejection, rank_images


class RowFormat:
    """Converts outputs of *bundle* to tables with the columns of *options*.

    *top_k* limits the classes of an image; without it, a multi-label network gives all of its classes above
    their thresholds.
    """

    def __init__(self, bundle: Bundle, top_k: int | None, options: ClassifyOptions) -> None:
        self._arrow = import_pyarrow("pyarrow")
        self._bundle, self._top_k, self._options = bundle, top_k, options
        self._logits = bundle.manifest.outputs[0].name

    @property
    def schema(self) -> Any:
        """The columns, documented in docs/batch.md."""
        arrow, text = self._arrow, self._arrow.string()
        fields = {
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
        }
        if self._options.logits:
            fields["logits"] = arrow.list_(arrow.float32())
        if self._options.features:
            fields["features"] = arrow.list_(arrow.float32())
        return arrow.schema(list(fields.items()))

    def table(self, part: PartOutputs) -> Any:
        """Build the table of *part*; its metadata `errors` is the number of images with an error."""
        errors: list[tuple[str, str] | None] = []
        outputs = []
        for read, row in zip(part.reads, part.rows, strict=True):
            if read.error:
                errors.append((read.error, read.message))
            elif isinstance(row, Rejection):
                errors.append((row.code, row.message))
            else:
                errors.append(None)
                outputs.append(row)
        columns: dict[str, Any] = {
            "path": [printable(entry.path) for entry in part.entries],
            "sha256": [read.sha256 or None for read in part.reads],
            "warnings": [read.warnings for read in part.reads],
            "error": [None if error is None else error[0] for error in errors],
            "error_message": [None if error is None else error[1] for error in errors],
            "bundle": [self._bundle.manifest.id] * len(errors),
        }
        good = [error is None for error in errors]
        for name, values in self._predictions(outputs).items():
            remaining = iter(values)
            columns[name] = [next(remaining) if is_good else None for is_good in good]
        schema = self.schema.with_metadata({"errors": str(len(good) - len(outputs))})
        return self._arrow.table(columns, schema=schema)

    def _predictions(self, outputs: Sequence[dict[str, NDArray[np.float32]]]) -> dict[str, Sequence[Any]]:
        """Compute the columns of the images that have *outputs*."""
        logits = [row[self._logits] for row in outputs]
        decision = self._bundle.manifest.decision
        thresholds = None if decision is None else decision.thresholds
        ranked = rank_images(logits, thresholds, self._top_k)
        labels, rule = self._bundle.labels, self._bundle.manifest.rejection
        columns: dict[str, Sequence[Any]] = {
            "classes": [[labels[index] for index, _ in ranking] for ranking in ranked],
            "probabilities": [[probability for _, probability in ranking] for ranking in ranked],
            "known": [None] * len(logits),
            "score": [None] * len(logits),
        }
        if rule is not None and logits:
            scores = known_score(np.stack(logits), rule.score)
            columns["known"] = (scores >= rule.threshold).tolist()
            columns["score"] = scores.tolist()
        if self._options.logits:
            columns["logits"] = logits
        if self._options.features:
            columns["features"] = [row[FEATURES] for row in outputs]
        return columns
