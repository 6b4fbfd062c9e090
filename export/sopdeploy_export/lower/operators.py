"""Compare every operator of a program with its ONNX form, on values that images hardly ever cause.

The converter writes some operators in a form that equals them for most values only: as two ONNX operators of
which the first overflows, or without one of the attributes. Each operator runs in ONNX Runtime and in ATen,
with its own shapes and attributes, on zeros of both signs, ties, large values, denormals, the largest finite
values, infinities and NaN. An operator that combines elements also gets operands without any difference:
all False, all 0, some elements among equal ones and, if its operands can be such, all infinite or all NaN.
Both compute in float32, the type of the file.

The converter and ONNX Runtime can make one operator of two, such as a cast to int32 of one to int64. Two
successive operators for which others are executed than for each of them are compared as a pair, too.
"""

import hashlib
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import onnx
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
from sopdeploy_export.capture.program import capturing
from sopdeploy_export.lower.known_operators import read_known, write_known
from sopdeploy_export.lower.to_onnx import convert
from sopdeploy_export.program_hashes import module_of
from sopdeploy_export.runs import PROVIDER

INF, NAN = math.inf, math.nan
TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # TINY / 4 is denormal
ORDINARY = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, 45.0, -45.0, 100.0, -100.0)
BEYOND_INT32 = (3e9, -3e9)
# Operands without differences, or with one: the value of every third element, and of the others.
UNIFORM = ((0, 0), (1, 1), (1, 0))
# The same, for values that can be infinite or NaN.
INFINITE = ((INF, INF), (-INF, -INF), (1, -INF), (INF, 1))
UNDEFINED = ((NAN, NAN), (NAN, 1))  # ONNX Runtime's maximum of NaN and 1 is 1, ATen's is NaN
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
CASTS = ("aten::_to_copy",)  # elementwise, but without torch's tag
OPERANDS = 400  # of the calls that are captured at once; a capture also takes a constant time
FAR = 1e18  # products of such values can overflow

# The ONNX operators of what this process, or an earlier one, has compared, by description.
_executed_operators: dict[str, Counter[str]] = {}


class _Range(NamedTuple):
    """Whether an operand depends on the images, or else is a weight; can be infinite; can be NaN."""

    is_varying: bool
    is_unbounded: bool
    is_undefined: bool


