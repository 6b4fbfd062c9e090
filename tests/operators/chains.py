"""The operators of a program, and pairs of them, recorded with their arguments while the program runs."""

import hashlib
import sys
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from sopdeploy_export.program_hashes import module_of

ORDINARY = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, 45.0, -45.0, 100.0, -100.0)
# These operators, like elementwise ones, have one ONNX form for all sizes from `LARGE`.
SIZELESS = (
    "aten::convolution",
    "aten::conv2d",
    "aten::_native_batch_norm_legit_no_training",
    "aten::pad",
)
LARGE = 4
PRODUCTS = (
    "aten::linear",
    "aten::matmul",
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::baddbmm",
)
# elements along an axis, on which a product of matrices or an elementwise operator is compared
ENOUGH = 64
CONVOLUTIONS = ("aten::convolution", "aten::conv1d", "aten::conv2d")
# A sum of at most so many products of numbers below it is finite.
SMALL = torch.finfo(torch.float32).max ** (1 / 3)
CASTS = ("aten::_to_copy",)  # elementwise, but without torch's tag


class _Range(NamedTuple):
    """Which values an operand can have.

    `is_varying` if it depends on the images, else it is a weight; `is_unbounded` if it can be
    infinite or NaN; `is_undefined` if it can be NaN.
    """

    is_varying: bool
    is_unbounded: bool
    is_undefined: bool


def _name_of(target: Any) -> str:
    """Name an operator without its overload: `aten::relu` for `aten.relu.default`."""
    return str(target).replace(".", "::", 1).partition(".")[0]


