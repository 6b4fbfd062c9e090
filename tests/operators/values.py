"""Values on which an operator is compared with its ONNX form, and how far the results may differ."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sopdeploy.errors import LoweringError
from tests.operators.chains import ORDINARY, Chain

INF = math.inf
NAN = math.nan
TINY = torch.finfo(torch.float32).tiny  # TINY / 4 is denormal
LARGEST = torch.finfo(torch.float32).max
BEYOND_INT32 = (3e9, -3e9)
# Two values of an operand: every third element has the first value, the other elements have the
# second one.
UNIFORM = ((0, 0), (1, 1), (1, 0))
# The same, for values that can be infinite or NaN.
INFINITE = ((INF, INF), (-INF, -INF), (1, -INF), (INF, 1))
UNDEFINED = ((NAN, NAN), (NAN, 1))  # ONNX Runtime's maximum of NaN and 1 is 1, ATen's is NaN
TOLERANCE = 1e-4  # relative to the result
ROUNDING = 16  # units in the last place of the operands, for the error of elementwise operators
MAX_ROUNDS = 100  # of an operator with few elements
# ONNX Runtime computes exp(x) - 1, which cancels
NOT_NEAR_ZERO = (
    "aten::elu",
    "aten::celu",
    "aten::selu",
)
SORTED = ("aten::argsort", "aten::sort", "aten::topk")  # in no defined order of equal values
NOT_NAN = ("aten::sign",)  # 0 in ATen, NaN in ONNX Runtime
FAR = 1e18  # products of such values can overflow


def fill(chain: Chain, values: Sequence[float], start: int) -> list[Tensor]:
    """Fill the operands of *chain* with *values* in turn, from number *start* on; keep integers.

    The operands of an elementwise chain count like the digits of a number, so that all pairs of
    values occur: of two values 0 and 1, the first operand gets 0 1 0 1, the second one 0 0 1 1.
    The operands of another chain begin at different values, five apart.
    """
    filled = []
    run_length = 1  # so many elements in a row get the same value

    for number, operand in enumerate(chain.operands):
        # Which of *values* each element gets (numel,).
        elements = start + np.arange(operand.numel())
        counts = elements // run_length if chain.is_elementwise else elements + 5 * number
        positions = torch.from_numpy(counts % len(values))

        if operand.dtype == torch.bool:  # True and False in turn
            filled.append(_with_content(operand, positions % 2 == 0))
        else:
            filled.append(_with_content(operand, torch.tensor(values)[positions]))
            run_length *= len(values) if operand.is_floating_point() else 1

    return filled


def _with_content(operand: Tensor, content: Tensor) -> Tensor:
    """Copy *operand* with other *content* (numel,).

    A floating-point copy is in float32 at least. An operand of integers keeps its content, because
    these can be indices or sizes.
    """
    dtype = operand.dtype
    if operand.is_floating_point():
        dtype = torch.promote_types(dtype, torch.float32)
    elif dtype != torch.bool:
        content = operand.flatten()

    # `empty_like` has the strides of the operand.
    return torch.empty_like(operand, dtype=dtype).copy_(content.reshape(operand.shape))


def fill_in_rounds(chain: Chain) -> Iterator[list[Tensor]]:
    """Yield operands of *chain* with ordinary values, with negative ones, and with difficult ones.

    Which values are difficult depends on the chain:

    - elementwise: all pairs of extreme values, or as many as fit into `MAX_ROUNDS` rounds,
    - elementwise, and an operator gives integers: numbers beyond int32, if the first operator gives
      int64,
    - not elementwise: equal values, and fourth roots of the extreme ones.
    """
    ordinary = fill(chain, ORDINARY, 0)
    yield ordinary
    yield fill(chain, [-1 - abs(value) for value in ORDINARY], 0)

    # Not elementwise: an operator can add. Whether a sum of the largest values overflows depends on
    # the order of the additions; a sum of products of their fourth roots does not overflow.
    if not chain.is_elementwise:
        yield from _fill_uniformly(chain, ordinary)
        low = TINY**0.25
        high = LARGEST**0.25
        yield fill(chain, (*ORDINARY, low, -low, high, -high), 0)
        return

    # An operator gives integers: they cannot hold infinities and NaN, and what a conversion of
    # infinities and NaN gives is not defined.
    dtypes = [results[0].dtype for results in chain.run(ordinary)]  # one for each operator
    if any(not (dtype.is_floating_point or dtype == torch.bool) for dtype in dtypes):
        if dtypes[0] == torch.int64:
            yield fill(chain, (*ORDINARY, *BEYOND_INT32), 0)
        return

    # All pairs of extreme values.
    values = (*ORDINARY, TINY, -TINY, TINY / 4, -TINY / 4, LARGEST, -LARGEST, INF, -INF, NAN)
    num_pairs = len(values) ** 2  # each round has `chain.size` of them, one for each element
    for number in range(min(math.ceil(num_pairs / chain.size), MAX_ROUNDS)):
        yield fill(chain, values, start=number * chain.size)


def _fill_uniformly(chain: Chain, ordinary: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the *ordinary* operands, with uniform values in those that depend on the images.

    First, each of these operands gets uniform values alone, then all of them together. They get
    the values of `UNIFORM`; operands that can be infinite or NaN also get those of `INFINITE` and
    `UNDEFINED`.
    """
    # The groups of operands that get uniform values together, by position.
    ranges = [range_of_operand for _, range_of_operand in chain.inputs]
    varying = [i for i, range_of_operand in enumerate(ranges) if range_of_operand.is_varying]
    groups = [[i] for i in varying]
    if len(varying) > 1:
        groups.append(varying)

    for positions in groups:
        # The values that all operands of the group can have.
        fillings: list[tuple[float, float]] = [*UNIFORM]
        if all(ranges[i].is_unbounded for i in positions):
            fillings += INFINITE
        if all(ranges[i].is_undefined for i in positions):
            fillings += UNDEFINED

        for every_third, other_elements in fillings:
            filled = list(ordinary)
            for i in positions:
                is_third = torch.arange(ordinary[i].numel()) % 3 == 1
                content = torch.where(is_third, every_third, other_elements)
                filled[i] = _with_content(ordinary[i], content)
            yield filled


