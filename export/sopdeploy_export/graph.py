"""Capture a network as a torch.export program, and convert the program to one ONNX file.

The program takes uint8 images (batch, height, width, 3) from `Preprocess`, normalizes them and returns
float32 outputs for any batch size of the bundle; a program that does not support the whole range is rejected.
Newton-Schulz is unrolled into matrix products, so every runtime and TensorRT release supports it. Opset 18 is
the lowest that torch writes and the most widely supported.
"""

import ast
import gc
import inspect
import io
import linecache
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from types import FrameType
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as common_rules
from onnxscript.rewriter.rules.common import _fuse_relus_clips, _no_op
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.sym_node import SymNode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import EMBEDDING, BatchRange
from sopdeploy.errors import LoweringError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.covariance import at_least_float32
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.constant_parts import evaluate_constant_parts
from sopdeploy_export.program_hashes import module_of, trace_hash
from sopdeploy_export.state import (
    NOT_IN_EVAL,
    STATELESS,
    PythonNumbers,
    modules,
    preserved,
    recording_calls,
    tensors,
)
from sopdeploy_export.sums import SUMS

OPSET = 18
INPUT = "images"
EXPORT_LOGITS = "export_logits"  # attribute of a network outside of the catalog, see `_network_outputs`
EXPORT_EMBEDDING = "export_embedding"  # attribute of any network, see `compute_outputs`
# How torch.export says that code depends on the batch size.
BATCH_GUARD = re.compile(r"generated guard|to be a constant|marked \w+ as dynamic")
# How the converter names the node that it cannot translate, and the operator of it.
TRANSLATED = re.compile(r"translating node %(\w+) :.*?\[target=torch\.ops\.([\w.]+)\]")
NO_GRAPH = "cannot be captured as one graph"
BY_SIZE = "its code treats some batch sizes differently, or fixes the size"
SIZE_REMEDY = (
    "every size needs one graph: write x.shape[0] for len(x) and int(x.shape[0]), a // b for int(a / b), and "
    "compute all images "
    "of a batch at once instead of in a loop"
)
DATA_GUARD = re.compile(r"data-dependent expression")
BY_VALUE = "its code depends on values of the image, as `x[mask]` or `if` does: use torch.where"
NETWORK_PREFIX = "network."  # the attribute of `Deployed` that holds the network
REJECTED = frozenset({"Loop", "If", "Scan", "SequenceMap", "NonZero", "Optional"})
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
PASSES = 2  # of the converter's optimizer: the second one simplifies what the first has made
# The optimizer's rules that can change a result; `_simplify` leaves them out. The others are exact up to the
# rounding of `fuse_batchnorm` (folded weights are rounded once more) and `cast_cast` (of 64-bit numbers).
INEXACT = {
    *_no_op.rules,  # x + c and x * c become x if c differs from 0 by 1e-8 or from 1 by 1e-5
    *_fuse_relus_clips.rules,  # relu(clip(x, -2, -1)), which is 0, becomes clip(x, 0, -1), which is -1
    common_rules.no_op_static_scatter_nd_rule,  # a sum into all positions becomes a copy
    common_rules.slice_split_rule,  # of an odd number, the first half becomes the longer one
}
EXACT_RULES = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in INEXACT]
_MAX_BYTES = 2**31 - 1  # protobuf's limit; larger models need a second file for the weights
_SEED = 20_240_117
GENERATED = 12


class Deployed(nn.Module):
    """Normalization followed by *network*: the module that is captured and exported.

    Every run, also while it is captured, raises `LoweringError` if the network writes to one of its tensors.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.normalise = Normalize(preprocess, images_format(network))
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of (B, H, W, 3) uint8 *images*, in float32 or float64."""
        before = {name: (tensor, *_storage(tensor)) for name, tensor in tensors(self.network).items()}
        outputs = compute_outputs(self.network, self.normalise(images))
        _check_unwritten(self.network, before)
        return tuple(at_least_float32(value) for value in outputs)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return the version of *tensor*, which a write to it changes, and the address of its memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return 0, 0  # tensors of torch.export's tracing have no address, inference tensors no version
    return tensor._version, tensor.data_ptr()


