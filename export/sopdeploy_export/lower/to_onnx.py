"""Convert a program to one ONNX file.

Newton-Schulz is unrolled into matrix products, so every runtime and TensorRT release supports
it. `OPSET` is the lowest that torch writes and the most widely supported. A network with an operator that
it lacks, such as a deformable convolution, is written with `LATER_OPSET`.
"""

import ast
import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as common_rules
from onnxscript.rewriter.rules.common import _fuse_relus_clips, _no_op
from onnxscript.values import TracedOnnxFunction
from onnxscript.version_converter import convert_version
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.onnx._internal.exporter import _core, _decomp, _flags, _fx_passes, _ir_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import InsertTypePromotion, type_promotion
from torch.utils._pytree import tree_leaves

from sopdeploy.base.environment import garbage_kept
from sopdeploy.base.files import GRAPH_DATA
from sopdeploy.bundle.onnx_root import next_offset
from sopdeploy.errors import LoweringError, shorten
from sopdeploy_export.admit.network import MAX_GRAPH_BYTES
from sopdeploy_export.capture.deployed import INPUT
from sopdeploy_export.capture.failures import (
    DEPENDS_ON_VALUES,
    NO_CONTROL_FLOW,
)
from sopdeploy_export.capture.program import NETWORK_PREFIX
from sopdeploy_export.lower.constant_parts import fold_constant_parts
from sopdeploy_export.lower.failures import describe_failure
from sopdeploy_export.lower.forms import decompose
from sopdeploy_export.program_hashes import module_of

OPSET = 18
LATER_OPSET = 20  # the last one that ONNX Runtime 1.17 reads
REJECTED = frozenset({"Loop", "If", "Scan", "SequenceMap", "NonZero", "Optional"})
LARGEST_CHECKED = (
    4096  # bytes of a constant that can decide a shape, such as a new shape itself
)
MULTIPLE = re.compile(r"\w+(\s*\*\s*\w+)*")  # a size that is a symbol or a multiple of one
PASSES = 2  # of the converter's optimizer: the second one simplifies what the first one made
# The optimizer's rules that can change a result; `_simplify` leaves them out. The others are
# exact up to the rounding of `fuse_batchnorm` (folded weights are rounded once more) and
# `cast_cast` (of 64-bit numbers).
INEXACT = {
    *_no_op.rules,  # x + c and x * c become x if c differs from 0 by 1e-8 or from 1 by 1e-5
    # relu(clip(x, -2, -1)), which is 0, becomes clip(x, 0, -1), which is -1
    *_fuse_relus_clips.rules,
    common_rules.no_op_static_scatter_nd_rule,  # a sum into all positions becomes a copy
    common_rules.slice_split_rule,  # of an odd number, the first half becomes the longer one
}
EXACT_RULES = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in INEXACT]


def lower(
    program: ExportedProgram,
    outputs: Sequence[str],
    folder: Path | None = None,
) -> onnx.ModelProto:
    """Convert *program* to ONNX with input `images` and, unless it is for one image, a symbolic batch dimension.

    *outputs* are the names of the outputs. A weight has its name in the network, unless another
    tensor has this name. The nodes keep one record of metadata, `part`: the module that each belongs
    to. Weights that do not fit into one file are written to `GRAPH_DATA` in *folder*. Raises
    `LoweringError` if there is no folder for them, if the program computes in bfloat16, if an operator has
    no ONNX form, if a size depends on values, or if the graph has what `check_onnx` refuses.
    """
    _refuse_bfloat16(program)
    program = fold_constant_parts(program)
    _refuse_sizes_of_values(program)
    model = to_ir(program, [INPUT], outputs)

    # Of the metadata, only `part` stays: the module that a node belongs to, for messages.
    # `convert_precision` removes it, too.
    _clear_metadata_and_inner_shapes(model)

    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape[0] = ir.SymbolicDim("batch")

    # Name the weights as in the network, without the prefix of `Deployed`. A weight keeps its
    # prefix if a tensor beside the network has the shorter name, such as `normalise.scale`. The
    # list is a copy, because a new name changes the dict.
    for name, value in list(model.graph.initializers.items()):
        name_in_network = name.removeprefix(NETWORK_PREFIX)
        if name_in_network not in model.graph.initializers:
            value.name = name_in_network
    common.NameFixPass()(model)  # a buffer can have the name of a result, such as `mean`
    model.graph.name = "sopdeploy"

    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value
    )
    if size > MAX_GRAPH_BYTES:
        _move_weights(model, folder, size)

    # The lowest version that may import the opset: ONNX Runtime 1.17 refuses 10, which onnx writes by
    # default.
    opset = onnx.helper.make_opsetid("", model.opset_imports[""])
    model.ir_version = onnx.helper.find_min_ir_version_for([opset])
    proto: onnx.ModelProto = ir.to_proto(model)
    check_onnx(proto)
    return proto


