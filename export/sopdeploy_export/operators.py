"""Compare every operator of a program with its ONNX form, on values that images hardly ever cause.

The converter writes some operators in a form that equals them for most values only: as two ONNX operators of
which the first overflows, or without one of the attributes. Each operator runs in ONNX Runtime and in ATen,
with its own shapes and attributes, on zeros of both signs, ties, large values, denormals, the largest finite
values and NaN. Both compute in float32, the type of the file. Results are compared where ATen's result is a
number.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx.utils import Extractor
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from sopdeploy.errors import LoweringError, first_line
from sopdeploy_export.graph import capturing, convert
from sopdeploy_export.program_hashes import module_of
from sopdeploy_export.results import PROVIDER

ORDINARY = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, 45.0, -45.0, 100.0, -100.0)
TOLERANCE = 1e-4  # relative to the result
ROUNDING = 16  # units in the last place of the operands, for the error of elementwise operators
MAX_ROUNDS = 100  # of an operator with few elements
CONVOLUTIONS = ("aten::convolution", "aten::conv2d")
# Elementwise operators and these have one ONNX form for all sizes from `LARGE`.
SIZELESS = (*CONVOLUTIONS, "aten::_native_batch_norm_legit_no_training", "aten::pad")
LARGE = 4
PRODUCTS = ("aten::linear", "aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
ENOUGH = 64  # elements along an axis, on which a product of matrices or an elementwise operator is compared
NOT_NEAR_ZERO = ("aten::elu", "aten::celu", "aten::selu")  # ONNX Runtime computes exp(x) - 1, which cancels
SORTED = ("aten::argsort", "aten::sort", "aten::topk")  # in no defined order of equal values
NOT_NAN = ("aten::sign",)  # 0 in ATen, NaN in ONNX Runtime

_equal: set[str] = set()  # descriptions of the operators that this process has compared


class _Call(NamedTuple):
    """One operator of a program: its arguments, its used results and the part that calls it."""

    target: OpOverload
    arguments: tuple[Any, dict[str, Any]]
    used: tuple[int, ...]
    part: str

    @property
    def name(self) -> str:
        """The name of the operator without its overload."""
        return str(self.target).replace(".", "::", 1).partition(".")[0]

    @property
    def size(self) -> int:
        """The number of elements of the largest operand."""
        return max(operand.numel() for operand in self.operands)

    @property
    def elementwise(self) -> bool:
        """Whether an element of the result depends on one element of each operand only."""
        return torch.Tag.pointwise in self.target.tags

    @property
    def operands(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Compute the used results for other *operands*, in the order of the property `operands`."""
        given = iter(operands)  # `tree_map_only` visits the tensors in the order of `tree_leaves`
        args, kwargs = tree_map_only(Tensor, lambda _: next(given), self.arguments)
        results = self.target(*args, **kwargs)
        return [results] if isinstance(results, Tensor) else [results[position] for position in self.used]