def _check_unwritten(network: nn.Module, before: Mapping[str, tuple[Tensor, int, int]]) -> None:
    """Raise `LoweringError` if a tensor of *network* was written to or replaced since *before* was read."""
    after = tensors(network)
    for name, (tensor, *storage) in before.items():
        if after.get(name) is not tensor or _storage(tensor) != tuple(storage):
            owner = dict(modules(network)).get(name.rpartition(".")[0])
            scales_rows = getattr(owner, "max_norm", None) is not None  # as `nn.Embedding` can
            remedy = f"{STATELESS}: scale its rows once, and set max_norm to None"
            remedy = remedy if scales_rows else NOT_IN_EVAL
            raise LoweringError(f"the network writes to {name} while it runs; {remedy}")


def output_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the exported outputs of *network*, class logits first."""
    names = network.outputs if isinstance(network, Backbone) else Backbone.outputs
    return (*names, EMBEDDING) if EXPORT_EMBEDDING in vars(network) else names


def compute_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the exported outputs of *network*, in eval mode, for normalized *pixels* (B, 3, H, W).

    If *network* has an attribute `export_embedding`, the name of a linear layer, the input (B, D) of this
    layer is the last output. Raises the errors of `_network_outputs`.
    """
    if (name := vars(network).get(EXPORT_EMBEDDING)) is None:
        return _network_outputs(network, pixels)
    inputs: list[Tensor] = []
    layer = network.get_submodule(name)
    with layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0])):
        outputs = _network_outputs(network, pixels)
    return (*outputs, inputs[0])


def _network_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs of *network*, without an embedding, for normalized *pixels* (B, 3, H, W).

    If a network outside of the catalog returns a container, its attribute `export_logits` is the attribute,
    key or index of the logits in that container. Raises `LoweringError` if there are no logits.
    """
    if isinstance(network, Backbone):
        return network.outputs_tuple(pixels)
    output, key = network(pixels), vars(network).get(EXPORT_LOGITS)
    if key is not None and not isinstance(output, Tensor):
        is_attribute = isinstance(key, str) and not isinstance(output, Mapping)
        try:
            output = getattr(output, key) if is_attribute else output[key]
        except (AttributeError, LookupError, TypeError) as error:
            raise LoweringError(f"the network returns {_describe(output)}, without logits {key!r}") from error
    if not isinstance(output, Tensor):
        problem = f"the network returns {_describe(output)}; choose one as the logits"
        raise LoweringError(problem, remedies={"logits_key": None})
    return (output,)


def _describe(output: Any) -> str:
    """Describe *output*, the return value of a network: its type with its keys, fields or length."""
    if isinstance(output, Mapping):
        return f"a dict with {', '.join(map(repr, output))}"
    if (fields := getattr(output, "_fields", None)) is not None:
        return f"a named tuple with {', '.join(fields)}"
    length = f" of {len(output)}" if isinstance(output, list | tuple) else ""
    return f"a {type(output).__name__}{length}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """The functional torch.export programs of one network: for the whole batch range and for a batch of one.

    `traces` are the hashes of both programs before they were made functional; None: it cannot be hashed.
    """

    any_batch: ExportedProgram
    batch_of_one: ExportedProgram
    traces: tuple[str | None, ...]


def capture(
    network: nn.Module, preprocess: Preprocess, batch: BatchRange, known: Sequence[Captured] = ()
) -> Captured:
    """Capture *network*, in eval mode, for the batch range and for a batch of one.

    torch.export assumes that a dynamic dimension is at least 2, so only the second program shows code that
    handles a single image differently. If torch.export gives the same two programs as for one of *known*,
    this one is returned, because making programs functional takes longer than torch.export.
    Raises `LoweringError` if the network cannot be captured.
    """
    ranges = [batch] if batch.maximum == 1 else [batch, BatchRange(optimum=1, maximum=1)]
    traced = [trace(network, preprocess, one) for one in ranges]
    traces = tuple(map(trace_hash, traced))
    for captured in known:
        if captured.traces == traces and None not in traces:  # None equals None, but proves nothing
            return captured
    programs = [functional(program, one) for program, one in zip(traced, ranges, strict=True)]
    return Captured(any_batch=programs[0], batch_of_one=programs[-1], traces=traces)  # equal if maximum is 1


def capture_any_batch(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Capture *network* for every batch size of the range; raises the errors of `trace` and `functional`."""
    return functional(trace(network, preprocess, batch), batch)