def _move_weights(model: ir.Model, folder: Path | None, size: int) -> None:
    """Write the large constants of *model*, *size* bytes in all, to `GRAPH_DATA` in *folder*, which it then names.

    Raises `LoweringError` without a *folder*.
    """
    if folder is None:
        raise LoweringError(
            f"the weights take {size / 1e9:.2f} GB, and one ONNX file holds at most "
            f"{MAX_GRAPH_BYTES / 1e9:.2f} GB; choose precision fp16, or a smaller network"
        )

    end = 0  # of the weights before
    with (folder / GRAPH_DATA).open("xb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= LARGEST_CHECKED:
                continue
            start = next_offset(end)
            file.write(bytes(start - end))
            file.write(tensor.tobytes())
            end = start + tensor.nbytes
            value.const_value = ir.ExternalTensor(
                GRAPH_DATA,
                start,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=folder,
            )


def _refuse_bfloat16(program: ExportedProgram) -> None:
    """Raise `LoweringError` if *program* computes in bfloat16, for which CPUs have no kernels."""
    for node in program.graph.nodes:
        leaves = tree_leaves(node.meta.get("val"))
        dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)}
        if node.op == "call_function" and torch.bfloat16 in dtypes:
            raise LoweringError(
                f"no ONNX form for CPUs: {node.target} computes in bfloat16; remove it and torch.autocast "
                "from forward"
            )


def _refuse_sizes_of_values(program: ExportedProgram) -> None:
    """Raise `LoweringError` if a size in *program* depends on values, as the size of `x[mask]` does."""
    for node in program.graph.nodes:
        leaves = tree_leaves(node.meta.get("val"))
        if any(isinstance(leaf, Tensor) and free_unbacked_symbols(leaf) for leaf in leaves):
            raise LoweringError(
                f"no ONNX form: {node.target} in {module_of(node)}; {DEPENDS_ON_VALUES}"
            )