def check_result(
    chain: Chain, operands: Sequence[Tensor], result: Tensor, expected: Tensor
) -> None:
    """Raise `LoweringError` if *result* of *chain* for *operands* differs from *expected* by more than rounding."""
    is_wrong = _mark_wrong(chain, operands, result, expected)
    if not is_wrong.any():
        return

    # The first wrong value; of an elementwise chain, also the operands from which it is computed.
    difference = "values of another shape"
    if result.shape == expected.shape:
        position = int(is_wrong.flatten().nonzero()[0])
        difference = (
            f"{result.flatten()[position]:.6g} instead of {expected.flatten()[position]:.6g}"
        )
        if chain.is_elementwise:
            values = (operand.expand_as(expected).flatten()[position] for operand in operands)
            difference += f" for {', '.join(f'{value:.6g}' for value in values)}"

    # What helps depends on the values.
    remedy = "use other operators"
    if chain.is_one_of(SORTED):
        difference += ", because equal values have no defined order"
        remedy = "use torch.sort(stable=True)"
    elif not chain.is_elementwise and any(map(_has_nan, operands)):
        remedy = (
            "its operand can be NaN, as behind a division by a sum or norm that is 0: add a small number to the "
            "divisor, or use F.normalize"
        )

    target = " and ".join(str(operator.target) for operator in chain.operators)
    raise LoweringError(
        f"{target} in {chain.last.part}: its ONNX form gives {difference}; {remedy}"
    )


def _has_nan(operand: Tensor) -> bool:
    return bool(operand.isnan().any())


def _mark_wrong(
    chain: Chain, operands: Sequence[Tensor], result: Tensor, expected: Tensor
) -> Tensor:
    """Mark the elements of *result* that differ from *expected*; all of them if the shapes differ.

    Of an elementwise chain, NaN does not count if no operand can be infinite or NaN in the network.
    Of another chain, sums that overflow do not count.
    """
    if result.shape != expected.shape:
        return torch.tensor(True)
    if not expected.is_floating_point():
        return result != expected

    # Infinite results are compared as the largest number: ATen's `gelu` of this number is infinite.
    limits = torch.finfo(expected.dtype)
    bounded = expected.clamp(limits.min, limits.max)
    magnitudes = [
        operand.nan_to_num(0, 0, 0).abs() for operand in operands if operand.is_floating_point()
    ]

    # Which elements are compared, and how much they may differ.
    is_compared = torch.ones_like(expected, dtype=torch.bool)
    if chain.is_elementwise:
        allowed = _allow_elementwise(chain, magnitudes, bounded)
        if not chain.can_be_unbounded:  # NaN does not occur
            with_nan = result if chain.is_one_of(NOT_NAN) else expected
            is_compared = ~with_nan.isnan()
    else:
        largest = _largest_term(magnitudes, expected)
        allowed = torch.tensor(TOLERANCE * largest)
        if largest > FAR:  # whether a sum overflows depends on the order of additions
            is_compared = expected.isfinite()

    is_close = (result - bounded).abs() <= allowed  # false for NaN
    is_same = (result == expected) | (result.isnan() & expected.isnan())
    return is_compared & ~is_same & ~is_close


def _allow_elementwise(chain: Chain, magnitudes: Sequence[Tensor], expected: Tensor) -> Tensor:
    """Compute how much each element of the result of an elementwise *chain* may differ from *expected*.

    This is the rounding of the operands, whose absolute values are *magnitudes*, and of the 1 in
    exp(x) - 1, plus a share of the result.
    """
    scale = sum(magnitudes, torch.zeros_like(expected))
    if chain.is_one_of(NOT_NEAR_ZERO):
        scale = scale + 1
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * scale
    return rounding + TOLERANCE * expected.abs()


def _largest_term(magnitudes: Sequence[Tensor], expected: Tensor) -> float:
    """Return what the error of sums of products is relative to, because a sum can cancel.

    This is the largest product of values of two operands, whose absolute values are *magnitudes*,
    or the largest finite result in *expected*.
    """
    largest_values = sorted(float(values.max()) for values in magnitudes if values.numel())
    largest_product = math.prod(largest_values[-2:])
    finite = expected.where(expected.isfinite(), 0).abs()
    largest_result = float(finite.max()) if finite.numel() else 0.0
    return max(largest_product, largest_result)
