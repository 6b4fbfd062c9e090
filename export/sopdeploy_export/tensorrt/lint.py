"""Rewrite operators that a TensorRT version misreads into exact equivalents, or reject the ONNX graph.

Some hazards raise no error: the engine builds and runs, but computes another function. The lint therefore
runs before every build, for the installed version, and the probes run after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from sopdeploy.errors import EngineError, LoweringError
from sopdeploy.tensorrt.binding import Version
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy.tensorrt.record import Hazard
from sopdeploy_export.tensorrt.rewrites import (
    array,
    cast_bytes_first,
    constants,
    graph_precision,
    value_types,
)

# The newest opset that each release reads; releases between two entries read the earlier one.
NEWEST_OPSET = {(10, 13): 20, (10, 15): 24, (11, 0): 25}
MAX_K = 3840
EXPORT_INT8 = "export again with --precision int8 --int8-for tensorrt"
GRAPH_PRECISION = {"bf16-backbone": "bf16"}  # precisions whose name in the graph differs


@dataclass(frozen=True)
class GraphView:
    """A graph with its constants and value types."""

    model: onnx.ModelProto
    constants: Mapping[str, onnx.TensorProto]
    types: Mapping[str, int]

    def nodes(self, *operators: str) -> Iterator[onnx.NodeProto]:
        """Iterate over the nodes of *operators*."""
        return (node for node in self.model.graph.node if node.op_type in operators)


Rule = Callable[[GraphView], "str | None"]


def _forbidden(message: str, *operators: str, dtype: int | None = None, domain: bool = False) -> Rule:
    """Build a rule that rejects *operators*, values of *dtype*, or operators outside of the ONNX domain."""

    def rule(graph: GraphView) -> str | None:
        if domain:
            domains = {node.domain for node in graph.model.graph.node} - {"", "ai.onnx"}
            return f"operators of the domain {min(domains)} {message}" if domains else None
        if dtype is not None:
            name = next((name for name, found in graph.types.items() if found == dtype), None)
            return f"{name} {message}" if name else None
        node = next(graph.nodes(*operators), None)
        return f"{node.name}: {node.op_type} {message}" if node else None

    return rule


def _computed_axes(graph: GraphView) -> str | None:
    for node in graph.model.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) > 1 and node.input[1] not in graph.constants:
            return f"{node.name}: the axes of {node.op_type} are computed, but must be a constant"
    return None


def _top_k(graph: GraphView) -> str | None:
    for node in graph.nodes("TopK"):
        if node.input[1] not in graph.constants:
            return f"{node.name}: k of TopK is computed, but must be a constant"
        k = int(array(graph.constants[node.input[1]]).reshape(-1)[0])
        if k > MAX_K:
            return f"{node.name}: TopK of {k}, at most {MAX_K} are supported"
    return None


def _scatter_reduction(graph: GraphView) -> str | None:
    # The attribute would be ignored: values would be overwritten instead of added.
    for node in graph.nodes("ScatterND"):
        if any(a.name == "reduction" and a.s not in {b"", b"none"} for a in node.attribute):
            return f"{node.name}: ScatterND with a reduction is not supported"
    return None


def _quantized_for_cpu(graph: GraphView) -> str | None:
    """Reject quantization other than int8 with zero point 0.

    CPUs prefer uint8, a zero point and int32 biases. TensorRT's parser fails on a zero point or an int32
    bias, and reads uint8 as int8.
    """
    for node in graph.nodes("QuantizeLinear", "DequantizeLinear"):
        zero_point = node.input[2] if len(node.input) > 2 else ""
        if zero_point:
            tensor = graph.constants.get(zero_point)
            symmetric = (
                tensor is not None and tensor.data_type == TensorProto.INT8 and not array(tensor).any()
            )
        else:  # the quantized values have the type; the default of QuantizeLinear is uint8
            codes = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
            symmetric = graph.types.get(codes) == TensorProto.INT8
        if not symmetric:
            return f"{node.name}: is quantized for CPUs, but must be int8 with zero point 0: {EXPORT_INT8}"
    return None


RULES: dict[str, Rule] = {
    "other-domain": _forbidden("need a plugin", domain=True),
    "computed-axes": _computed_axes,
    "control-flow": _forbidden("makes shapes depend on data", "If", "Loop", "Scan", "NonZero"),
    "unknown-operator": _forbidden("is not supported", "Det"),
    "double": _forbidden("is a double and would silently become a float", dtype=TensorProto.DOUBLE),
    "top-k": _top_k,
    "scatter-reduction": _scatter_reduction,
    "quantised-for-a-cpu": _quantized_for_cpu,
}


def lint(
    model: onnx.ModelProto, version: Version, profiles: Sequence[Profile]
) -> tuple[onnx.ModelProto, tuple[Hazard, ...]]:
    """Copy *model* in a form that TensorRT *version* reads correctly, and list the rewrites.

    Every operator of the copy has a unique name, which identifies it in the layers of the engine. Raises
    `LoweringError` with the first violated rule, or if the batch is fixed and *profiles* need another.
    """
    safe = onnx.ModelProto.FromString(model.SerializeToString())
    sizes = {size for profile in profiles for size in (profile.minimum, profile.maximum)}
    for value in safe.graph.input:
        batch = value.type.tensor_type.shape.dim[0]
        if batch.HasField("dim_value") and sizes != {batch.dim_value}:
            raise LoweringError(
                f"the graph fixes the batch of {value.name} to {batch.dim_value}, but the profiles are "
                f"{', '.join(map(str, profiles))}: export the bundle again"
            )
    taken: set[str] = set()
    for index, node in enumerate(safe.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
        taken.add(node.name)
    release = f"TensorRT {version[0]}.{version[1]}"
    view = GraphView(model=safe, constants=constants(safe), types=value_types(safe))
    for name, rule in RULES.items():
        complaint = rule(view)
        if complaint is not None:
            raise LoweringError(f"{release} ({name}): {complaint}")
    hazard = cast_bytes_first(safe)
    newest = next(NEWEST_OPSET[start] for start in sorted(NEWEST_OPSET, reverse=True) if version >= start)
    opset = max(entry.version for entry in safe.opset_import if entry.domain == "")
    if opset > newest:
        raise LoweringError(f"{release} (newer-opset): reads opset {newest} at most, the graph has {opset}")
    return safe, () if hazard is None else (hazard,)


def check_precision(model: onnx.ModelProto, requested: str, version: Version | None) -> None:
    """Raise `EngineError` unless the graph has the *requested* precision.

    TensorRT 11 has no option to change the precision and TensorRT 10 ignores it in a strongly typed network,
    so the build would succeed with the graph's own precision.
    """
    found = graph_precision(model)
    if found != GRAPH_PRECISION.get(requested, requested):
        release = f"TensorRT {version[0]}" if version is not None else "TensorRT"
        raise EngineError(
            f"{requested} was requested but the graph is {found}; {release} takes the precision from the "
            f"graph: export the checkpoint again with `sopdeploy export --precision {requested}`"
        )
