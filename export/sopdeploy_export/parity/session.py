"""The shipped file in the runtime and with the optimisations it will be served with.

ONNX Runtime's CPU has no bfloat16 kernels. A bfloat16 graph is compared there by emulation: a cast to float32
before each such operator and one back after it, without the runtime's optimisations, which could take the
pair away. Every value that the graph stores is rounded as a GPU rounds it, sums are float32 as on a GPU, and
the graph is the same; speed and kernels are not. Reports say so: `EMULATION`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.errors import ParityError
from sopdeploy_export.parity.report import PROVIDER

Arrays = dict[str, NDArray[Any]]
BFLOAT16 = onnx.TensorProto.BFLOAT16
EMULATION = (
    "this runtime has no bfloat16 kernels: each such operator was computed in float32 and its result rounded "
    "to bfloat16, operator by operator"
)


def open_session(model: Path | onnx.ModelProto, *, optimized: bool = True) -> ort.InferenceSession:
    """Return *model* in the runtime it is compared in; raises `ParityError` for another provider."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    if isinstance(model, Path) and holds_bfloat16(loaded := onnx.load(model)):
        source = by_casts(loaded).SerializeToString()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(source, options, providers=[PROVIDER])
    if session.get_providers()[0] != PROVIDER:
        raise ParityError(f"onnxruntime runs on {session.get_providers()[0]}, not on {PROVIDER}")
    return session


def file_outputs(session: ort.InferenceSession, images: NDArray[np.uint8], batch: int) -> Arrays:
    """Return the file's outputs for *images*, each computed in a batch of exactly *batch* images.

    Raises `ParityError` where the file does not take such a batch.
    """
    source = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]
    chunks = []
    for start in range(0, len(images), batch):
        wanted = np.arange(start, start + batch) % len(images)
        try:
            chunks.append(session.run(names, {source: images[wanted]}))
        except Exception as problem:  # onnxruntime's errors share no base class
            raise ParityError(
                f"the exported file takes no batch of {batch}: {first_line(problem)}"
            ) from problem
    joined = (np.concatenate(values)[: len(images)] for values in zip(*chunks, strict=True))
    return dict(zip(names, joined, strict=True))


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Return the batch that *model* takes, `None` where it takes any: `--max-batch 1` fixes it to one."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def first_line(problem: BaseException) -> str:
    """Return the first line of what *problem* says."""
    return str(problem).strip().partition("\n")[0][:200]


def emulation(path: Path) -> str | None:
    """Return how the file at *path* is run where the runtime cannot run it as it stands, `None` if it can."""
    return EMULATION if holds_bfloat16(onnx.load(path)) else None


def holds_bfloat16(model: onnx.ModelProto) -> bool:
    """Say whether any weight of *model* is bfloat16."""
    return any(tensor.data_type == BFLOAT16 for tensor in model.graph.initializer)


def by_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return *model* with every bfloat16 operator computed in float32 between two casts."""
    typed = onnx.shape_inference.infer_shapes(model)
    narrow = {v.name for v in typed.graph.value_info if v.type.tensor_type.elem_type == BFLOAT16}
    narrow |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == BFLOAT16}
    nodes: list[onnx.NodeProto] = []
    for node in typed.graph.node:
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        after = []
        for position, name in enumerate(node.input):
            if name in narrow:
                nodes.append(cast(name, f"{name}:wide", onnx.TensorProto.FLOAT))
                node.input[position] = f"{name}:wide"
        for position, name in enumerate(node.output):
            if name in narrow:
                node.output[position] = f"{name}:exact"
                after.append(cast(f"{name}:exact", name, BFLOAT16))
        nodes += [node, *after]
    del typed.graph.node[:]
    typed.graph.node.extend(once(nodes))
    del typed.graph.value_info[:]
    return typed


def widened(model: onnx.ModelProto, names: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """Return *model* and what to ask of it for *names*: numpy has no bfloat16, so it is cast."""
    typed = onnx.shape_inference.infer_shapes(model)
    narrow = {v.name for v in typed.graph.value_info if v.type.tensor_type.elem_type == BFLOAT16}
    there = {output for node in typed.graph.node for output in node.output}
    for name in narrow.intersection(names):
        if f"{name}:wide" not in there:
            typed.graph.node.append(cast(name, f"{name}:wide", onnx.TensorProto.FLOAT))
    return typed, [f"{name}:wide" if name in narrow else name for name in names]


def cast(source: str, target: str, to: int) -> onnx.NodeProto:
    """Return a cast of *source*, called *target*."""
    return onnx.helper.make_node("Cast", [source], [target], to=to)


def once(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return *nodes* without those that compute what an earlier one does."""
    seen: set[str] = set()
    kept = []
    for node in nodes:
        if not seen.issuperset(node.output):
            kept.append(node)
        seen.update(node.output)
    return kept
