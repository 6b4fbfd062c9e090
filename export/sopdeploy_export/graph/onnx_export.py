"""Convert a captured program to one ONNX file of standard operators.

Newton-Schulz is unrolled into matrix products, so every runtime and TensorRT release supports it. Opset 18
is the lowest that torch writes and the most widely supported.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch.export import ExportedProgram

from sopdeploy.errors import LoweringError

OPSET = 18
OPSET_OF_BFLOAT16 = 22  # the first opset with bfloat16 convolutions
INPUT = "images"
PREFIX = "network."  # the attribute of `Deployed` that holds the network
REJECTED = frozenset({"Loop", "If", "Scan", "SequenceMap", "NonZero", "Optional"})
MAX_BYTES = 2**31 - 1  # protobuf's limit; larger models need a second file for the weights
# Converting a ResNet-50 takes as long as the parity check, so conversions are cached while the program lives.
_CONVERTED: WeakKeyDictionary[ExportedProgram, tuple[int, ExportedProgram]] = WeakKeyDictionary()


def lower(program: ExportedProgram, outputs: Sequence[str], opset: int = OPSET) -> onnx.ModelProto:
    """Convert *program* to ONNX with input `images` and a symbolic batch dimension.

    Raises `LoweringError` if an operator has no ONNX form or the weights exceed 2 GB.
    """
    model = _convert(program, outputs, opset).model
    ClearMetadataAndDocStringPass()(model)
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        value.name = name.removeprefix(PREFIX)
        value.metadata_props.clear()
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape, output.type = None, None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape[0] = ir.SymbolicDim("batch")
    model.graph.name = "sopdeploy"
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size > MAX_BYTES:
        raise LoweringError(f"the weights take {size} bytes; one ONNX file holds at most {MAX_BYTES}")
    proto: onnx.ModelProto = ir.to_proto(model)
    check(proto, opset)
    return proto


def with_converter_names(
    program: ExportedProgram, outputs: Sequence[str], opset: int = OPSET
) -> ExportedProgram | None:
    """Convert *program*, or look it up, and return it with the names of the ONNX file."""
    cached = _CONVERTED.get(program)
    if cached is not None and cached[0] == opset:
        return cached[1]
    return _convert(program, outputs, opset).exported_program


def _convert(program: ExportedProgram, outputs: Sequence[str], opset: int) -> torch.onnx.ONNXProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter warns about its own internals
        try:
            converted = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(outputs),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the converter does not limit what its passes raise
            reason = str(error).strip().partition("\n")[0]
            raise LoweringError(f"no ONNX form: {type(error).__name__}: {reason}") from error
    if converted is None:
        raise LoweringError("no ONNX form: the converter returned nothing")
    if converted.exported_program is not None:
        _CONVERTED[program] = (opset, converted.exported_program)
    return converted


def check(proto: onnx.ModelProto, opset: int = OPSET) -> None:
    """Check that every runtime can execute *proto*; raises `LoweringError`.

    The graph must be valid, use only *opset* of the standard domain, and hold no control flow and no fixed
    batch size other than 1.
    """
    onnx.checker.check_model(proto, full_check=True)
    opsets = {imported.domain: imported.version for imported in proto.opset_import}
    if opsets != {"": opset}:
        raise LoweringError(f"the graph needs operator sets {opsets}, but only ONNX opset {opset} is allowed")
    rejected = sorted({node.op_type for node in proto.graph.node} & REJECTED)
    if rejected:
        raise LoweringError(f"the graph contains {rejected[0]}; control flow is not allowed")
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value") and batch.dim_value != 1:
        raise LoweringError(f"the graph fixes the batch size to {batch.dim_value}")


def operator_counts(proto: onnx.ModelProto) -> dict[str, int]:
    """Count the nodes of each operator type, sorted by name."""
    return dict(sorted(Counter(node.op_type for node in proto.graph.node).items()))


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Write *proto* to *path*; the same model always gives the same bytes."""
    path.write_bytes(proto.SerializeToString(deterministic=True))
