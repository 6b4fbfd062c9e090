"""The range of every value that int8 rounds, read off pictures.

All of what was seen (`minmax`), the cut that loses least information (`entropy`), or all but the outermost
(`percentile`).
"""

import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator

from sopdeploy_export.precision import Calibration

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PERCENTILE = 99.999
QUANTISED = ("Conv",)


class OneByOne(CalibrationDataReader):  # type: ignore[misc]
    """The pictures as the graph takes them, one each; ONNX Runtime keeps what it computes on all it gets."""

    def __init__(self, source: str, images: NDArray[np.uint8]) -> None:
        self.feeds: Iterator[dict[str, NDArray[np.uint8]]] = (
            {source: images[i : i + 1]} for i in range(len(images))
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Return the next picture, `None` after the last."""
        return next(self.feeds, None)


def ranges(model: onnx.ModelProto, images: NDArray[np.uint8], method: Calibration) -> TensorsData:
    """Return the range of every input and output of a convolution of *model*, seen on *images* (P, H, W, 3).

    ONNX Runtime tells its progress on the standard output, which is the caller's: it is not shown.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        path = Path(folder) / "float.onnx"
        onnx.save(model, path)
        options = {"percentile": PERCENTILE} if method == "percentile" else {}
        calibrator = create_calibrator(
            path,
            list(QUANTISED),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=METHODS[method],
            extra_options=options,
        )
        source = model.graph.input[0].name
        for start in range(len(images)):
            calibrator.collect_data(OneByOne(source, images[start : start + 1]))
        return calibrator.compute_data()