def trace(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Run torch.export on *network* for every batch size of the range; *network* is unchanged afterwards.

    Raises `LoweringError` with the first line of torch's message.
    """
    deployed = Deployed(network, preprocess).eval()
    size = min(2, batch.maximum)  # torch.export makes a dimension of size 1 constant
    images = torch.zeros(size, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    shapes = None if size == 1 else ({0: Dim("batch", min=1, max=batch.maximum)},)
    with (
        capturing(),  # raises the `LoweringError`
        SymbolicForms(),  # replaces functions that fit one batch size only
        redirect_stderr(io.StringIO()),  # torch prints part of the graph on failure
        preserved(deployed),  # resets `is_captured`, and caches, where torch leaves tensors without values
        warnings.catch_warnings(action="ignore"),  # torch warns about caches that forward assigns
    ):
        for _, module in modules(deployed):
            if isinstance(module, ExportHints):
                module.is_captured = True
        try:
            return torch.export.export(deployed, (images,), dynamic_shapes=shapes)
        except Exception as error:  # the network's own code, which can raise anything
            if not BATCH_GUARD.search(str(error)):
                raise
            with fixed_sizes() as places, suppress(Exception):  # fails again
                torch.export.export(deployed, (images,), dynamic_shapes=shapes)
            where = f" in {places[0]}" if places else ""
            raise LoweringError(f"{NO_GRAPH}: {BY_SIZE}{where}; {SIZE_REMEDY}") from error


@contextmanager
def fixed_sizes() -> Iterator[list[str]]:
    """List the lines of code in the block, outside of torch and this package, that need sizes as numbers."""
    places: list[str] = []
    guards = (SymNode.guard_int.__code__, SymNode.guard_bool.__code__)

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or frame.f_code not in guards:
            return
        is_number, caller = frame.f_code is guards[0], frame.f_back
        while caller is not None:
            package = str(caller.f_globals.get("__name__", "")).partition(".")[0]
            if package not in ("torch", "sopdeploy", "sopdeploy_export"):
                break
            # Operators compare sizes, too, in ways that fit every size.
            if not is_number and str(caller.f_globals.get("__name__")) not in ("torch", SymNode.__module__):
                return
            caller = caller.f_back
        if caller is not None:
            file, line = caller.f_code.co_filename, caller.f_lineno
            code = linecache.getline(file, line).strip()
            places.append(f"{Path(file).name}:{line} ({code})")

    with recording_calls(record):
        yield places


def functional(program: ExportedProgram, batch: BatchRange) -> ExportedProgram:
    """Replace writes to operands, some forms of pooling, and the ellipsis of `einsum` in *program*.

    Raises `LoweringError` if torch cannot do this, or if some batch of 1 to `batch.maximum` is not accepted.
    """
    with capturing():
        _simplify_average_pooling(program)
        _simplify_max_pooling(program)
        _name_all_axes(program)
        program.graph_module.recompile()
        program = program.run_decompositions({})
    if batch.maximum == 1:
        return program
    name = program.graph_signature.user_inputs[0]
    dimension = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape[0]
    if isinstance(dimension, int):
        raise LoweringError(f"the network fixes the batch size to {dimension}; it must accept every size")
    # torch.export narrows the range that `trace` asks for, 1 to `batch.maximum`, if code requires it.
    allowed = program.range_constraints[dimension.node.expr]
    if int(allowed.lower) > 1 or int(allowed.upper) != batch.maximum:
        raise LoweringError(
            f"the network accepts batches of {allowed.lower} to {allowed.upper} images only, not of "
            f"1 to {batch.maximum}; its code depends on the batch size"
        )
    return program


def _simplify_average_pooling(program: ExportedProgram) -> None:
    """Replace average pooling to one position, in place, by the mean that ATen computes for it.

    After the mean, ATen restores the strides of a map in channels-last layout with `as_strided`
    (AdaptiveAveragePooling.cpp), which torch-tensorrt cannot convert, and ONNX needs five operators for it.
    """
    aten = torch.ops.aten
    poolings = (aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d)
    for num_axes, pooling in enumerate(poolings, start=1):
        for node in program.graph.find_nodes(op="call_function", target=pooling.default):
            x, output_size = node.args
            if output_size == [1] * num_axes:
                node.target, node.args = aten.mean.dim, (x, [*range(-1, -1 - num_axes, -1)], True)


def _simplify_max_pooling(program: ExportedProgram) -> None:
    """Turn `ceil_mode` off, in place, where the result (B, C, H, W) has the same size without it.

    With it, ONNX counts windows that begin behind the map, ATen does not.
    """
    aten = torch.ops.aten
    for node in program.graph.find_nodes(op="call_function", target=aten.max_pool2d.default):
        if len(node.args) == 6 and node.args[5]:  # the last argument is `ceil_mode`, by default False
            x, kernel, stride, padding, dilation, _ = node.args
            image = torch.empty(x.meta["val"].shape[1:], device="meta")  # (C, H, W)
            floored = aten.max_pool2d(image, kernel, stride, padding, dilation)
            if floored.shape[-2:] == node.meta["val"].shape[-2:]:
                node.args = (x, kernel, stride, padding, dilation)


def _name_all_axes(program: ExportedProgram) -> None:
    """Replace the ellipsis in `einsum` by labels, in place; ONNX Runtime does not accept every form of it."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default):
        equation, operands = node.args
        if "..." in equation.partition("->")[0]:
            ranks = [operand.meta["val"].ndim for operand in operands]
            node.args = (_label_hidden_axes(equation, ranks), operands)


def _label_hidden_axes(equation: str, ranks: Sequence[int]) -> str:
    """Replace every "..." by labels: for *ranks* 4 and 3, "...ij,...jk" becomes "baij,ajk->baik"."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # then the result has the labels that occur once, in alphabetical order
        result = "..." + "".join(sorted(x for x in set(terms) - set(",.") if terms.count(x) == 1))
    unused = [letter for letter in ascii_letters if letter not in terms]
    new_terms, longest = [], ""
    for term, rank in zip(terms.split(","), ranks, strict=True):
        num_hidden = rank - len(term.replace("...", ""))
        # Reversed, so that the last hidden axis, at which operands are aligned, is always unused[0].
        labels = "".join(reversed(unused[:num_hidden]))
        new_terms.append(term.replace("...", labels))
        longest = max(longest, labels, key=len)  # the result has all hidden axes
    return f"{','.join(new_terms)}->{result.replace('...', longest)}"


class SymbolicForms(TorchFunctionMode):
    """Replaces functions that torch.export captures for one batch size only, or not at all.

    These are `chunk` and `split` of the batch, as after `cat([x, x.flip(3)])`, and `take_along_dim`. Instance
    norm with running statistics is a batch norm, for which torch would make one image of the whole batch.
    Code that reads tensors of Python numbers gets their values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers = PythonNumbers()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the other form of *function*, if there is one."""
        del types
        number = self._numbers.compute(function, args, kwargs or {})
        if number is not None and not isinstance(number, Tensor):
            return number
        result = OTHER_FORMS.get(function, function)(*args, **(kwargs or {}))
        self._numbers.add(result, number)
        return result


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> Any:
    if is_batch_axis(input, dim) and input.shape[0] % chunks == 0:
        return input.view(chunks, -1, *input.shape[1:]).unbind(0)
    return input.chunk(chunks, dim)


def _split(x: Tensor, size: Any, dim: int = 0) -> Any:
    if is_batch_axis(x, dim) and not isinstance(size, list | tuple) and x.shape[0] % size == 0:
        return x.view(-1, size, *x.shape[1:]).unbind(0)
    return torch.split(x, size, dim)


def is_batch_axis(x: Tensor, dim: int) -> bool:
    """Return whether *dim* is the first axis of *x*, and *x* no weight."""
    return dim in (0, -x.ndim) and not isinstance(x, nn.Parameter)


def _take_along(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Compute `take_along_dim` by `gather`, after all axes but *dim* are expanded to common sizes."""
    if dim is None:  # both are flattened
        return torch.take_along_dim(input, indices)
    x, chosen = input.movedim(dim, -1), indices.movedim(dim, -1)  # (..., n) and (..., k)
    shape = torch.broadcast_shapes(x.shape[:-1], chosen.shape[:-1])  # type: ignore[no-untyped-call]
    x, chosen = x.expand(*shape, x.shape[-1]), chosen.expand(*shape, chosen.shape[-1])
    return x.gather(-1, chosen).movedim(-1, dim)


def _instance_norm(*args: Any, **options: Any) -> Tensor:
    """Normalize by running statistics, as a batch norm does, unless each image has its own."""
    named = inspect.signature(F.instance_norm).bind(*args, **options).arguments
    if named.pop("use_input_stats", True):
        return F.instance_norm(*args, **options)
    return F.batch_norm(**named)


OTHER_FORMS: dict[Any, Any] = {  # parameters have torch's names, or are given by position (split)
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), _take_along),
    F.instance_norm: _instance_norm,
}


