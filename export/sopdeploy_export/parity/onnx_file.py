"""Run the exported file in ONNX Runtime.

Files run with the graph optimizations used for serving. ONNX Runtime has no bfloat16 CPU kernels, so bfloat16
graphs are emulated: each bfloat16 operator runs in float32 between two casts, without graph optimizations,
which could remove the casts. As on a GPU, results are rounded to bfloat16 and sums are float32; only speed
and kernels differ. Reports of such files contain the sentence `EMULATION`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.environment import EXACT_INT8
from sopdeploy.errors import ParityError
from sopdeploy_export.graph import INPUT
from sopdeploy_export.parity.findings import PROVIDER

Arrays = dict[str, NDArray[Any]]
BFLOAT16 = onnx.TensorProto.BFLOAT16
EMULATION = (
    "this runtime has no bfloat16 kernels: each bfloat16 operator was computed in float32, and its result "
    "was rounded to bfloat16"
)


def open_session(model: Path | onnx.ModelProto, *, optimized: bool = True) -> ort.InferenceSession:
    """Load *model* on the CPU; bfloat16 files are emulated."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_INT8)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    if isinstance(model, Path) and has_bfloat16(loaded := onnx.load(model)):
        source, optimized = emulate_bfloat16(loaded).SerializeToString(), False
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


def has_bfloat16(model: onnx.ModelProto) -> bool:
    """Return whether any weight of *model* is bfloat16."""
    return any(tensor.data_type == BFLOAT16 for tensor in model.graph.initializer)


def emulate_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy *model* with every bfloat16 operator computed in float32 between two casts."""
    typed = onnx.shape_inference.infer_shapes(model)
    narrow = {v.name for v in typed.graph.value_info if v.type.tensor_type.elem_type == BFLOAT16}
    narrow |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == BFLOAT16}
    nodes: list[onnx.NodeProto] = []
    widened: set[str] = set()
    for node in typed.graph.node:
        if node.op_type == "Cast":
            nodes.append(node)
            widened.update(node.output)
            continue
        after = []
        for position, name in enumerate(node.input):
            if name in narrow:
                node.input[position] = f"{name}:wide"
                if f"{name}:wide" not in widened:
                    nodes.append(_cast(name, f"{name}:wide", onnx.TensorProto.FLOAT))
                    widened.add(f"{name}:wide")
        for position, name in enumerate(node.output):
            if name in narrow:
                node.output[position] = f"{name}:exact"
                after.append(_cast(f"{name}:exact", name, BFLOAT16))
        nodes += [node, *after]
    del typed.graph.node[:]
    typed.graph.node.extend(nodes)
    del typed.graph.value_info[:]
    return typed


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], to=to)