class Operator(NamedTuple):
    """One operator of a program: its arguments, and the part of the network that it is in.

    `used` has the positions of the results that something reads. `ranges` has an item for each
    tensor in `operands`. `part` is the innermost module of the network.
    """

    target: OpOverload
    arguments: tuple[Any, dict[str, Any]]
    used: tuple[int, ...]
    part: str
    ranges: tuple[_Range, ...]

    @property
    def name(self) -> str:
        """The name of the operator without its overload."""
        return _name_of(self.target)

    @property
    def is_elementwise(self) -> bool:
        """Whether an element of the result depends on one element of each operand only."""
        return torch.Tag.pointwise in self.target.tags or self.name in CASTS

    @property
    def operands(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]

    def describe(self) -> str:
        """Describe the operator; operators with equal descriptions are compared once."""
        # Sizes above `LARGE` count as `LARGE`, if the operator has one ONNX form for all of them.
        limit = LARGE if self.is_elementwise or self.name in SIZELESS else sys.maxsize
        described = tree_map_only(
            Tensor, lambda x: (x.dtype, [min(size, limit) for size in x.shape]), self.arguments
        )
        if self.name in SIZELESS:  # its integers are sizes, such as a padding, and no values
            described = tree_map_only(int, lambda number: min(number, limit), described)

        ranges = [tuple(range_of_operand) for range_of_operand in self.ranges]
        return f"{self.target} {described} {self.used} {ranges}"

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Compute the used results for other *operands*, in the order of the property `operands`."""
        # `tree_map_only` visits the tensors in the order of `tree_leaves`, that of `operands`.
        remaining = iter(operands)
        args, kwargs = tree_map_only(Tensor, lambda _: next(remaining), self.arguments)

        results = self.target(*args, **kwargs)
        if isinstance(results, Tensor):
            return [results]
        return [results[position] for position in self.used]


class Chain(NamedTuple):
    """What is compared: one operator, or two of which the first one's result is the second one's operand.

    `reads_first_at` has the positions of this operand among the operands of the second operator,
    which can read it twice.
    """

    operators: tuple[Operator, ...]
    reads_first_at: frozenset[int] = frozenset()

    @property
    def last(self) -> Operator:
        """The operator whose results are compared."""
        return self.operators[-1]

    @property
    def inputs(self) -> list[tuple[Tensor, _Range]]:
        """The operands of all operators, each with its range, without the result of the first operator."""
        first = self.operators[0]
        inputs = [*zip(first.operands, first.ranges, strict=True)]

        if len(self.operators) > 1:
            second = self.last
            pairs = zip(second.operands, second.ranges, strict=True)
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
        """Return whether an operator of the chain has one of *names*."""
        return any(operator.name in names for operator in self.operators)

    def describe(self) -> str:
        """Hash the description of the operators; chains with equal descriptions are compared once."""
        described = (operator.describe() for operator in self.operators)
        text = f" -> {sorted(self.reads_first_at)} ".join(described)
        return hashlib.sha256(text.encode()).hexdigest()

    def cropped(self) -> "Chain":
        """Return the chain with at most `ENOUGH` elements along each axis of its operands.

        The chain stays as it is unless all of its operators are elementwise or products of
        matrices.
        """
        if any(
            not each.is_elementwise and each.name not in PRODUCTS for each in self.operators
        ):
            return self

        operators = []
        for operator in self.operators:
            arguments = tree_map_only(
                Tensor, lambda x: x[(slice(ENOUGH),) * x.dim()], operator.arguments
            )
            operators.append(operator._replace(arguments=arguments))
        return self._replace(operators=tuple(operators))

    def run(self, operands: Sequence[Tensor]) -> list[list[Tensor]]:
        """Compute the used results of each operator for other *operands*, in the order of `operands`."""
        remaining = iter(operands)
        first = self.operators[0]
        results = [first.run([next(remaining) for _ in first.operands])]

        # The second operator reads the first one's result and what is left of the operands.
        if len(self.operators) > 1:
            second = self.last
            operands_of_second = [
                results[0][0] if i in self.reads_first_at else next(remaining)
                for i in range(len(second.operands))
            ]
            results.append(second.run(operands_of_second))
        return results


class _Filled(fx.Interpreter):
    """Runs a program, and fills the result of every layer with weights: with *values*, repeated to its size.

    Without *values*, it replaces no result.

    Attributes:
        layouts: Maps the layers whose results were filled to tensors on `meta` with their shapes
            and strides.
    """

    def __init__(
        self,
        program: fx.GraphModule,
        values: Sequence[float] | None,
        layouts: Mapping[fx.Node, Tensor],
    ) -> None:
        """Prepare a run.

        *layouts* are those of another run of *program*, or empty. They save computation: a
        layer that multiplies and adds small numbers is not computed, since only the layout of
        its result is used. The results of other layers can be infinite or NaN, which a subclass
        notes, so they are computed before they are filled.
        """
        super().__init__(program)
        self.layouts = dict(layouts)
        self._values = None if values is None else torch.tensor(values)
        self._after_images = _nodes_after_images(self.graph)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and fill its result if it is that of a layer with weights."""
        # What reads both the images and a tensor that does not depend on them counts as a layer with
        # weights.
        operands = [node for node in n.all_input_nodes if isinstance(self.env[node], Tensor)]
        has_weights = n in self._after_images and not self._after_images.issuperset(operands)
        if self._values is None or not has_weights:
            return self.compute(n)

        # If the layout of the result is known and the result is finite, fill it without computing it.
        if n in self.layouts and _is_small_product(n, [self.env[node] for node in operands]):
            return self._filled_like(self.layouts[n])
        result = self.compute(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.layouts[n] = torch.empty_strided(
                result.shape, result.stride(), dtype=result.dtype, device="meta"
            )
        return tree_map_only(Tensor, self._filled_like, result)

    def compute(self, n: fx.Node) -> Any:
        """Run one node."""
        return super().run_node(n)

    def _filled_like(self, result: Tensor) -> Tensor:
        """Return a tensor like *result* with the values in turn; *result* itself if it is no floating-point one."""
        if self._values is None or not result.is_floating_point():
            return result
        count = result.numel()
        repeats = -(-count // len(self._values))  # rounded up
        content = self._values.repeat(repeats)[:count]
        return torch.empty_like(result, device="cpu").copy_(content.reshape(result.shape))


def _is_small_product(node: fx.Node, operands: Sequence[Tensor]) -> bool:
    """Return whether *node* adds products of its *operands*, and all are so small that its result is finite."""
    if _name_of(node.target) not in (*CONVOLUTIONS, *PRODUCTS) or node.kwargs:
        return False
    return all(
        operand.dtype == torch.float32 and float(operand.abs().max()) < SMALL
        for operand in operands
        if operand.numel()
    )


class _BoundsRun(_Filled):
    """Collects the nodes whose results are infinite or NaN in `unbounded`, and those with NaN in `undefined`.

    Runs with one value only show a division by a sum, a norm or a deviation that can be 0: it
    gives NaN, unless a constant is added to it.
    """

    def __init__(
        self,
        program: fx.GraphModule,
        values: Sequence[float],
        layouts: Mapping[fx.Node, Tensor],
    ) -> None:
        super().__init__(program, values, layouts)
        self.unbounded: set[str] = set()  # names of nodes, as the next one
        self.undefined: set[str] = set()

    def compute(self, n: fx.Node) -> Any:
        """Run one node; note it if its result is infinite or NaN."""
        result = super().compute(n)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                extremes = torch.stack(leaf.aminmax())  # both are NaN if any element is
                if not extremes.isfinite().all():
                    self.unbounded.add(n.name)
                if extremes.isnan().any():
                    self.undefined.add(n.name)
        return result


def _nodes_after_images(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of *graph* that depend on the images, its only placeholders."""
    after_images: set[fx.Node] = set()
    for node in graph.nodes:  # in topological order
        if node.op == "placeholder" or not after_images.isdisjoint(node.all_input_nodes):
            after_images.add(node)
    return after_images


class _Recorder(_Filled):
    """Runs a program and records its operators, and pairs of them, in `chains` by their descriptions.

    *bounds_runs* are runs of the program that show which nodes can be infinite or NaN; the first
    one also has the layouts of the layers. Chains whose descriptions are in *compared* are not
    recorded. *values* fill the results of layers, as in `_Filled`.
    """

    def __init__(
        self,
        program: fx.GraphModule,
        bounds_runs: Sequence[_BoundsRun],
        compared: Set[str],
        values: Sequence[float] | None,
    ) -> None:
        super().__init__(program, values, bounds_runs[0].layouts)
        self._unbounded = {name for run in bounds_runs for name in run.unbounded}
        self._undefined = {name for run in bounds_runs for name in run.undefined}
        self._compared = compared
        self.chains: dict[str, Chain] = {}
        self._by_node: dict[fx.Node, Operator] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; record its operator, and its pairs with the operators of its operands."""
        arguments: Any = self.fetch_args_kwargs_from_env(n)
        results = super().run_node(n)

        # The range of each operand. Weights count as ordinary numbers.
        nodes = [leaf for leaf in tree_leaves((n.args, n.kwargs)) if isinstance(leaf, fx.Node)]
        operands = [node for node in nodes if isinstance(self.env.get(node), Tensor)]
        ranges = []
        for node in operands:
            is_varying = node in self._after_images
            is_unbounded = is_varying and node.name in self._unbounded
            is_undefined = is_varying and node.name in self._undefined
            ranges.append(_Range(is_varying, is_unbounded, is_undefined))

        # The operator alone; None if it is not compared.
        operator = _as_operator(n, arguments, results, tuple(ranges))
        if operator is None:
            return results
        self._record(Chain((operator,)))
        if isinstance(results, Tensor):
            self._by_node[n] = operator

        # Its pair with the operator of each operand. It can read an operand at several positions, as
        # in `x * x`.
        for node in dict.fromkeys(operands):
            if node in self._by_node:
                positions = frozenset(
                    i for i, operand in enumerate(operands) if operand is node
                )
                self._record(Chain((self._by_node[node], operator), positions))

        return results

    def _record(self, chain: Chain) -> None:
        """Record *chain*, cropped, unless one with its description was compared or is recorded and not larger."""
        chain = chain.cropped()
        description = chain.describe()
        known = self.chains.get(description)
        if description not in self._compared and (known is None or chain.size < known.size):
            self.chains[description] = chain


def _as_operator(
    node: fx.Node,
    arguments: tuple[Any, dict[str, Any]],
    results: Any,
    ranges: tuple[_Range, ...],
) -> Operator | None:
    """Return the operator of *node*, which has run; *ranges* has an item for each of its operands.

    Returns None if it is not compared: if it is not of ATen, has complex numbers, has no tensors as
    operands, or nothing reads its results.
    """
    is_aten = isinstance(node.target, OpOverload) and node.target.namespace == "aten"
    has_tensors = isinstance(results, Tensor | list | tuple)
    if not (is_aten and has_tensors and node.users):
        return None

    tensors = [leaf for leaf in tree_leaves((arguments, results)) if isinstance(leaf, Tensor)]
    if any(tensor.is_complex() for tensor in tensors):
        return None

    # The results that something reads. Of several, the users of the node are `getitem` nodes,
    # whose second argument is the position of the result.
    used: set[Any] = {0}
    if not isinstance(results, Tensor):
        used = {user.args[1] for user in node.users}

    target = cast(OpOverload, node.target)
    operator = Operator(target, arguments, tuple(sorted(used)), module_of(node), ranges)
    return operator if operator.operands else None


def record_chains(
    module: fx.GraphModule, pixels: Tensor, compared: Set[str]
) -> dict[str, Chain]:
    """Run *module* on *pixels* (B, H, W, 3), and return its chains by their descriptions.

    Chains whose descriptions are in *compared* are left out. A pair comes after its two operators.
    """
    # Find the nodes whose values can be infinite or NaN although layers give ordinary ones. Some
    # code fails with some values, for example if it uses them as positions in a table.
    bounds_runs = list[_BoundsRun]()
    usable = list[Sequence[float]]()
    for values in (ORDINARY, (0.0,), (1.0,)):
        layouts = bounds_runs[0].layouts if bounds_runs else {}
        run = _BoundsRun(module, values, layouts)
        bounds_runs.append(run)
        with suppress(Exception):
            run.run(pixels)
            usable.append(values)

    # Here, too, values take the place of the results of layers: the first with which the code runs.
    recorder = _Recorder(module, bounds_runs, compared, next(iter(usable), None))
    recorder.run(pixels)
    return recorder.chains