@contextmanager
def capturing() -> Iterator[None]:
    """Run a step of the capture; raise `LoweringError` with the first line of torch's message if it fails.

    The garbage collector is off, because it would visit all nodes of a graph again and again, which takes a
    tenth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    except LoweringError:
        raise
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        raise LoweringError(f"{NO_GRAPH}: {_capture_problem(error)}") from error
    finally:
        if was_enabled:
            gc.enable()


def _capture_problem(error: Exception) -> str:
    """Describe an *error* of torch.export."""
    text = "\n".join(str(cause) for cause in (error, error.__cause__, error.__context__) if cause is not None)
    if BATCH_GUARD.search(text):
        return f"{BY_SIZE}; {SIZE_REMEDY}"
    return BY_VALUE if DATA_GUARD.search(text) else first_line(error)


def check_bfloat16(program: ExportedProgram) -> None:
    """Raise `LoweringError` if code of the network computes in bfloat16, for which CPUs have no kernels."""
    for node in program.graph.nodes:
        values = (value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor))
        if node.op == "call_function" and any(value.dtype == torch.bfloat16 for value in values):
            raise LoweringError(
                f"no ONNX form for CPUs: {node.target} computes in bfloat16; remove it and torch.autocast "
                "from forward"
            )


def lower(program: ExportedProgram, outputs: Sequence[str]) -> onnx.ModelProto:
    """Convert *program* to ONNX with input `images` and a symbolic batch dimension.

    The metadata `part` of a node names the part of the network that computes it; `convert_precision` removes
    it. Raises `LoweringError` if an operator has no ONNX form or the weights exceed 2 GB.
    """
    check_bfloat16(program)
    model = convert(evaluate_constant_parts(program), [INPUT], outputs)
    _drop_metadata_except_parts(model)
    model.graph.name = "sopdeploy"
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size > _MAX_BYTES:
        raise LoweringError(f"the weights take {size} bytes; one ONNX file holds at most {_MAX_BYTES}")
    proto: onnx.ModelProto = ir.to_proto(model)
    check_graph(proto)
    return proto


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **options: Any
) -> Any:
    """Write attention on other than four dimensions as matrix products, and a mask as what is added.

    The result of a query that may read nothing is 0, not the NaN of a softmax over -inf alone.
    """
    if mask is not None and not _is_masked.get():
        added, allowed = mask, mask != -torch.inf
        if mask.dtype == torch.bool:
            added, allowed = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf), mask
        token = _is_masked.set(True)
        try:
            result = ATTENTION(query, key, value, added, *args, **options)
        finally:
            _is_masked.reset(token)
        filled = result.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        # The strides stay those of attention, so that a view of the result stays possible.
        axes = sorted(range(result.dim()), key=result.stride, reverse=True)
        return filled.permute(axes).contiguous().permute([axes.index(axis) for axis in range(len(axes))])
    if query.dim() == 4:
        return NotImplemented  # the operator stays
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, *args, **options)[0]


_is_masked: ContextVar[bool] = ContextVar("_is_masked", default=False)  # within the call in `_attention`


def _log1p(values: Tensor) -> Tensor:
    """Write log(1 + x) without its cancellation near 0 (Higham, "Accuracy and Stability", section 1.14.1)."""
    rounded = 1 + values
    near = torch.where(rounded == 1, values, rounded.log() * (values / (rounded - 1)))
    return torch.where(values.abs() < 0.5, near, rounded.log())


def _expm1(values: Tensor) -> Tensor:
    """Write exp(x) - 1 without its cancellation near 0 (Higham, "Accuracy and Stability", section 1.14.1)."""
    power = values.exp()
    near = torch.where(power == 1, values, (power - 1) * (values / power.log()))
    return torch.where(values.abs() < 0.5, near, power - 1)


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    """Write the angle of the point (x, y), from -pi to pi, also if a coordinate is 0 or -0."""
    below, left = ((value < 0) | (1 / value < 0) for value in (y, x))  # 1 / -0 is negative
    far = (y.abs() == torch.inf) & (x.abs() == torch.inf)  # then the angle is that of a diagonal
    divisor = torch.where((x == 0) & (y == 0), 1.0, x)
    slope = torch.where(far, y.sign() * x.sign(), y / divisor)
    # This is right for x > 0; left of the y-axis, it is the angle of the opposite point (-x, -y).
    angle = slope.atan()
    half_turn = torch.where(below, -torch.pi, torch.pi)
    return angle + torch.where(left, half_turn, 0.0)


def _sort(values: Tensor, *, dim: int = -1, descending: bool = False, **_stable: bool) -> Any:
    """Write a stable sort as the choice of all elements: `TopK` is stable, and needs no shape at run time."""
    if values.dim() == 0 or not isinstance(values.shape[dim], int):
        return torch.ops.aten.sort.default(values, dim, descending)
    return torch.ops.aten.topk.default(values, values.shape[dim], dim, descending)


def _index_put(
    values: Tensor, indices: Sequence[Tensor | None], new: Tensor, accumulate: bool = False
) -> Tensor:
    """Write x[mask] = number as a choice, because the number of chosen values is no size of a graph."""
    is_mask = len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool
    if not is_mask or new.numel() != 1 or accumulate:
        return NotImplemented
    mask = cast(Tensor, indices[0])
    return torch.where(mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim())), new.reshape(()), values)


def _hstack(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([*map(torch.atleast_1d, values)], dim=int(values[0].dim() > 1))


def _column_stack(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1, 1) if value.dim() < 2 else value for value in values], dim=1)


# Operators whose form of the converter is missing, or wrong for some values
DECOMPOSED = {
    **SUMS,
    ATTENTION: _attention,
    torch.ops.aten.atan2.default: _atan2,
    torch.ops.aten.expm1.default: _expm1,
    torch.ops.aten.index_put.default: _index_put,
    torch.ops.aten.log1p.default: _log1p,
    torch.ops.aten.log_sigmoid.default: lambda values: -torch.nn.functional.softplus(-values),
    torch.ops.aten.argsort.stable: lambda *args, **options: _sort(*args, **options)[1],
    torch.ops.aten.sort.stable: _sort,
    # The converter writes these with a loop over the tensors.
    torch.ops.aten.atleast_1d.Sequence: lambda values: [*map(torch.atleast_1d, values)],
    torch.ops.aten.atleast_2d.Sequence: lambda values: [*map(torch.atleast_2d, values)],
    torch.ops.aten.atleast_3d.Sequence: lambda values: [*map(torch.atleast_3d, values)],
    torch.ops.aten.hstack.default: _hstack,
    torch.ops.aten.vstack.default: lambda values: torch.cat([*map(torch.atleast_2d, values)]),
    torch.ops.aten.dstack.default: lambda values: torch.cat([*map(torch.atleast_3d, values)], 2),
    torch.ops.aten.column_stack.default: _column_stack,
}


def _decompose(program: ExportedProgram) -> ExportedProgram:
    """Write the operators in `DECOMPOSED` in a form that the converter knows; *program* does not change.

    The results of these forms, and the converter's of attention, have other strides than those of torch, with
    which a view may be impossible. Every view therefore becomes a contiguous copy in another shape.
    """
    if not any(node.target in DECOMPOSED for node in program.graph.nodes):
        return program
    decomposed: ExportedProgram = program.run_decompositions(
        {
            **DECOMPOSED,
            torch.ops.aten.view.default: lambda values, shape: torch.ops.aten._unsafe_view.default(
                values.clone(memory_format=torch.contiguous_format), shape
            ),
        }
    )
    return decomposed


def _drop_metadata_except_parts(model: ir.Model) -> None:
    """Drop source lines, shapes of inner values and other metadata; keep the part of each node."""
    scopes = {node: node.metadata_props.get("pkg.torch.onnx.name_scopes") for node in model.graph}
    common.ClearMetadataAndDocStringPass()(model)  # of nodes and the graph; that of values is cleared below
    for node, scope in scopes.items():
        if scope is not None:  # the modules from the outermost to the innermost, then the operation
            node.metadata_props["part"] = ast.literal_eval(scope)[-2].removeprefix(NETWORK_PREFIX)
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape, output.type = None, None
    for name, value in list(model.graph.initializers.items()):  # a list, because a new name changes the dict
        name_in_network = name.removeprefix(NETWORK_PREFIX)
        if name_in_network not in model.graph.initializers:  # as `normalise.scale` of this package may be
            value.name = name_in_network
        value.metadata_props.clear()
    common.NameFixPass()(model)  # a buffer can have the name of a result, such as `mean`
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape[0] = ir.SymbolicDim("batch")
    model.metadata_props.clear()


def convert(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """Convert *program* to ONNX with named inputs and outputs; raise `LoweringError` if it has no form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter warns about its own internals
        try:
            program = _decompose(program)
            converted: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                external_data=False,
                verbose=False,
                optimize=False,
            )
            model: ir.Model = converted.model
            _simplify(model)
        except Exception as error:  # the converter does not limit what its passes raise
            raise LoweringError(f"no ONNX form: {_conversion_problem(error, program)}") from error
    return model


