"""What a precision costs in answers: two graphs on the same pictures, with labels or without."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.data.base import Dataset, Prepared
from sopdeploy.data.folder import open_classes
from sopdeploy.preprocess import Preprocess
from sopdeploy.statistics import wilson
from sopdeploy_export.parity.session import open_session
from sopdeploy_export.precision_report import Accuracy

BATCH = 8


def labelled(folder: Path, labels: tuple[str, ...], preprocess: Preprocess) -> Dataset:
    """Return the pictures below *folder*, one subfolder per class; raises `DataError`."""
    return Prepared(open_classes(folder.expanduser(), labels), preprocess)


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
