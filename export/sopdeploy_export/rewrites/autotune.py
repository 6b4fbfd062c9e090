"""Choose between equivalent forms of a part by timing them (`--autotune`).

Each form is exported alone, and the forms run in turn on one thread, at batch 1 and at the bundle's optimum
batch. Process time is measured, which other load on the machine affects least.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy_export.graph.onnx_export import OPSET
from sopdeploy_export.graph.torch_export import export

RUNS, WARMUPS = 15, 3
Cast = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Times forms after *cast*, which places the casts of the exported precision."""

    batch: BatchRange
    cast: Cast

    def fastest(self, forms: dict[str, nn.Module], inputs: tuple[Tensor, ...]) -> str:
        """Name the form with the smallest product of median times."""
        sessions = {name: open_form(self.cast(form), inputs) for name, form in forms.items()}
        scores = dict.fromkeys(sessions, 1.0)
        for size in sorted({1, self.batch.optimum}):
            feeds = []
            for value in inputs:
                array = value.float().numpy()
                feeds.append(array[np.arange(size) % len(array)])
            for name, seconds in _median_seconds(sessions, feeds).items():
                scores[name] *= seconds
        return min(scores, key=lambda name: scores[name])


def open_form(form: nn.Module, inputs: tuple[Tensor, ...]) -> ort.InferenceSession:
    """Open *form* alone in ONNX Runtime on one thread, for any batch size."""
    batch = Dim("batch", min=1)
    program = export(form, inputs, tuple({0: batch} for _ in inputs))
    converted = torch.onnx.export(
        program, (), dynamo=True, opset_version=OPSET, external_data=False, verbose=False
    )
    if converted is None:
        raise LoweringError("no ONNX form: the converter returned nothing")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    raw = converted.model_proto.SerializeToString()
    return ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def _median_seconds(
    sessions: dict[str, ort.InferenceSession], feeds: list[NDArray[np.float32]]
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for run in range(WARMUPS + RUNS):
        for name, session in sessions.items():
            named = dict(zip((given.name for given in session.get_inputs()), feeds, strict=True))
            start = time.process_time()
            session.run(None, named)
            if run >= WARMUPS:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
