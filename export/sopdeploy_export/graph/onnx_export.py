"""Lowering a captured graph to one ONNX file: no control flow, no private operators, no local paths.

Newton-Schulz arrives here already unrolled as matrix products, so every runtime and TensorRT release sees
plain operators. Opset 18 is the lowest that torch writes and the one most runtimes read.
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
INPUT = "images"
PREFIX = "network."
REFUSED = frozenset({"Loop", "If", "Scan", "SequenceMap", "NonZero", "Optional"})
OPSET_OF_BFLOAT16 = 22  # the first whose convolutions may be bfloat16
# What was converted, for as long as it lives: converting a ResNet-50 anew takes as long as measuring it.
INSIDE: WeakKeyDictionary[ExportedProgram, tuple[int, ExportedProgram]] = WeakKeyDictionary()
LARGEST_FILE = 2**31 - 1  # protobuf's limit; beyond it weights would need a second file


def lower(program: ExportedProgram, outputs: Sequence[str], opset: int = OPSET) -> onnx.ModelProto:
    """Return the ONNX model of *program*: uint8 `images` in, float32 *outputs* out, batch symbolic.

    Raises `LoweringError` where an operator has no plain ONNX form or the file would exceed 2 GB.
    """
    model = convert(program, outputs, opset).model
    ClearMetadataAndDocStringPass()(model)
    tidy(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size > LARGEST_FILE:
        raise LoweringError(f"the weights take {size} bytes; one ONNX file holds at most {LARGEST_FILE}")
    proto: onnx.ModelProto = ir.to_proto(model)
    check(proto, opset)
    return proto


def with_converter_names(
    program: ExportedProgram, outputs: Sequence[str], opset: int = OPSET
) -> ExportedProgram | None:
    """Return *program* as the converter names its values; from the last conversion where there was one."""
    known = INSIDE.get(program)
    if known is not None and known[0] == opset:
        return known[1]
    return convert(program, outputs, opset).exported_program


def convert(program: ExportedProgram, outputs: Sequence[str], opset: int = OPSET) -> torch.onnx.ONNXProgram:
    """Return what torch's converter makes of *program*; the same program gives the same names inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter warns about its own internals
        try:
            lowered = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(outputs),
                external_data=False,
                verbose=False,
            )
        except Exception as problem:  # the converter raises whatever its passes raise
            raise LoweringError(f"no ONNX form: {type(problem).__name__}: {first_line(problem)}") from problem
    if lowered is None:
        raise LoweringError("no ONNX form: the converter gave nothing")
    if lowered.exported_program is not None:
        INSIDE[program] = (opset, lowered.exported_program)
    return lowered


def first_line(problem: BaseException) -> str:
    """Return the first line of what *problem* says."""
    return str(problem).strip().partition("\n")[0]


def tidy(model: ir.Model) -> None:
    """Give weights their own names back, call the batch `batch`, forget the types of inner values."""
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


def check(proto: onnx.ModelProto, opset: int = OPSET) -> None:
    """Refuse a graph that some runtime could not run, or would run otherwise."""
    onnx.checker.check_model(proto, full_check=True)
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    if opsets != {"": opset}:
        raise LoweringError(f"the graph needs operator sets {opsets}, not only {opset} of ONNX itself")
    refused = sorted({node.op_type for node in proto.graph.node} & REFUSED)
    if refused:
        raise LoweringError(f"the graph holds {refused[0]}; control flow has no place in what ships")
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value") and batch.dim_value != 1:
        raise LoweringError(f"the graph fixes the batch size to {batch.dim_value}")


def operator_counts(proto: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator stands in *proto*, by name."""
    return dict(sorted(Counter(node.op_type for node in proto.graph.node).items()))


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Write *proto* to *path* as one file; the same model gives the same bytes."""
    path.write_bytes(proto.SerializeToString(deterministic=True))