def _clear_metadata_and_inner_shapes(model: ir.Model) -> None:
    """Remove metadata, such as source lines, and shapes and types of inner values; keep the part of each node.

    The part is the innermost module that the node was captured in; `forward` is the whole network.
    """
    parts = {node: part_of(node) for node in model.graph}

    # Clear the metadata of nodes and the graph, of the model, and of values.
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    inputs_and_outputs = (*model.graph.inputs, *model.graph.outputs)
    for value in (*inputs_and_outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()

    # Write the part of each node; clear the shapes and types of its results.
    for node, part in parts.items():
        if part:
            node.metadata_props["part"] = part

        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
                output.type = None


def part_of(node: ir.Node) -> str:
    """Name the innermost module of the network that *node* is in; "forward" is the whole network.

    Returns "" if torch has not written where *node* was captured.
    """
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if text is None:
        return ""

    # From the outermost module to the innermost, then the operation.
    *modules, _ = ast.literal_eval(text)
    name: str = modules[-1].removeprefix("network").removeprefix(".") if modules else ""
    return name or "forward"


def to_ir(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """Convert *program* to ONNX, with the names *inputs* and *outputs*.

    Raises `LoweringError` if an operator has no ONNX form.
    """
    with garbage_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter warns about its own internals
        with _described_failure(program):
            program = decompose(program)
        model = _translate(program, inputs, outputs)
        with _described_failure(program):
            _simplify(model)
    return model


@contextmanager
def _described_failure(program: ExportedProgram) -> Iterator[None]:
    """Raise `LoweringError` in place of what a pass of the converter raises for *program*."""
    try:
        yield
    except Exception as error:  # the converter does not limit what its passes raise
        raise LoweringError(f"no ONNX form: {describe_failure(error, program)}") from error


@_flags.set_onnx_exporting_flag
def _translate(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> ir.Model:
    """Convert *program* as `torch.onnx.export` does, without its optimizer.

    torch's own pass that promotes types computes all values again; here, it takes those of the
    capture (`_Promotion`). Raises `LoweringError` if an operator has no ONNX form.
    """
    with _described_failure(program):
        decomposed = _decompose_others(program)
    with _described_failure(decomposed):  # an error names one of its nodes
        return _convert(decomposed, inputs, outputs)


def _convert(
    decomposed: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> ir.Model:
    """Convert *decomposed*, whose operators have converters; changes it."""
    registry = _converters()
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        for module in decomposed.graph_module.modules():
            promotion = InsertTypePromotion(module)
            promotion.interpreter = _Promotion(module, type_promotion.TypePromotionTable())
            promotion.run()
        decomposed._graph_module = _fx_passes.remove_assertion_nodes(decomposed.graph_module)

    model: ir.Model = _core._exported_program_to_onnx_program(
        decomposed, registry=registry
    ).model
    is_later = _operators_outside(OPSET, (node.op_type for node in model.graph))
    # It also inlines functions, and removes what nothing reads.
    convert_version(model, LATER_OPSET if is_later else OPSET)
    _ir_passes.rename_inputs(model, list(inputs))
    _ir_passes.rename_outputs(model, list(outputs))
    return model


def _operators_outside(opset: int, operators: Iterable[str]) -> list[str]:
    """List the *operators* of the standard domain, each once, that *opset* lacks and `LATER_OPSET` has."""
    return [
        name
        for name in dict.fromkeys(operators)
        if onnx.defs.has(name, LATER_OPSET) and not onnx.defs.has(name, opset)
    ]


def warn_of_opset(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return a warning that names the operators for which *model* has `LATER_OPSET`; none if it has `OPSET`."""
    lacking = _operators_outside(OPSET, (node.op_type for node in model.graph.node))
    if not lacking:
        return ()
    return (
        f"model.onnx has opset {LATER_OPSET}, because opset {OPSET} has no {shorten(lacking)}; check that your "
        "runtime reads it",
    )


def _decompose_others(program: ExportedProgram) -> ExportedProgram:
    """Copy *program* with other operators in place of those that have no converter.

    torch would trace the whole program again for this, so it is only copied if each operator has
    a converter.
    """
    table = _decompositions()
    if any(node.target in table for node in program.graph.nodes):
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            decomposed: ExportedProgram = program.run_decompositions(table)
        return decomposed
    copied = copy.copy(program)
    copied._graph_module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    return copied


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return torch's decompositions of the operators that have no converter."""
    converted = {*_decomp.get_onnx_implemented_overloads(_converters())}
    return _decomp.create_onnx_friendly_decomposition_table(converted)


class _Promotion(type_promotion._TypePromotionInterpreter):
    """Inserts casts where ATen promotes types; the values of all other nodes are those of the capture."""

    def run_node(self, node: fx.Node) -> Any:
        """Cast the operands of *node* if its operator has a rule; return the value of *node*."""
        if node.op != "call_function" or "val" not in node.meta:
            return super().run_node(node)
        rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]


@cache
def _converters() -> ONNXRegistry:
    """Return torch's converters of all operators, collected once.

    `torch.onnx.export` collects them in each call. It also parses the source of each, which takes
    most of the time, for a domain that nothing reads; the patch leaves this out.
    """
    with patch.object(
        TracedOnnxFunction, "function_ir", SimpleNamespace(domain=""), create=True
    ):
        return ONNXRegistry.from_torchlib()


def _simplify(model: ir.Model) -> None:
    """Simplify *model* as the converter's optimizer (onnxscript) does, but with exact rules only."""
    for _ in range(PASSES):
        fold_constants(model, onnx_shape_inference=True)
        _bypass_constant_choices(model)
        rewrite(model, EXACT_RULES)  # removes what nothing reads, too

    # Constants once, each as an initializer; equal computations once; names without conflicts.
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    _forbid_sizes_of_zero(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _forbid_sizes_of_zero(model: ir.Model) -> None:
    """Remove `allowzero` from each `Reshape` in *model* whose result has no size of 0, for any batch.

    Other readers of ONNX, such as onnx2torch and those of embedded chips, refuse the attribute.
    """
    for node in model.graph:
        shape = node.outputs[0].shape
        if node.op_type != "Reshape" or shape is None:
            continue

        # A symbol is a size of the batch, which is at least 1, and so are its multiples, such as 64*s. Other
        # terms, such as s // 2, can be 0.
        has_no_zero = all(
            size != 0 if isinstance(size, int) else MULTIPLE.fullmatch(str(size.value))
            for size in shape
        )
        if has_no_zero:
            node.attributes.pop("allowzero", None)


def _bypass_constant_choices(model: ir.Model) -> None:
    """Bypass each `Where` whose mask is constant and all false, if its third operand has the shape of the result.

    One whose result is an output of the graph stays.
    """
    for node in model.graph:
        if node.op_type != "Where":
            continue
        mask, _, otherwise = node.inputs
        result = node.outputs[0]

        if mask is None or mask.const_value is None or mask.const_value.numpy().any():
            continue
        if otherwise is None or otherwise.shape is None or otherwise.shape != result.shape:
            continue
        if not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, otherwise)


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy *proto* with inputs in place of its large constants, of which the checker makes several copies."""
    graph = onnx.GraphProto(name=proto.graph.name, node=proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)

    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) <= LARGEST_CHECKED and not tensor.external_data:
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return onnx.ModelProto(
        ir_version=proto.ir_version, opset_import=proto.opset_import, graph=graph
    )


def without_values(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy *model* without the values of its large constants, of which types and shapes remain."""
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)

    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > LARGEST_CHECKED:
            graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
        else:
            graph.initializer.append(tensor)
    return onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, graph=graph
    )


def check_onnx(proto: onnx.ModelProto) -> None:
    """Raise `LoweringError` unless *proto* has only what the runtimes have in common.

    It must be valid, use only `OPSET` or `LATER_OPSET` of the standard domain, and hold none of the operators
    `REJECTED`, such as control flow and `NonZero`.
    """
    try:
        onnx.checker.check_model(_without_weights(proto), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LoweringError(f"no ONNX form: {reason}") from error

    opsets = {imported.domain: imported.version for imported in proto.opset_import}
    if opsets not in ({"": OPSET}, {"": LATER_OPSET}):
        raise LoweringError(
            f"the graph needs operator sets {opsets}, but only ONNX opset {OPSET} or {LATER_OPSET} is allowed"
        )

    for node in proto.graph.node:
        if node.op_type in REJECTED:
            part = next(
                (item.value for item in node.metadata_props if item.key == "part"), "forward"
            )
            raise LoweringError(
                f"the graph contains {node.op_type} in {part}; {NO_CONTROL_FLOW}"
            )
