"""Measure what a lower precision costs in accuracy and changes in logits, and reject large losses.

A network with one frequent class keeps its classes although its logits are far off, so the
logits are compared, too: the root mean square of their differences, in standard deviations of
the float32 logits.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from PIL import Image

from sopdeploy.base.project import AS_IT_IS, Origin
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.logit_ranges import LogitRanges
from sopdeploy.bundle.manifest import LOGITS
from sopdeploy.bundle.onnx_root import NO_WEIGHTS
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.photos.any_images import open_any_images
from sopdeploy.data.photos.copies import connect
from sopdeploy.data.photos.photo import ImageFiles
from sopdeploy.errors import ConfigError, DataError, ParityError
from sopdeploy.evaluation.exchanged import describe_exchanged
from sopdeploy.evaluation.metrics import count_confusion
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.deployed import INPUT, evenly_spread
from sopdeploy_export.lower.precision import Accuracy, PrecisionReport, UserImages
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.runs import open_session

_BATCH = 8
MAX_CALIBRATION_IMAGES = 340  # of `calibrate`
PHOTOGRAPHS = 16  # of `evaluate`, whose values must fit float16
MIN_DISTINCT = 32
# Standard deviations: a quarter of the logits' variance. Trained networks measure 0.03 to 0.07
# in int8 (docs/gpu.md), a file that returns the mean logits of all images 1.
MAX_DEVIATION = 0.5
# Without `evaluate`, every fourth of the distinct images of `calibrate` is held out to measure
HELD_OUT_EVERY = 4
# Root mean square difference, of 255, of the red, green and blue of thumbnails of 8 x 8 pixels
ALIKE = 5.0
THUMBNAIL_SIDE = 8


class AccuracyCheck:
    """Compares the top classes and the logits of graphs with those of the float32 graph.

    The images that measure are the labeled ones of `evaluate`; without that folder, every fourth
    distinct image of `calibrate`. `calibration` holds the other images of `calibrate`, uint8
    (P, H, W, 3); it is empty without `calibrate`.
    """

    def __init__(
        self,
        options: ExportOptions,
        preprocess: Preprocess,
        labels: tuple[str, ...],
        decision: Decision | None = None,
        origin: Origin | None = None,
    ) -> None:
        """Open the folders of *options* for a network; its `ExportSubject` has the other arguments.

        Raises `DataError` if a folder has too few images or other classes than *labels*. Raises
        `ConfigError` if one folder is given twice, and for `evaluate` with a network that predicts
        several classes per image.
        """
        self.options = options
        self.warnings: tuple[str, ...] = ()  # of `measure`
        self._preprocess = preprocess
        self._labels = labels
        self._float32_logits: NDArray[np.float32] | None = None

        # The images of `calibrate`: all calibrate if `evaluate` measures, else three quarters.
        self.calibration = np.empty((0, 0, 0, 3), np.uint8)
        self._held_out: NDArray[np.uint8] | None = None
        if options.calibrate is not None:
            self.calibration = calibration_images(options.calibrate, preprocess)
            # Alike images share a number; too few numbers are an error, also with `evaluate`.
            distinct_P = number_distinct(self.calibration)
            if options.evaluate is None:
                # All images with the numbers 3, 7, 11 and so on: none of them is like one that
                # calibrates.
                is_held_out_P = distinct_P % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                self._held_out = self.calibration[is_held_out_P]
                self.calibration = self.calibration[~is_held_out_P]

        # The images of `evaluate`, which measure if the folder is given.
        self._labeled: ImageFiles | None = None
        if options.evaluate is not None:
            if decision is not None and decision.activation == "sigmoid":
                raise ConfigError(
                    "measures top-1, but this network predicts several classes per image; omit it and "
                    "evaluate the checkpoint and the bundle",
                    setting="evaluate",
                )
            folder = None if options.calibrate is None else options.calibrate.resolve()
            if folder == options.evaluate.resolve():
                raise ConfigError(
                    "is also the folder of the calibration images; give other images",
                    setting="evaluate",
                )
            self._labeled = open_evaluation_images(
                options.evaluate,
                labels,
                reading=AS_IT_IS if origin is None else origin.reading,
            )

    def photos(self, most: int) -> Iterator[bytes]:
        """Yield at most *most* image files of `evaluate`, evenly spread; none without that folder."""
        images = self._labeled
        if images is not None:
            for position in evenly_spread(len(images), most).tolist():
                yield images.read(position)

    def measure(
        self,
        float32: onnx.ModelProto,
        exported: InferenceSession,
        weights: memoryview = NO_WEIGHTS,
    ) -> Accuracy:
        """Compare the file that *exported* has loaded with the graph *float32*, on the images that measure.

        The logits of *float32* are computed in the first call and kept for later ones. *weights* are those
        of *float32*, if they are in a file of their own.
        """
        if self._float32_logits is None:
            self._float32_logits = self._logits(open_session(float32, weights))
        before = self._float32_logits
        after = self._logits(exported)

        truth = None if self._labeled is None else np.asarray(self._labeled.targets, np.int64)
        if truth is not None:
            self.warnings = describe_exchanged(
                self._labels, count_confusion(truth, before.argmax(axis=1), len(self._labels))
            )
        compared = compare_top_classes(before.argmax(axis=1), after.argmax(axis=1), truth)
        return compared.model_copy(update={"deviation": logit_deviation(before, after)})

    def images_to_convert(self) -> UserImages:
        """Return what `convert_precision` needs: all images that calibrate, for fp16 some of `evaluate`.

        These are at most `PHOTOGRAPHS`, evenly spread.
        """
        photographs: list[NDArray[np.uint8]] = []
        if self._labeled is not None and self.options.precision == "fp16":
            positions = evenly_spread(len(self._labeled), PHOTOGRAPHS).tolist()
            photographs = [
                self._labeled.preprocess(position, self._preprocess) for position in positions
            ]
        return UserImages(self.calibration, photographs)

    def check_drop(self, report: PrecisionReport) -> None:
        """Raise `ParityError` if a loss in *report* exceeds its limit, even with `allow_numerical_error`.

        The limits are `max_drop` for top-1, or for agreement without labels, and `MAX_DEVIATION` for
        the change of the logits.
        """
        measured = report.accuracy
        limit = self.options.max_drop
        if measured is None:
            return
        advice = ""
        if report.quantisation is not None:
            advice = "; calibrate with images like your production images"

        if not measured.deviation <= MAX_DEVIATION:  # larger, or NaN
            raise ParityError(
                f"{report.precision} changes the logits by {measured.deviation:.2f} "
                f"standard deviations on {measured.num_images} images, more than "
                f"{MAX_DEVIATION:g}{advice or '; choose fp32'}"
            )
        if measured.drop <= limit:
            return

        # Without labels, top-1 is not known, so the loss is one of agreement.
        metric = "agreement with float32" if measured.before is None else "top-1"
        raise ParityError(
            f"{report.precision} loses {measured.drop:.2f} points of {metric} on {measured.num_images} "
            f"images, more than {limit:g}{advice}",
            setting="max_drop",
        )

    def _logits(self, session: InferenceSession) -> NDArray[np.float32]:
        """Run all images that measure in *session*; return the logits (P, C)."""
        return np.concatenate(
            [session.run([LOGITS], {INPUT: images})[0] for images in self._batches()]
        )

    def _batches(self) -> Iterator[NDArray[np.uint8]]:
        """Yield batches (B, H, W, 3) of the images that measure; those of `calibrate` are batches of one."""
        if self._labeled is not None:
            count = len(self._labeled)
            size = min(_BATCH, self.options.batch.maximum)
            for start in range(0, count, size):
                images = [
                    self._labeled.preprocess(position, self._preprocess)
                    for position in range(start, min(start + size, count))
                ]
                yield np.stack(images)
        elif self._held_out is not None:
            for image in self._held_out:
                yield image[None]


def logit_deviation(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Compute the root mean square of *after* - *before*, logits (P, C), in standard deviations of *before*.

    The standard deviation is that of the logits of a class over the images, as a root mean square
    over the classes. Classes that a large number masks do not count.
    """
    is_ordinary_C = LogitRanges.of(before).is_ordinary
    before, after = before[:, is_ordinary_C], after[:, is_ordinary_C]
    spread = float(np.sqrt(np.square(before - before.mean(axis=0), dtype=np.float64).mean()))
    error = float(np.sqrt(np.square(after - before, dtype=np.float64).mean()))
    return error / max(spread, float(np.finfo(np.float32).tiny))  # not 0, for equal logits


