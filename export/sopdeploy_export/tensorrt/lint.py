"""Rewrite an ONNX graph into an equal one that TensorRT reads, or say why TensorRT would misread it.

TensorRT's own parser names the operators that it does not support. The lint covers what depends on the form
of bundles: bytes as input, a fixed batch, the opset, and int8 graphs for CPUs.
"""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, numpy_helper

from sopdeploy.errors import EngineError, LoweringError
from sopdeploy.tensorrt.binding import Version
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy.tensorrt.record import Hazard
from sopdeploy_export.tensorrt.rewrites import cast_images_first, graph_precision, value_types

# The newest opset that each release reads; releases between two entries read the earlier one.
NEWEST_OPSET = {(10, 13): 20, (10, 15): 24, (11, 0): 25}
GRAPH_PRECISION = {"bf16-backbone": "bf16"}  # precisions whose name in the graph differs


def lint(
    model: onnx.ModelProto, version: Version, profiles: Sequence[Profile]
) -> tuple[onnx.ModelProto, tuple[Hazard, ...]]:
    """Copy *model* in a form that TensorRT *version* reads correctly, and list the rewrites.

    Every operator of the copy has a unique name, which identifies it in the layers of the engine. Raises
    `LoweringError` if TensorRT would reject or misread the graph, or if the batch is fixed and *profiles*
    need another.
    """
    safe = onnx.ModelProto.FromString(model.SerializeToString())
    taken: set[str] = set()
    for index, node in enumerate(safe.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
        taken.add(node.name)
    _check_batch(safe, profiles)
    _check_quantization(safe)
    _check_opset(safe, version)
    hazard = cast_images_first(safe)
    return safe, () if hazard is None else (hazard,)


def _check_batch(model: onnx.ModelProto, profiles: Sequence[Profile]) -> None:
    sizes = {size for profile in profiles for size in (profile.minimum, profile.maximum)}
    for value in model.graph.input:
        batch = value.type.tensor_type.shape.dim[0]
        if batch.HasField("dim_value") and sizes != {batch.dim_value}:
            raise LoweringError(
                f"the graph fixes the batch of {value.name} to {batch.dim_value}, but the profiles are "
                f"{', '.join(map(str, profiles))}: export the bundle again"
            )


def _check_quantization(model: onnx.ModelProto) -> None:
    """Reject quantization other than int8 with zero point 0.

    CPUs prefer uint8, a zero point and int32 biases. TensorRT's parser fails on a zero point or an int32
    bias, and reads uint8 as int8.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    types = value_types(model)
    for node in model.graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        codes = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
        symmetric = types.get(codes) == TensorProto.INT8
        if len(node.input) > 2 and node.input[2]:
            zero_point = constants.get(node.input[2])
            symmetric = symmetric and zero_point is not None and not numpy_helper.to_array(zero_point).any()
        if not symmetric:
            raise LoweringError(
                f"{node.name}: is quantized for CPUs, but TensorRT needs int8 with zero point 0: export "
                "again with --precision int8 --int8-for tensorrt"
            )


def _check_opset(model: onnx.ModelProto, version: Version) -> None:
    newest = next(NEWEST_OPSET[start] for start in sorted(NEWEST_OPSET, reverse=True) if version >= start)
    opset = max(entry.version for entry in model.opset_import if entry.domain == "")
    if opset > newest:
        raise LoweringError(
            f"TensorRT {version[0]}.{version[1]} reads opset {newest} at most, the graph has {opset}; "
            "install a newer TensorRT"
        )


def check_precision(model: onnx.ModelProto, requested: str, version: Version | None) -> None:
    """Raise `EngineError` unless the graph has the *requested* precision.

    TensorRT 11 has no option to change the precision and TensorRT 10 ignores it in a strongly typed network,
    so the build would succeed with the graph's own precision.
    """
    actual = graph_precision(model)
    if actual != GRAPH_PRECISION.get(requested, requested):
        release = f"TensorRT {version[0]}" if version is not None else "TensorRT"
        raise EngineError(
            f"{requested} was requested but the graph is {actual}; {release} takes the precision from the "
            f"graph: export the checkpoint again with `sopdeploy export --precision {requested}`"
        )