class _Operator(NamedTuple):
    """One operator of a program: its arguments, and the part of the network that calls it.

    `used` has the positions of the results that something reads, `ranges` an item for each of the `operands`.
    """

    target: OpOverload
    arguments: tuple[Any, dict[str, Any]]
    used: tuple[int, ...]
    part: str
    ranges: tuple[_Range, ...]

    @property
    def name(self) -> str:
        """The name of the operator without its overload."""
        return str(self.target).replace(".", "::", 1).partition(".")[0]

    @property
    def is_elementwise(self) -> bool:
        """Whether an element of the result depends on one element of each operand only."""
        return torch.Tag.pointwise in self.target.tags or self.name in CASTS

    @property
    def operands(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]

    def describe(self) -> str:
        """Describe the operator; those with equal descriptions are compared once."""
        # All sizes above the limit count as the limit.
        limit = LARGE if self.is_elementwise or self.name in SIZELESS else sys.maxsize
        described = tree_map_only(
            Tensor, lambda x: (x.dtype, [min(size, limit) for size in x.shape]), self.arguments
        )
        if self.name in SIZELESS:  # their integers are sizes, such as a padding, and no values
            described = tree_map_only(int, lambda number: min(number, limit), described)
        return f"{self.target} {described} {self.used} {[tuple(can_be) for can_be in self.ranges]}"

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Compute the used results for other *operands*, in the order of the property `operands`."""
        remaining = iter(operands)  # `tree_map_only` visits the tensors in the order of `tree_leaves`
        args, kwargs = tree_map_only(Tensor, lambda _: next(remaining), self.arguments)
        results = self.target(*args, **kwargs)
        return [results] if isinstance(results, Tensor) else [results[position] for position in self.used]


class _Call(NamedTuple):
    """What is compared: one operator, or two of which the first one's result is the second one's operand.

    `reads_first_at` has the positions of this operand among those of the second operator, which can read it
    twice.
    """

    operators: tuple[_Operator, ...]
    reads_first_at: frozenset[int] = frozenset()

    @property
    def last(self) -> _Operator:
        """The operator whose results are compared."""
        return self.operators[-1]

    @property
    def inputs(self) -> list[tuple[Tensor, _Range]]:
        """The operands that are not the first operator's result, each with its range."""
        first, *second = self.operators
        inputs = [*zip(first.operands, first.ranges, strict=True)]
        for operator in second:  # if there is one
            pairs = zip(operator.operands, operator.ranges, strict=True)
            inputs += [pair for i, pair in enumerate(pairs) if i not in self.reads_first_at]
        return inputs

    @property
    def operands(self) -> list[Tensor]:
        """The tensors of `inputs`."""
        return [operand for operand, _ in self.inputs]

    @property
    def size(self) -> int:
        """The number of elements of the largest operand."""
        return max(operand.numel() for operand in self.operands)

    @property
    def is_elementwise(self) -> bool:
        """Whether an element of the result depends on one element of each operand only."""
        return all(operator.is_elementwise for operator in self.operators)

    @property
    def can_be_unbounded(self) -> bool:
        """Whether an operand can be infinite or NaN."""
        return any(can_be.is_unbounded for _, can_be in self.inputs)

    def is_one_of(self, names: Sequence[str]) -> bool:
        """Return whether an operator has one of *names*."""
        return any(operator.name in names for operator in self.operators)

    def describe(self) -> str:
        """Hash the description of the operators; calls with equal descriptions are compared once."""
        described = (operator.describe() for operator in self.operators)
        text = f" -> {sorted(self.reads_first_at)} ".join(described)
        return hashlib.sha256(text.encode()).hexdigest()

    def cropped(self) -> "_Call":
        """Return the call with a part of large operands, unless an operator needs whole operands."""
        operators = []
        for operator in self.operators:
            if not operator.is_elementwise and operator.name not in PRODUCTS:
                return self
            arguments = tree_map_only(Tensor, lambda x: x[(slice(ENOUGH),) * x.dim()], operator.arguments)
            operators.append(operator._replace(arguments=arguments))
        return self._replace(operators=tuple(operators))

    def run(self, operands: Sequence[Tensor]) -> list[list[Tensor]]:
        """Compute the used results of each operator for other *operands*, in the order of `operands`."""
        remaining = iter(operands)
        first, *second = self.operators
        results = [first.run([next(remaining) for _ in first.operands])]
        for operator in second:  # if there is one
            positions = range(len(operator.operands))
            read = [results[0][0] if i in self.reads_first_at else next(remaining) for i in positions]
            results.append(operator.run(read))
        return results