class _Calls(nn.Module):
    """Runs *calls* one by one, each on its own operands."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *operands: Tensor) -> list[Tensor]:
        """Compute the results of all calls."""
        given = iter(operands)
        return [result for call in self.calls for result in call.run([next(given) for _ in call.operands])]


class _Recorder(fx.Interpreter):
    """Runs a program and records its operators in `calls`, by descriptions with shapes and attributes."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.module())
        self.calls: dict[str, _Call] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; record its operator if it has not been compared."""
        arguments: Any = self.fetch_args_kwargs_from_env(n)
        results = super().run_node(n)
        call = _as_call(n, arguments, results)
        if call is not None:
            description = _describe(call)
            known = self.calls.get(description)
            is_smallest = known is None or call.size < known.size  # of the calls with this description
            if is_smallest and description not in _equal:
                self.calls[description] = call
        return results


def _as_call(node: fx.Node, arguments: tuple[Any, dict[str, Any]], results: Any) -> _Call | None:
    """Return the call of *node*; None if it has no operands or no results that can be compared."""
    is_aten = isinstance(node.target, OpOverload) and node.target.namespace == "aten"
    has_tensors = isinstance(results, Tensor | list | tuple)
    if not (is_aten and has_tensors and node.users):
        return None
    leaves = [leaf for leaf in tree_leaves((arguments, results)) if isinstance(leaf, Tensor)]
    if any(leaf.is_complex() for leaf in leaves):
        return None
    # Of several results, the users are `getitem` nodes, whose second argument is the position.
    positions: set[Any] = {0} if isinstance(results, Tensor) else {user.args[1] for user in node.users}
    target = cast(OpOverload, node.target)
    call = _Call(target, arguments, tuple(sorted(positions)), module_of(node))
    # A part of large operands is enough, and faster. Other operators may not accept operands of other sizes.
    if call.elementwise or call.name in PRODUCTS:
        cropped = tree_map_only(Tensor, lambda x: x[tuple(slice(ENOUGH) for _ in x.shape)], arguments)
        call = call._replace(arguments=cropped)
    return call if call.operands else None


def _describe(call: _Call) -> str:
    """Describe *call* by operator, attributes, types and sizes; equal ones are compared once."""
    # All sizes above the limit count as the limit.
    limit = LARGE if call.elementwise or call.name in SIZELESS else sys.maxsize
    described = tree_map_only(
        Tensor, lambda x: (x.dtype, [min(size, limit) for size in x.shape]), call.arguments
    )
    if call.name in SIZELESS:  # all integers are sizes, such as a padding; the 5 of `x + 5` is a value
        described = tree_map_only(int, lambda number: min(number, limit), described)
    return f"{call.target} {described} {call.used}"


@torch.no_grad()
def check_operators(program: ExportedProgram, images: NDArray[np.uint8]) -> None:
    """Compare every operator of *program*, which runs on uint8 *images* (B, H, W, 3), with its ONNX form.

    An operator with the same attributes and shapes is compared once per process. Raises `LoweringError` with
    the operator, the part of the network and the values if they differ.
    """
    recorder = _Recorder(program)
    recorder.run(torch.from_numpy(images))
    if recorder.calls:
        _compare(list(recorder.calls.values()))
    _equal.update(recorder.calls)


def _compare(calls: Sequence[_Call]) -> None:
    """Compare *calls*; raise `LoweringError` for the first that ONNX Runtime cannot run or that differs."""
    # One graph contains all calls. In it, call i reads "operand i j" and returns "result i j".
    operands = [_fill(call, ORDINARY, 0) for call in calls]
    inputs = [[f"operand {i} {j}" for j in range(len(call.operands))] for i, call in enumerate(calls)]
    outputs = [[f"result {i} {j}" for j in call.used] for i, call in enumerate(calls)]
    with capturing():
        program = torch.export.export(_Calls(calls), tuple(chain(*operands))).run_decompositions({})
    model = ir.to_proto(convert(program, list(chain(*inputs)), list(chain(*outputs))))
    extractor, constants = Extractor(model), {tensor.name for tensor in model.graph.initializer}
    for i, call in enumerate(calls):
        if constants.isdisjoint(outputs[i]):  # otherwise it depends on shapes only, as `zeros_like` does
            part = extractor.extract_model(inputs[i], outputs[i]).SerializeToString()
            _compare_values(call, part, inputs[i], outputs[i])


def _compare_values(call: _Call, part: bytes, names: Sequence[str], results: Sequence[str]) -> None:
    """Compare *call* with the ONNX graph *part*; raise `LoweringError` if it differs or cannot run."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # prints fatal errors only; the others are raised
    try:
        session = ort.InferenceSession(part, options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's errors share no base class
        problem = f"ONNX Runtime cannot run its ONNX form: {first_line(error)}"
        raise LoweringError(f"{call.target}: {problem}") from error
    read = {value.name for value in session.get_inputs()}  # the ONNX form can need fewer operands
    for given in _rounds(call):
        operands = dict(zip(names, given, strict=True))
        found = session.run(results, {name: operands[name].numpy() for name in names if name in read})
        for values, expected in zip(found, call.run(given), strict=True):
            _check(call, given, torch.from_numpy(values), expected)


def _fill(call: _Call, values: Sequence[float], start: int) -> list[Tensor]:
    """Fill the operands of *call* with *values* in turn, from number *start* on; keep integers.

    The operands of an elementwise operator count like the digits of a number, so that all pairs of values
    occur: of two values, the first operand gets 0 1 0 1, the second one 0 0 1 1. Those of other operators
    begin at different values, five apart.
    """
    filled, run_length = [], 1  # so many elements in a row get the same value
    for number, operand in enumerate(call.operands):
        elements = start + np.arange(operand.numel())
        counts = elements // run_length if call.elementwise else elements + 5 * number
        positions = counts % len(values)  # which of *values* each element gets (numel,)
        if operand.dtype == torch.bool:  # True and False in turn
            content = torch.from_numpy(positions % 2 == 0).reshape(operand.shape)
        elif operand.is_floating_point():
            chosen = torch.tensor(values)[torch.from_numpy(positions)].reshape(operand.shape)
            content = torch.empty_like(operand, dtype=torch.float32).copy_(chosen)  # with the same strides
            run_length *= len(values)
        else:  # integers stay
            content = operand
        filled.append(content.clone())  # torch.export takes one tensor in two calls for one input
    return filled


def _rounds(call: _Call) -> Iterator[list[Tensor]]:
    """Yield operands of *call* with ordinary values, then with negative ones, then also with extreme ones."""
    ordinary = _fill(call, ORDINARY, 0)
    yield ordinary
    yield _fill(call, [-1 - abs(value) for value in ORDINARY], 0)
    if any(result.dtype not in (torch.float32, torch.bool) for result in call.run(ordinary)):
        return  # an integer cannot hold extreme values
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not call.elementwise:
        # The order of additions decides whether a sum overflows; one of products of these roots does not.
        roots = (tiny**0.25, -(tiny**0.25), largest**0.25, -(largest**0.25))
        yield _fill(call, (*ORDINARY, *roots), 0)
        return
    values = (*ORDINARY, tiny, -tiny, tiny / 4, -tiny / 4, largest, -largest, math.nan)
    num_pairs = len(values) ** 2  # each round has `call.size` of them, one for each element
    for number in range(min(math.ceil(num_pairs / call.size), MAX_ROUNDS)):
        yield _fill(call, values, start=number * call.size)


def _check(call: _Call, given: Sequence[Tensor], found: Tensor, expected: Tensor) -> None:
    """Raise `LoweringError` if *found* differs from *expected* by more than rounding."""
    wrong = _is_wrong(call, given, found, expected)
    if not wrong.any():
        return
    difference = "values of another shape"
    if found.shape == expected.shape:
        position = int(wrong.flatten().nonzero()[0])
        difference = f"{found.flatten()[position]:.6g} instead of {expected.flatten()[position]:.6g}"
        if call.elementwise:
            operands = (operand.expand_as(expected).flatten()[position] for operand in given)
            difference += f" for {', '.join(f'{operand:.6g}' for operand in operands)}"
    remedy = "use torch.sort(stable=True)" if call.name in SORTED else "use other operators"
    raise LoweringError(f"{call.target} in {call.part}: its ONNX form gives {difference}; {remedy}")


def _is_wrong(call: _Call, given: Sequence[Tensor], found: Tensor, expected: Tensor) -> Tensor:
    """Mark the elements of *found* that differ from *expected*; all of them if the shapes differ."""
    if found.shape != expected.shape:
        return torch.tensor(True)
    if not expected.is_floating_point():
        return found != expected
    limits = torch.finfo(expected.dtype)
    bounded = expected.clamp(limits.min, limits.max)  # ATen's `gelu` of the largest number is infinite
    magnitudes = [operand.nan_to_num(0).abs() for operand in given if operand.is_floating_point()]
    if call.elementwise:
        # Allowed: the rounding of the operands and of the 1 in exp(x) - 1, plus a share of the result.
        scale = sum(magnitudes, torch.zeros_like(expected)) + (1 if call.name in NOT_NEAR_ZERO else 0)
        allowed = ROUNDING * limits.eps * scale + TOLERANCE * bounded.abs()
        compared = ~expected.isnan()
    else:
        # A sum of products can cancel, so its error is relative to the largest product or result.
        factors = sorted(float(values.max()) for values in magnitudes if values.numel())[-2:]
        finite = expected.where(expected.isfinite(), 0).abs()
        largest = max(math.prod(factors), float(finite.max()) if finite.numel() else 0.0)
        allowed = torch.tensor(TOLERANCE * largest)
        compared = expected.isfinite()  # whether a sum overflows depends on the order of additions
    if call.name in NOT_NAN:
        compared &= ~found.isnan()
    is_close = (found - bounded).abs() <= allowed  # false for NaN
    return compared & (found != expected) & ~is_close