def compare_top_classes(
    float32: NDArray[np.int64],
    exported: NDArray[np.int64],
    truth: NDArray[np.int64] | None,
) -> Accuracy:
    """Compare the classes that the *float32* graph and the *exported* graph predict.

    All are class numbers (P,). The drop is the loss of top-1 in percentage points. Without the
    labels *truth*, it is the percentage of images whose class differs, which is an upper bound of
    this loss.
    """
    count = len(float32)
    num_agreeing = int((float32 == exported).sum())

    before: float | None = None
    after: float | None = None
    if truth is None:
        drop = 1 - num_agreeing / count
    else:
        before = float((float32 == truth).mean())
        after = float((exported == truth).mean())
        drop = before - after

    return Accuracy(
        num_images=count,
        before=before,
        after=after,
        num_agreeing=num_agreeing,
        drop=round(100 * drop, 6),
    )


def calibration_images(folder: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Load at most 340 images of *folder* as uint8 (P, crop, crop, 3), spread evenly over the sorted paths.

    If each class has a folder, the images thus come from all large classes. Raises `DataError` if
    *folder* does not exist, holds no image or holds one that cannot be read.
    """
    try:
        images = open_any_images(folder)
    except DataError as error:
        raise DataError(str(error), setting="calibrate") from error
    positions = evenly_spread(len(images), MAX_CALIBRATION_IMAGES)
    return np.stack(
        [images.preprocess(position, preprocess) for position in positions.tolist()]
    )


def number_distinct(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Group alike *images*, uint8 (P, H, W, 3); return the number of the group of each (P,).

    Numbers begin at 0. A group counts as one distinct image; its thumbnails are connected by
    pairs that differ by at most `ALIKE`. Raises `DataError` for fewer groups than
    `MIN_DISTINCT`.
    """
    # Distances (P, P) of thumbnails with D numbers.
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    thumbnails = [Image.fromarray(image).resize(size, Image.Resampling.BOX) for image in images]
    pixels_PD = np.stack([np.asarray(image, np.float32).reshape(-1) for image in thumbnails])
    distances_PP = np.stack(
        [np.sqrt(np.square(pixels_PD - pixels_D).mean(axis=1)) for pixels_D in pixels_PD]
    )

    pairs = np.argwhere(distances_PP <= ALIKE).T
    distinct_P = connect(len(images), pairs)
    count = int(distinct_P.max()) + 1
    if count < MIN_DISTINCT:
        raise DataError(
            f"only {count} distinct images, because images that are alike count once; give at least {MIN_DISTINCT}",
            setting="calibrate",
        )
    return distinct_P