class _Calls(nn.Module):
    """Runs *calls* one by one, each on its own operands."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *operands: Tensor) -> list[Tensor]:
        """Compute the results of the last operator of each call."""
        remaining = iter(operands)
        results = []
        for call in self.calls:
            *_, compared = call.run([next(remaining) for _ in call.operands])
            results += compared
        return results


class _Bounds(fx.Interpreter):
    """Runs a program and collects the values that can be infinite or NaN, in `unbounded`; NaN in `undefined`.

    The result of every layer with weights is replaced by *values* in turn. If they are equal, a division by a
    sum, a norm or a deviation gives NaN, unless a constant is added to it.
    """

    def __init__(self, program: fx.GraphModule, values: Sequence[float]) -> None:
        super().__init__(program)
        self.unbounded: set[str] = set()  # names of nodes, as the next one
        self.undefined: set[str] = set()
        self._values = torch.tensor(values)
        self._after_images = _nodes_after_images(self.graph)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and replace its result if it is that of a layer with weights.

        The node is noted in `unbounded` if its result is infinite or NaN, in `undefined` if it is NaN.
        """
        result = super().run_node(n)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                extremes = torch.stack(leaf.aminmax())  # both are NaN if any element is
                if not extremes.isfinite().all():
                    self.unbounded.add(n.name)
                if extremes.isnan().any():
                    self.undefined.add(n.name)
        operands = [node for node in n.all_input_nodes if isinstance(self.env[node], Tensor)]
        # It reads the images, and a tensor that does not depend on them.
        has_weights = n in self._after_images and not self._after_images.issuperset(operands)
        return tree_map_only(Tensor, self._filled_like, result) if has_weights else result

    def _filled_like(self, result: Tensor) -> Tensor:
        """Return a copy of a floating-point *result* with the values in turn; another one as it is."""
        if not result.is_floating_point():
            return result
        content = self._values.repeat(-(-result.numel() // len(self._values)))[: result.numel()]
        return torch.empty_like(result).copy_(content.reshape(result.shape))


def _nodes_after_images(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of *graph* that depend on the images, its only placeholders."""
    after_images: set[fx.Node] = set()
    for node in graph.nodes:  # in topological order
        if node.op == "placeholder" or not after_images.isdisjoint(node.all_input_nodes):
            after_images.add(node)
    return after_images


class _Recorder(fx.Interpreter):
    """Runs a program and records its operators, and pairs of them, in `calls` by their descriptions.

    *unbounded* names the nodes whose values can be infinite or NaN, *undefined* those that can be NaN.
    """

    def __init__(self, program: fx.GraphModule, unbounded: Set[str], undefined: Set[str]) -> None:
        super().__init__(program)
        self._unbounded, self._undefined = unbounded, undefined
        self.calls: dict[str, _Call] = {}
        self._by_node: dict[fx.Node, _Operator] = {}
        self._after_images = _nodes_after_images(self.graph)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; record its operator, and its pairs with the operators of its operands."""
        arguments: Any = self.fetch_args_kwargs_from_env(n)
        results = super().run_node(n)
        nodes = [leaf for leaf in tree_leaves((n.args, n.kwargs)) if isinstance(leaf, fx.Node)]
        operands = [node for node in nodes if isinstance(self.env.get(node), Tensor)]
        ranges = []
        for node in operands:
            is_varying = node in self._after_images
            can_be_unbounded = is_varying and node.name in self._unbounded
            ranges.append(_Range(is_varying, can_be_unbounded, is_varying and node.name in self._undefined))
        operator = _as_operator(n, arguments, results, tuple(ranges))
        if operator is None:
            return results
        self._record(_Call((operator,)))
        if isinstance(results, Tensor):
            self._by_node[n] = operator
        for node in dict.fromkeys(operands):
            if node in self._by_node:
                positions = frozenset(i for i, operand in enumerate(operands) if operand is node)
                self._record(_Call((self._by_node[node], operator), positions))
        return results

    def _record(self, call: _Call) -> None:
        """Record *call* with small operands, unless one with its description is smaller or was compared."""
        call = call.cropped()
        description = call.describe()
        known = self.calls.get(description)
        if description not in _executed_operators and (known is None or call.size < known.size):
            self.calls[description] = call


def _as_operator(
    node: fx.Node, arguments: tuple[Any, dict[str, Any]], results: Any, ranges: tuple[_Range, ...]
) -> _Operator | None:
    """Return the operator of *node*; None if it has no operands or no results that can be compared."""
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
    operator = _Operator(target, arguments, tuple(sorted(positions)), module_of(node), ranges)
    return operator if operator.operands else None


@torch.no_grad()
def check_operators(
    program: ExportedProgram, images: NDArray[np.uint8], on_group: Callable[[str], None] = lambda _: None
) -> None:
    """Compare every operator of *program*, which runs on uint8 *images* (B, H, W, 3), with its ONNX form.

    Calls *on_group* with a text as each group of operators begins. An operator with the same attributes and
    shapes is compared once, also by other exports. Raises `LoweringError` with the operator, the part of the
    network and the values if they differ.
    """
    _executed_operators.update(read_known())
    pixels, module = torch.from_numpy(images), program.module(check_guards=False)
    # Find the nodes whose values can be infinite or NaN although layers give ordinary ones.
    unbounded, undefined = set[str](), set[str]()
    for values in (ORDINARY, (0.0,), (1.0,)):
        bounds = _Bounds(module, values)
        with suppress(Exception):  # of code that cannot use them all, for example as positions in a table
            bounds.run(pixels)
        unbounded |= bounds.unbounded
        undefined |= bounds.undefined
    recorder = _Recorder(module, unbounded, undefined)
    recorder.run(pixels)
    last = next(reversed(recorder.calls), None)
    # Compare groups, because the time of a capture grows with the square of its number of operands.
    group, num_operands, done = dict[str, _Call](), 0, 0
    for description, call in recorder.calls.items():  # a pair comes after its operators
        group[description] = call
        num_operands += len(call.operands)
        if num_operands >= OPERANDS or description == last:
            on_group(f"{done} of {len(recorder.calls)} done")
            _compare_group(group)
            group, num_operands, done = {}, 0, done + len(group)
    if recorder.calls:
        write_known(_executed_operators)


class _CapturedCall(NamedTuple):
    """A call in the graph of a group, and the names that its operands and results have there."""

    description: str
    call: _Call
    operand_names: list[str]
    result_names: list[str]


def _compare_group(calls: Mapping[str, _Call]) -> None:
    """Compare *calls*, and note in `_executed_operators` that this is done.

    Raises `LoweringError` for the first call that ONNX Runtime cannot run or that differs. A pair is compared
    only if ONNX Runtime executes other operators for it than for its two operators.
    """
    captured = []
    for i, (description, call) in enumerate(calls.items()):
        operand_names = [f"operand {i} {j}" for j in range(len(call.operands))]
        result_names = [f"result {i} {j}" for j in call.last.used]
        captured.append(_CapturedCall(description, call, operand_names, result_names))
    operands = tuple(chain.from_iterable(_fill(call, ORDINARY, 0) for call in calls.values()))
    with capturing():
        program = torch.export.export(_Calls([*calls.values()]), operands)  # one graph for all
    inputs = [name for each in captured for name in each.operand_names]
    outputs = [name for each in captured for name in each.result_names]
    model = ir.to_proto(convert(program, inputs, outputs))
    extractor = Extractor(model)
    singles = [single for single in captured if len(single.call.operators) == 1]
    pairs = [pair for pair in captured if len(pair.call.operators) == 2]
    for single in singles:  # before the whole graph: an error names the operator that cannot run
        _compare_values(single, extractor)
    producers = _executed_producers(model)
    executed = {each.description: _count_operators(producers, each.result_names) for each in captured}
    known = {**_executed_operators, **executed}  # an operator of a pair can be in an earlier group
    for pair in pairs:
        first, second = (_Call((operator,)).cropped().describe() for operator in pair.call.operators)
        if known[pair.description] != known[first] + known[second]:
            _compare_values(pair, extractor)
    _executed_operators.update(executed)  # not before a comparison, which can raise an error


def _executed_producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Map each value to the operator that ONNX Runtime, which optimizes *model*, computes it with."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
        optimized = onnx.load(options.optimized_model_filepath)
    return {name: node for node in optimized.graph.node for name in node.output}


def _count_operators(producers: Mapping[str, onnx.NodeProto], results: Sequence[str]) -> Counter[str]:
    """Count the operators that *results* depend on, by type; a copy (`Identity`) does not count."""
    operators: Counter[str] = Counter()
    unread, seen = list(results), set[str]()
    while unread:
        name = unread.pop()
        if name in seen or name not in producers:  # inputs and constants have no producer
            continue
        node = producers[name]
        seen.update(node.output)
        unread += node.input
        if node.op_type != "Identity":
            operators[node.op_type] += 1
    return operators


def _compare_values(captured: _CapturedCall, extractor: Extractor) -> None:
    """Run a call and its ONNX form, a part of the graph of *extractor*, on many values.

    Raises `LoweringError` if the form cannot run or gives other results.
    """
    call = captured.call
    constants = {tensor.name for tensor in extractor.graph.initializer}
    if not constants.isdisjoint(captured.result_names):  # it depends on shapes only, as `zeros_like` does
        return
    graph = extractor.extract_model(captured.operand_names, captured.result_names).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # prints fatal errors only; the others are raised
    try:
        session = ort.InferenceSession(graph, options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's errors share no base class
        problem = f"ONNX Runtime cannot run its ONNX form: {first_line(error)}"
        raise LoweringError(f"{call.last.target}: {problem}") from error
    needed_names = {value.name for value in session.get_inputs()}  # the ONNX form can need fewer operands
    for operands in _fill_in_rounds(call):
        named = zip(captured.operand_names, operands, strict=True)
        feed = {name: operand.numpy() for name, operand in named if name in needed_names}
        *_, compared = call.run(operands)  # the results of the last operator
        for result, expected in zip(session.run(captured.result_names, feed), compared, strict=True):
            _check_result(call, operands, torch.from_numpy(result), expected)


def _fill(call: _Call, values: Sequence[float], start: int) -> list[Tensor]:
    """Fill the operands of *call* with *values* in turn, from number *start* on; keep integers.

    The operands of an elementwise operator count like the digits of a number, so that all pairs of values
    occur: of two values, the first operand gets 0 1 0 1, the second one 0 0 1 1. Those of other operators
    begin at different values, five apart.
    """
    filled, run_length = [], 1  # so many elements in a row get the same value
    for number, operand in enumerate(call.operands):
        elements = start + np.arange(operand.numel())
        counts = elements // run_length if call.is_elementwise else elements + 5 * number
        positions = torch.from_numpy(counts % len(values))  # which of *values* each element gets (numel,)
        if operand.dtype == torch.bool:  # True and False in turn
            filled.append(_with_content(operand, positions % 2 == 0))
        else:
            filled.append(_with_content(operand, torch.tensor(values)[positions]))
            run_length *= len(values) if operand.is_floating_point() else 1
    return filled


def _with_content(operand: Tensor, content: Tensor) -> Tensor:
    """Copy *operand* with other *content* (numel,), as float32 if it is floating; integers stay."""
    if not operand.is_floating_point() and operand.dtype != torch.bool:
        content = operand.flatten()
    dtype = torch.float32 if operand.is_floating_point() else operand.dtype
    return torch.empty_like(operand, dtype=dtype).copy_(content.reshape(operand.shape))  # with its strides


def _fill_in_rounds(call: _Call) -> Iterator[list[Tensor]]:
    """Yield operands of *call* with ordinary values, with negative ones, and with difficult ones.

    Difficult for an elementwise call are all pairs of extreme values or, if it gives integers, numbers beyond
    int32; for another one, equal values, and large and small ones.
    """
    ordinary = _fill(call, ORDINARY, 0)
    yield ordinary
    yield _fill(call, [-1 - abs(value) for value in ORDINARY], 0)
    if not call.is_elementwise:
        yield from _fill_uniformly(call, ordinary)
        # The order of additions decides whether a sum overflows; one of products of these roots does not.
        low, high = TINY**0.25, LARGEST**0.25
        yield _fill(call, (*ORDINARY, low, -low, high, -high), 0)
        return
    dtypes = [results[0].dtype for results in call.run(ordinary)]  # of the first result of each operator
    if any(dtype not in (torch.float32, torch.bool) for dtype in dtypes):
        # An integer cannot hold infinities and NaN, and what their conversion gives is not defined.
        if dtypes[0] == torch.int64:
            yield _fill(call, (*ORDINARY, *BEYOND_INT32), 0)
        return
    values = (*ORDINARY, TINY, -TINY, TINY / 4, -TINY / 4, LARGEST, -LARGEST, INF, -INF, NAN)
    num_pairs = len(values) ** 2  # each round has `call.size` of them, one for each element
    for number in range(min(math.ceil(num_pairs / call.size), MAX_ROUNDS)):
        yield _fill(call, values, start=number * call.size)


def _fill_uniformly(call: _Call, ordinary: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the *ordinary* operands again and again, each time with uniform values in other ones.

    First in each operand alone that depends on the images, then in all of these. `UNIFORM` has the values,
    `INFINITE` and `UNDEFINED` further ones for operands that can be infinite or NaN.
    """
    ranges = [can_be for _, can_be in call.inputs]
    varying = [i for i, can_be in enumerate(ranges) if can_be.is_varying]
    choices = [[i] for i in varying]
    if len(varying) > 1:
        choices.append(varying)
    for chosen in choices:
        fillings: list[tuple[float, float]] = [*UNIFORM]
        if all(ranges[i].is_unbounded for i in chosen):
            fillings += INFINITE
        if all(ranges[i].is_undefined for i in chosen):
            fillings += UNDEFINED
        for every_third, others in fillings:
            filled = list(ordinary)
            for i in chosen:
                is_third = torch.arange(ordinary[i].numel()) % 3 == 1
                filled[i] = _with_content(ordinary[i], torch.where(is_third, every_third, others))
            yield filled


def _check_result(call: _Call, operands: Sequence[Tensor], found: Tensor, expected: Tensor) -> None:
    """Raise `LoweringError` if *found*, for *operands*, differs from *expected* by more than rounding."""
    wrong = _mark_wrong(call, operands, found, expected)
    if not wrong.any():
        return
    difference = "values of another shape"
    if found.shape == expected.shape:
        position = int(wrong.flatten().nonzero()[0])
        difference = f"{found.flatten()[position]:.6g} instead of {expected.flatten()[position]:.6g}"
        if call.is_elementwise:
            values = (operand.expand_as(expected).flatten()[position] for operand in operands)
            difference += f" for {', '.join(f'{value:.6g}' for value in values)}"
    remedy = "use torch.sort(stable=True)" if call.is_one_of(SORTED) else "use other operators"
    target = " and ".join(str(operator.target) for operator in call.operators)
    raise LoweringError(f"{target} in {call.last.part}: its ONNX form gives {difference}; {remedy}")


def _mark_wrong(call: _Call, operands: Sequence[Tensor], found: Tensor, expected: Tensor) -> Tensor:
    """Mark the elements of *found* that differ from *expected*; all of them if the shapes differ.

    What does not occur in the network, such as NaN of bounded operands, and overflowing sums do not count.
    """
    if found.shape != expected.shape:
        return torch.tensor(True)
    if not expected.is_floating_point():
        return found != expected
    limits = torch.finfo(expected.dtype)
    bounded = expected.clamp(limits.min, limits.max)  # ATen's `gelu` of the largest number is infinite
    magnitudes = [operand.nan_to_num(0, 0, 0).abs() for operand in operands if operand.is_floating_point()]
    compared = torch.ones_like(expected, dtype=torch.bool)
    if call.is_elementwise:
        if not call.can_be_unbounded:  # NaN does not occur
            compared = ~found.isnan() if call.is_one_of(NOT_NAN) else ~expected.isnan()
        # Allowed: the rounding of the operands and of the 1 in exp(x) - 1, plus a share of the result.
        scale = sum(magnitudes, torch.zeros_like(expected))
        if call.is_one_of(NOT_NEAR_ZERO):
            scale = scale + 1
        allowed = ROUNDING * limits.eps * scale + TOLERANCE * bounded.abs()
    else:
        # A sum of products can cancel, so its error is relative to the largest product or result.
        factors = sorted(float(values.max()) for values in magnitudes if values.numel())[-2:]
        finite = expected.where(expected.isfinite(), 0).abs()
        largest = max(math.prod(factors), float(finite.max()) if finite.numel() else 0.0)
        allowed = torch.tensor(TOLERANCE * largest)
        if largest > FAR:  # whether a sum overflows depends on the order of additions
            compared &= expected.isfinite()
    is_close = (found - bounded).abs() <= allowed  # false for NaN
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    return compared & ~is_same & ~is_close