def _conversion_problem(error: BaseException, program: ExportedProgram) -> str:
    """Name the operator of *program* that the converter cannot translate; else describe its first *error*."""
    cause: BaseException | None = error
    while cause is not None:
        problem = first_line(cause)
        if found := TRANSLATED.search(problem):
            name, operator = found.groups()
            places = [f" in {module_of(node)}" for node in program.graph.nodes if node.name == name]
            return f"{operator}{''.join(places)}; use other operators"
        cause = cause.__cause__
    return BY_VALUE if DATA_GUARD.search(problem) else problem


def _simplify(model: ir.Model) -> None:
    """Simplify *model* as the converter's optimizer (onnxscript) does, but with exact rules only."""
    common.InlinePass()(model)
    for _ in range(PASSES):
        fold_constants(model, onnx_shape_inference=True)
        _remove_choices(model)
        rewrite(model, EXACT_RULES)  # removes what nothing reads, too
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _remove_choices(model: ir.Model) -> None:
    """Remove each `Where` of *model* that never chooses its first value, as behind a constant mask."""
    for node in model.graph:
        if node.op_type != "Where" or node.inputs[0] is None or node.inputs[0].const_value is None:
            continue
        chosen, result = node.inputs[2], node.outputs[0]
        if chosen is None or chosen.shape is None or chosen.shape != result.shape:
            continue
        if not node.inputs[0].const_value.numpy().any() and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, chosen)


