"""Measure the accuracy that a lower precision costs, and reject large losses."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.errors import ConfigError, ParityError
from sopdeploy.evaluation.statistics import wilson
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph import CALIBRATE, list_images, load_images
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.parity.onnx_file import open_session
from sopdeploy_export.precision.report import Accuracy, PrecisionReport
from sopdeploy_export.subject import ExportSubject

BATCH = 8
Batch = tuple[NDArray[np.uint8], list[int]]  # images (B, H, W, 3), and labels if they are known


def open_folders(subject: ExportSubject, options: ExportOptions) -> PreprocessedDataset | None:
    """Open the images of `evaluate` with the classes of *subject* in output order; None if there are none.

    Raises `DataError` if they have other classes or if `calibrate` has no images, and `ConfigError` for
    `evaluate` with a network that predicts several classes per image.
    """
    if options.calibrate is not None:
        list_images(options.calibrate, CALIBRATE)
    if options.evaluate is None:
        return None
    if subject.decision is not None and subject.decision.activation == "sigmoid":
        raise ConfigError(
            "measures top-1, but this network predicts several classes per image; omit it and evaluate the "
            "checkpoint and the bundle",
            setting="evaluate",
        )
    return PreprocessedDataset(open_evaluation_images(options.evaluate, subject.labels), subject.preprocess)


class AccuracyCheck:
    """Compares the top classes of graphs with those of the float32 graph.

    The images are the labeled ones of `evaluate`, or else those of `calibrate`, which `calibration` holds as
    uint8 (P, H, W, 3); it is None without `calibrate`.
    """

    def __init__(
        self,
        options: ExportOptions,
        preprocess: Preprocess,
        batch: BatchRange,
        labeled: PreprocessedDataset | None = None,
    ) -> None:
        self.options, self._labeled, self._size = options, labeled, min(BATCH, batch.maximum)
        self.calibration = None
        if options.calibrate is not None:
            self.calibration = load_images(options.calibrate, preprocess, CALIBRATE)
        self._before: NDArray[np.int64] | None = None

    def measure(self, float32: onnx.ModelProto, exported: Path | onnx.ModelProto) -> Accuracy:
        """Run both graphs on the images; the classes of *float32* are computed once and kept."""
        sessions = [open_session(exported)]
        if self._before is None:
            sessions.insert(0, open_session(float32))
        predictions: list[list[NDArray[np.int64]]] = [[] for _ in sessions]
        truth: list[int] = []
        for images, labels in self._batches():
            truth += labels
            for session, found in zip(sessions, predictions, strict=True):
                logits = session.run(None, {session.get_inputs()[0].name: images})[0]
                found.append(logits.argmax(axis=1))
        classes = [np.concatenate(found) for found in predictions]
        if self._before is None:
            self._before = classes[0]
        return accuracy(self._before, classes[-1], np.asarray(truth) if truth else None)

    def reject(self, report: PrecisionReport) -> None:
        """Raise `ParityError` if the accuracy in *report* drops by more than `max_drop`."""
        found, limit = report.accuracy, self.options.max_drop
        if found is None or found.drop <= limit:
            return
        metric = "agreement with float32" if found.before is None else "top-1"
        tried = ""
        if report.quantisation is not None:
            attempts = ", ".join(map(str, report.quantisation.tried))
            tried = f"; tried: {attempts}; add images like those of production"
        raise ParityError(
            f"{report.precision} loses {found.drop:.2f} points of {metric} on {found.images} images, "
            f"more than {limit:g}{tried}",
            setting="max_drop",
        )

    def _batches(self) -> Iterator[Batch]:
        if self._labeled is None:
            images = self.calibration
            yield from ((image[None], []) for image in (() if images is None else images))
            return
        for start in range(0, len(self._labeled), self._size):
            end = min(start + self._size, len(self._labeled))
            pairs = [self._labeled[index] for index in range(start, end)]
            yield np.stack([image for image, _ in pairs]), [int(label) for _, label in pairs]


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
