"""What a smaller precision costs in answers, and when that is too much."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.data.base import Dataset, PreprocessedDataset
from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.errors import ParityError
from sopdeploy.evaluation.statistics import wilson
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.parity.session import open_session
from sopdeploy_export.precision.convert import ConvertedGraph, PrecisionOptions
from sopdeploy_export.precision.int8 import METHODS
from sopdeploy_export.precision.report import Accuracy, Cost, PrecisionReport

BATCH = 8


def labelled(folder: Path, labels: tuple[str, ...], preprocess: Preprocess) -> Dataset:
    """Return the pictures below *folder*, one subfolder per class; raises `DataError`."""
    return PreprocessedDataset(open_classes(folder.expanduser(), labels), preprocess)


def with_labels(before: onnx.ModelProto, after: Path, dataset: Dataset, largest_batch: int) -> Accuracy:
    """Return the accuracy of both graphs on *dataset*."""
    sessions = open_session(before), open_session(after)
    size = min(BATCH, largest_batch)
    first, second, truth = [], [], []
    for start in range(0, len(dataset), size):
        pairs = [dataset[index] for index in range(start, min(start + size, len(dataset)))]
        images = np.stack([image for image, _ in pairs])
        truth += [label for _, label in pairs]
        first.append(top(sessions[0], images))
        second.append(top(sessions[1], images))
    answers = np.concatenate(first), np.concatenate(second)
    right = [float((answer == np.asarray(truth)).mean()) for answer in answers]
    return accuracy(*answers, before=right[0], after=right[1])


def without_labels(before: onnx.ModelProto, after: Path, images: NDArray[np.uint8]) -> Accuracy:
    """Return how often both graphs agree on *images*."""
    sessions = open_session(before), open_session(after)
    first, second = (
        np.concatenate([top(session, images[i : i + 1]) for i in range(len(images))]) for session in sessions
    )
    return accuracy(first, second)


def top(session: ort.InferenceSession, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the top class of each image."""
    logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    answers: NDArray[np.int64] = logits.argmax(axis=1)
    return answers


def accuracy(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    before: float | None = None,
    after: float | None = None,
) -> Accuracy:
    """Return the report on two graphs' answers."""
    agree = int((first == second).sum())
    low, high = wilson(agree, len(first))
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


def measured(
    shipping: ConvertedGraph,
    path: Path,
    labels: tuple[str, ...],
    preprocess: Preprocess,
    batch: BatchRange,
    options: PrecisionOptions,
    *,
    allow_drift: bool,
) -> PrecisionReport:
    """Return the report with what the precision costs in answers; raises `ParityError` over `max_drop`."""
    found: Accuracy
    if options.evaluate is not None:
        dataset = labelled(options.evaluate, labels, preprocess)
        found = with_labels(shipping.certified, path, dataset, batch.maximum)
    elif shipping.calibration is not None:
        found = without_labels(shipping.certified, path, shipping.calibration)
    else:
        return shipping.report
    if found.drop > options.max_drop and not allow_drift:
        what = "agreement with float32" if found.before is None else "top-1"
        raise ParityError(
            f"{options.precision} loses {found.drop:.2f} points of {what} on {found.images} pictures, "
            f"{options.max_drop:g} are allowed (--max-drop){int8_advice(shipping.report)}"
        )
    return shipping.report.model_copy(update={"accuracy": found})


def int8_advice(report: PrecisionReport) -> str:
    """Return which part and which layers cost most in int8 and what to try; empty for another precision."""
    quantisation = report.quantisation
    if quantisation is None:
        return ""
    others = " or ".join(method for method in METHODS if method != quantisation.calibration)
    costs = quantisation.costs[:3]
    if not costs:
        return f"; try --calibration {others}"
    return (
        f"; the part that costs most: {told(quantisation.parts[:1])} of the spread of the logits; "
        f"the layers that cost most: {told(costs)}; "
        f"leave them in float32 with --keep-float {costs[0].part}, or try --calibration {others}"
    )


def told(costs: Sequence[Cost]) -> str:
    """Return *costs* in words."""
    return ", ".join(f"{cost.part} {cost.share:.1%}" for cost in costs)
