"""Measure the accuracy that a lower precision costs, and reject large losses."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.errors import ConfigError, ParityError
from sopdeploy.evaluation.statistics import wilson
from sopdeploy.files import expand_user
from sopdeploy_export.parity.onnx_file import open_session
from sopdeploy_export.precision.convert import (
    Accuracy,
    ConvertedGraph,
    PrecisionOptions,
    PrecisionReport,
)
from sopdeploy_export.precision.int8 import METHODS
from sopdeploy_export.proof.networks import ExportSubject

BATCH = 8
Batch = tuple[NDArray[np.uint8], list[int]]  # images (B, H, W, 3), and labels if they are known


def check_accuracy(
    converted: ConvertedGraph,
    path: Path,
    subject: ExportSubject,
    batch: BatchRange,
    options: PrecisionOptions,
    *,
    allow_drift: bool,
) -> PrecisionReport:
    """Add the accuracy of the file at *path* to the precision report.

    It is measured on the labeled images of `evaluate`, or else on the images of `calibrate`. Raises
    `ParityError` if more than `max_drop` points are lost and *allow_drift* is off, and `ConfigError` for
    `evaluate` with a network that predicts several classes per image.
    """
    several = subject.decision is not None and subject.decision.activation == "sigmoid"
    if options.evaluate is not None and several:
        raise ConfigError(
            "--evaluate: measures top-1, but this network predicts several classes per image; omit it and "
            "compare `sopdeploy eval` of the checkpoint and the bundle"
        )
    if options.evaluate is not None:
        folder = open_classes(expand_user(options.evaluate), subject.labels)
        dataset = PreprocessedDataset(folder, subject.preprocess)
        batches = _labeled_batches(dataset, min(BATCH, batch.maximum))
    else:
        images = converted.calibration
        batches = iter([]) if images is None else ((image[None], []) for image in images)
    found = compare_predictions(converted.float32_model, path, batches)
    if found.drop > options.max_drop and not allow_drift:
        metric = "agreement with float32" if found.before is None else "top-1"
        raise ParityError(
            f"{options.precision} loses {found.drop:.2f} points of {metric} on {found.images} images, "
            f"but only {options.max_drop:g} are allowed (--max-drop){_int8_advice(converted.precision)}"
        )
    return converted.precision.model_copy(update={"accuracy": found})


def compare_predictions(before: onnx.ModelProto, after: Path, batches: Iterable[Batch]) -> Accuracy:
    """Run the graph *before* and the file *after* on *batches* and compare their top classes."""
    sessions = open_session(before), open_session(after)
    predictions: list[list[NDArray[np.int64]]] = [[], []]
    truth: list[int] = []
    for images, labels in batches:
        truth += labels
        for session, found in zip(sessions, predictions, strict=True):
            logits = session.run(None, {session.get_inputs()[0].name: images})[0]
            found.append(logits.argmax(axis=1))
    first, second = (np.concatenate(found) for found in predictions)
    return accuracy(first, second, np.asarray(truth) if truth else None)


def accuracy(
    first: NDArray[np.int64], second: NDArray[np.int64], truth: NDArray[np.int64] | None = None
) -> Accuracy:
    """Compare classes predicted by the float32 graph (*first*) and the exported one."""
    agree = int((first == second).sum())
    low, high = wilson(agree, len(first))
    before = None if truth is None else float((first == truth).mean())
    after = None if truth is None else float((second == truth).mean())
    lost = 1 - agree / len(first) if before is None or after is None else before - after
    return Accuracy(
        images=len(first),
        before=before,
        after=after,
        agree=agree,
        low=low,
        high=high,
        drop=round(100 * lost, 6),
    )


def _labeled_batches(dataset: PreprocessedDataset, size: int) -> Iterator[Batch]:
    for start in range(0, len(dataset), size):
        pairs = [dataset[index] for index in range(start, min(start + size, len(dataset)))]
        yield np.stack([image for image, _ in pairs]), [int(label) for _, label in pairs]


def _int8_advice(report: PrecisionReport) -> str:
    """Name the parts and layers that change the logits most in int8, and the options to try."""
    quantization = report.quantisation
    if quantization is None:
        return ""
    others = " or ".join(method for method in METHODS if method != quantization.calibration)
    costs = quantization.costs[:3]
    if not costs:
        return f"; try --calibration {others}"

    parts, layers = (
        ", ".join(f"{cost.part} {cost.share:.1%}" for cost in found)
        for found in (quantization.parts[:1], costs)
    )
    return (
        f"; the part that costs most: {parts} of the spread of the logits; "
        f"the layers that cost most: {layers}; "
        f"keep them in float32 with --keep-float {costs[0].part}, or try --calibration {others}"
    )
