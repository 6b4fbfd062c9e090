"""OpenVINO on the CPU, in the types of the graph."""

import functools
import importlib.metadata
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.environment import import_optional, lacks_vnni, usable_cores
from sopdeploy.base.files import GRAPH, GRAPH_DATA
from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import OwnRuntime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings

TELEMETRY = "openvino_telemetry"


@functools.cache
def openvino_core() -> Any:
    """Return the one `openvino.Core` of this process, which is never released.

    Its CPU plugin replaces the signal stack of the thread that loads it, and unmaps the new one
    when it is released, in whichever thread. The next signal would end the process with a
    segmentation fault. Raises `RuntimeUnavailableError` if OpenVINO is not installed.
    """
    # The package with which OpenVINO reports its import writes an ID into the home folder, and
    # sends events. Its own switch, `opt_in_out --opt_out`, is a file there. Without it,
    # OpenVINO uses its `telemetry_stub`.
    hides_telemetry = TELEMETRY not in sys.modules
    if hides_telemetry:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # importing it now raises `ImportError`

    try:
        openvino = import_optional(
            "openvino", "openvino", ".[openvino]", RuntimeUnavailableError
        )
    finally:
        if hides_telemetry:
            del sys.modules[TELEMETRY]

    return openvino.Core()


class OpenVINORuntime(OwnRuntime):
    """`model.onnx` of a bundle, compiled for this CPU."""

    setting = "openvino"
    title = "OpenVINO"
    extra = "openvino"
    needs_gpu = False
    device = "cpu"

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        """Compile *bundle*, for one thread per core unless *settings* say how many."""
        core = openvino_core()
        version = importlib.metadata.version("openvino")
        self.name = f"openvino {version}"
        self.largest_batch = bundle.manifest.batch.maximum

        if bundle.weights is not None:
            raise RuntimeUnavailableError(
                f"{bundle.path / GRAPH_DATA}: openvino {version} cannot read weights outside of the graph "
                "from memory; choose another runtime",
                remedies={"runtime": OnnxRuntime.setting},
            )

        # Compile the graph.
        options = {
            # What is float32 in the graph stays so, such as a matrix square root; OpenVINO
            # would use bfloat16.
            "EXECUTION_MODE_HINT": "ACCURACY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": settings.threads or usable_cores(),
            "NUM_STREAMS": 1,
        }

        try:
            model = core.compile_model(bundle.onnx.path, "CPU", options)
        except Exception as error:  # OpenVINO raises plain `RuntimeError`s and others
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeUnavailableError(
                f"{bundle.path / GRAPH}: openvino {version} cannot compile the graph: {reason}"
            ) from error

        # It must have the tensors of the manifest.
        declared = {
            tensor.name for tensor in (*bundle.manifest.inputs, *bundle.manifest.outputs)
        }
        if any(not port.names & declared for port in (*model.inputs, *model.outputs)):
            raise RuntimeUnavailableError(
                f"{bundle.path / GRAPH}: has other tensors than the manifest; export it again"
            )

        # A port may have other names, too; the manifest declares one of them.
        self._outputs = {next(iter(port.names & declared)): port for port in model.outputs}
        self._request = model.create_infer_request()

    @staticmethod
    def is_set_up() -> bool:
        """Tell whether OpenVINO is installed; its import would start its telemetry."""
        return find_spec("openvino") is not None

    @staticmethod
    def precisions() -> set[str]:
        """Return all precisions; without VNNI all but int8, whose sums saturate."""
        exact = OwnRuntime.precisions()
        return exact - {"int8"} if lacks_vnni() else exact

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name."""
        values = self._request.infer([images])  # copies of the outputs
        return {name: values[port] for name, port in self._outputs.items()}

    def close(self) -> None:
        """Release the compiled graph."""
        self._request = None
