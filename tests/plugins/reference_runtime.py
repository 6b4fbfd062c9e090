"""A runtime of a plug-in: ONNX's reference implementation."""

import os

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.settings import Settings


class ReferenceRuntime:
    """Runs a bundle with ONNX's reference implementation."""

    name = f"onnx-reference {onnx.__version__}"
    device = "cpu"
    needs_gpu = False

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.largest_batch = bundle.manifest.batch.maximum
        self._graph = ReferenceEvaluator(onnx.load(os.fspath(bundle.onnx)))

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name."""
        outputs = self._graph.run(
            None, dict(zip(self._graph.input_names, [images], strict=True))
        )
        return dict(zip(self._graph.output_names, outputs, strict=True))

    def close(self) -> None:
        """Do nothing; the memory is released with the object."""