def check_graph(proto: onnx.ModelProto) -> None:
    """Check that every runtime can execute *proto*; raises `LoweringError`.

    The graph must be valid, use only opset 18 of the standard domain, and hold no control flow.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LoweringError(f"no ONNX form in opset {OPSET}: {reason}") from error
    opsets = {imported.domain: imported.version for imported in proto.opset_import}
    if opsets != {"": OPSET}:
        raise LoweringError(f"the graph needs operator sets {opsets}, but only ONNX opset {OPSET} is allowed")
    for node in proto.graph.node:
        if node.op_type in REJECTED:
            part = next((item.value for item in node.metadata_props if item.key == "part"), "")
            where = part if part not in ("", "network") else "forward"
            reason = BY_VALUE if node.op_type == "NonZero" else "control flow is not allowed"
            raise LoweringError(f"the graph contains {node.op_type} in {where}; {reason}")


def generated_images(side: int) -> NDArray[np.uint8]:
    """Generate the images on which the file is compared, uint8 (12, side, side, 3), always the same ones."""
    random = np.random.default_rng(_SEED)
    horizontal_ramp = np.tile(np.linspace(0, 255, side), (side, 1))
    square = np.arange(side) // 4  # number of the square, 4 pixels wide, that a row or column belongs to
    checkerboard = 255.0 * ((square[:, None] + square) % 2)
    colors = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [
        *(np.broadcast_to(color, (side, side, 3)) for color in colors),
        np.stack([checkerboard] * 3, axis=2),
        np.stack([horizontal_ramp, horizontal_ramp.T, checkerboard], axis=2),
        random.integers(0, 256, (side, side, 3)),
    ]
    for i in range(GENERATED - len(images)):  # the others are enlarged noise, first the coarsest
        size = min(side, 2 + 6 * i)
        noise = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        images.append(np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack([np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in images])


def evenly_spread(count: int, most: int) -> NDArray[np.int64]:
    """Choose at most *most* of *count* positions, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)
