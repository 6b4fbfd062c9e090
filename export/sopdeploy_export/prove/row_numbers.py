"""Which integers of an ONNX graph have the number of an image in them, and how large the others are.

Some networks read rows of all images by indices: image i, of `per_image` rows, reads row
`per_image` * i + k. Such an index selects a row of its own image if 0 <= k < `per_image`. So the
number of an image is followed through sums, products with constants and copies, together with
the bounds of what is added. Bounds come from constants, from positions along an axis (`ArgMax`,
`TopK`) and from `Clip`; nothing else is known of computed integers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from sopdeploy_export.prove.traced_values import (
    BATCHES,
    Integers,
    OperatorCall,
    TracedValue,
    batch_axis_of,
)

# Operators whose results have elements of their first input, each of the same image.
COPIES = (
    "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_LARGEST = 2**63 - 1  # of int64, the only type that is followed


def trace_integers(
    op_type: str, call: OperatorCall, results: Sequence[TracedValue]
) -> list[Integers | None]:
    """Return what is known of the integers in each of *results* of an operator, *call*."""
    traced = [_trace_result(op_type, call, position) for position in range(len(results))]

    # A sum or product that can be larger than int64 wraps; other types wrap earlier.
    return [
        integers if result.type == TensorProto.INT64 and _fits(integers) else None
        for integers, result in zip(traced, results, strict=True)
    ]


def bounds_of(contents: Sequence[NDArray[Any]]) -> Integers | None:
    """Return the bounds of a value with known *contents*, one array for each batch size.

    Returns None unless these are the same integers for every batch size, in int64.
    """
    content = contents[0]
    are_equal = all(np.array_equal(content, other) for other in contents[1:])
    if content.dtype != np.int64 or not content.size or not are_equal:
        return None
    return Integers(per_image=0, low=int(content.min()), high=int(content.max()))


def _trace_result(op_type: str, call: OperatorCall, position: int) -> Integers | None:
    """Return what is known of the integers of the result at *position*, if they do not overflow."""
    integers = call.x.integers
    others_have_numbers = any(value.has_image_numbers for value in call.present[1:])

    # Where numbers of images and bounds begin.
    if op_type == "Range":
        return _range(call)
    is_position = op_type in ("ArgMax", "ArgMin") or (op_type == "TopK" and position == 1)
    if is_position and not call.x.has_image_numbers:
        axis = call.axis_attribute(-1 if op_type == "TopK" else 0)
        return Integers(per_image=0, low=0, high=call.x.shapes[0][axis] - 1)
    has_numbers = call.x.has_image_numbers or others_have_numbers
    if op_type == "Clip" and not has_numbers and len(call.present) == 3:
        lower = call[1].integers
        upper = call[2].integers
        if lower is None or upper is None or lower.high > upper.low:
            return None  # also if the lower bound could be above the upper one
        return Integers(per_image=0, low=lower.low, high=upper.high)

    # What operators make of them.
    if integers is None or integers.only_first:
        return None
    if op_type == "Cast" or (op_type in COPIES and not others_have_numbers):
        return integers
    if op_type == "Concat":
        return _concat(call, integers)
    if op_type in ("Add", "Mul"):
        other = call[1].integers
        if other is None or other.only_first:
            return None
        return _add(integers, other) if op_type == "Add" else _multiply(integers, other)
    return None


def _fits(integers: Integers | None) -> bool:
    """Return whether *integers* are known, and in int64 for every number of an image."""
    if integers is None:
        return False
    largest = max(abs(integers.low), abs(integers.high))
    return abs(integers.per_image) * BATCHES[-1] + largest <= _LARGEST


def _range(call: OperatorCall) -> Integers | None:
    """Return what the numbers of a range are; `layout_of_range` requires a known start and step.

    In a range of batch * 3 numbers, those of image i are start + step * (3 * i + 0, 1 or 2).
    """
    axis = batch_axis_of(call.shapes)
    if axis is None:
        return None
    rows_of_image = call.shapes[0][axis] // BATCHES[0]
    (start,) = call[0].numbers()
    (step,) = call[2].numbers()
    ends = (start, start + step * (rows_of_image - 1))
    return Integers(per_image=step * rows_of_image, low=min(ends), high=max(ends))


def _add(x: Integers, y: Integers) -> Integers:
    """Return what the sums of *x* and *y* are, whose elements belong to the same image."""
    return Integers(x.per_image + y.per_image, x.low + y.low, x.high + y.high)


def _multiply(x: Integers, y: Integers) -> Integers | None:
    """Return what the products of *x* and *y* are; None unless one of them is a constant number."""
    for factors, integers in ((y, x), (x, y)):
        if factors.per_image == 0 and factors.low == factors.high:
            factor = factors.low
            ends = (factor * integers.low, factor * integers.high)
            return Integers(factor * integers.per_image, min(ends), max(ends))
    return None


def _concat(call: OperatorCall, first: Integers) -> Integers | None:
    """Return what is known of joined integers, of which *first* come first; None if nothing is.

    For `x[rows, columns]`, `GatherND` reads pairs of a row and a column. In such a pair, only
    the first integer has the number of an image in it (`only_first`).
    """
    # A column of rows, before columns without numbers of images.
    is_column = call.axis_attribute(0) == call.rank - 1 and call.x.shapes[0][-1] == 1
    others_have_numbers = any(value.has_image_numbers for value in call.present[1:])
    if call.x.has_image_numbers and is_column and not others_have_numbers:
        return first._replace(only_first=True)

    # Otherwise, `per_image` must be the same in all; the bounds are those of all offsets.
    low = first.low
    high = first.high
    for value in call.present[1:]:
        integers = value.integers
        if integers is None or integers.only_first or integers.per_image != first.per_image:
            return None
        low = min(low, integers.low)
        high = max(high, integers.high)
    return Integers(first.per_image, low, high)
