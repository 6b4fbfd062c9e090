"""Run the exported file in ONNX Runtime, with the graph optimizations used for serving."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.environment import EXACT_INT8
from sopdeploy.errors import ParityError
from sopdeploy_export.findings import PROVIDER
from sopdeploy_export.graph import INPUT

Arrays = dict[str, NDArray[Any]]


def open_session(model: Path | onnx.ModelProto, *, optimized: bool = True) -> ort.InferenceSession:
    """Load *model* on the CPU; without *optimized*, its operators are not fused."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_INT8)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(source, options, providers=[PROVIDER])


def file_outputs(session: ort.InferenceSession, images: NDArray[np.uint8], batch: int) -> Arrays:
    """Run *images* in batches of exactly *batch* images; repeated images fill the last batch.

    Raises `ParityError` if the file does not accept this batch size.
    """
    names = [output.name for output in session.get_outputs()]
    chunks = []
    for start in range(0, len(images), batch):
        indices = np.arange(start, start + batch) % len(images)
        try:
            chunks.append(session.run(names, {INPUT: images[indices]}))
        except Exception as problem:  # onnxruntime's errors share no base class
            reason = str(problem).strip().partition("\n")[0][:200]
            raise ParityError(f"the exported file rejects a batch of {batch}: {reason}") from problem
    joined = (np.concatenate(values)[: len(images)] for values in zip(*chunks, strict=True))
    return dict(zip(names, joined, strict=True))
