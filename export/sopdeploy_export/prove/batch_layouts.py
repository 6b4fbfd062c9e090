"""Where the batch axis is in the results of an ONNX operator: one rule for each operator.

A rule raises `MixesError` unless it shows that the operator keeps images apart. `images.py`
follows the data flow of a graph with these rules.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from onnx import TensorProto

from sopdeploy_export.prove.traced_values import (
    BATCHES,
    NO_BATCH,
    BatchLayout,
    OperatorCall,
    TracedValue,
    batch_axis_of,
    require,
)


def common_layout(*layouts: BatchLayout) -> BatchLayout:
    """Return the layout of a result whose rows are computed from the same row of every operand."""
    # An operand without images fits all others, and equal rows fit any run length.
    axes = {layout.axis for layout in layouts} - {None}
    run_lengths = {layout.run_length for layout in layouts} - {None}
    require(len(axes) <= 1 and len(run_lengths) <= 1)
    return BatchLayout(axis=next(iter(axes), None), run_length=next(iter(run_lengths), None))


def common_layout_of(values: Sequence[TracedValue | None]) -> BatchLayout:
    """Return the common layout of the *values* that are not None; raise `MixesError` if there is none.

    Values are aligned at their first axes here, and at their last ones in
    `layout_after_broadcast`.
    """
    return common_layout(*(value.layout for value in values if value is not None))


def layout_after_broadcast(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that aligns its operands at their last axes, as broadcasting does."""
    return common_layout(
        *(value.layout_shifted(call.rank - value.rank) for value in call.present)
    )


def layout_after_combining(
    call: OperatorCall, axes: Sequence[int], *, keeps: bool = True
) -> BatchLayout:
    """Rule of an operator that combines elements of `x` along *axes*; the batch axis must not be among them.

    The result lacks these axes unless the operator *keeps* them. The other inputs must be without
    images.
    """
    batch_axis = call.x.batch_axis
    require(batch_axis not in axes)
    require(common_layout_of(call.inputs[1:]) == NO_BATCH)
    if keeps or batch_axis is None:
        return call.x.layout

    # Each removed axis in front of the batch axis moves this one to the left.
    removed_before = {axis for axis in axes if axis < batch_axis}
    return call.x.layout_shifted(-len(removed_before))


def layout_after_reduction(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that reduces the listed axes, by default all."""
    reduces_none = call.attributes.get("noop_with_empty_axes")
    axes = call.axes_operand(1, default=[] if reduces_none else range(call.x.rank))
    return layout_after_combining(call, axes, keeps=call.attributes.get("keepdims", 1))


def layout_after_rowwise(call: OperatorCall, num_operands: int = 1) -> BatchLayout:
    """Rule of an operator that computes each row, along the first axis, from this row of its operands.

    These are its first *num_operands* inputs. The other inputs must be without images.
    """
    layout = common_layout_of(call.inputs[:num_operands])
    require(layout.axis in (None, 0))
    require(common_layout_of(call.inputs[num_operands:]) == NO_BATCH)

    # The second output of MaxPool has positions in the whole batch.
    require(call.num_outputs == 1)

    # In training mode, batch norm subtracts the mean of all images.
    require(not call.attributes.get("training_mode"))

    # Resize can change the number of rows, or cut a region out first: then a row comes from other
    # rows of `x`.
    require([shape[:1] for shape in call.x.shapes] == [shape[:1] for shape in call.shapes])
    require(call.attributes.get("coordinate_transformation_mode") != b"tf_crop_and_resize")
    return layout


def layout_after_reshape(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that keeps the order of all elements: those of an image become rows of the result.

    For example, (batch, 3, 8) becomes (batch * 6, 4): the 24 elements of an image fill 6 rows
    of 4.
    """
    axis, run_length = call.x.layout
    new_axis = batch_axis_of(call.shapes)
    if axis is None or new_axis is None:
        require(axis == new_axis)  # neither has the batch
        return NO_BATCH

    # How many neighboring elements an image has, and how many rows of the result they fill. Here,
    # all shapes are those for the smallest batch size.
    shape = call.x.shapes[0]
    new_shape = call.shapes[0]
    batch = BATCHES[0]
    if run_length is None:  # of equal rows, any number is right
        run_length = shape[axis] // batch
    elements_of_run = run_length * math.prod(shape[axis + 1 :])
    elements_of_row = math.prod(new_shape[new_axis + 1 :]) or 1  # 0 without elements
    new_run_length, rest = divmod(elements_of_run, elements_of_row)

    # The elements of an image must fill whole rows. The new axis must hold whole batches of them:
    # several, if axes in front of the batch axis became part of it.
    require(rest == 0 and new_run_length > 0)
    require(new_shape[new_axis] // batch % new_run_length == 0)
    return BatchLayout(axis=new_axis, run_length=new_run_length)


def layout_after_transpose(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that permutes the axes."""
    if call.x.batch_axis is None:
        return NO_BATCH
    order = list(call.attributes.get("perm", reversed(range(call.x.rank))))
    return call.x.layout_at(order.index(call.x.batch_axis))


def layout_after_product(call: OperatorCall) -> BatchLayout:
    """Rule of the product of a (..., m, k) or (k,) and b (..., k, n) or (k,); k must not be the batch axis."""
    a = call.x
    b = call[1]
    require(a.batch_axis != a.rank - 1)  # its k; so if a is a vector, it has no batch axis

    # With a vector b (k,), the result (..., m) has the axes of a in front of k.
    if a.rank == 1 or b.rank == 1:
        require(b.batch_axis is None)
        return a.layout

    # The axes before the last two are broadcast, m and n stay in place.
    require(b.batch_axis != b.rank - 2)  # its k
    return layout_after_broadcast(call)


def layout_after_gemm(call: OperatorCall) -> BatchLayout:
    """Rule of a (m, k) @ b (k, n) + added, which is broadcast to (m, n); the batch axis may be m or n.

    If the attribute transA is set, a is stored as (k, m); with transB, b as (n, k).
    """
    a = call.x
    b = call[1]
    axis_of_m = 1 if call.attributes.get("transA") else 0
    axis_of_n = 0 if call.attributes.get("transB") else 1
    require(a.batch_axis in (None, axis_of_m) and b.batch_axis in (None, axis_of_n))

    # The result is (m, n); what is added is aligned at its last axis.
    layouts_of_added = (added.layout_shifted(2 - added.rank) for added in call.present[2:])
    return common_layout(a.layout_at(0), b.layout_at(1), *layouts_of_added)


def layout_after_einsum(call: OperatorCall) -> BatchLayout:
    """Rule of `einsum`: a term with the batch axis must have its label once, and so must the result."""
    equation = call.attributes["equation"].decode().replace(" ", "")
    terms, _, result = equation.partition("->")

    layouts = []
    for i, term in enumerate(terms.split(",")):
        axis = call[i].batch_axis
        if axis is not None:
            require(term.isalpha() and result.isalpha())  # an ellipsis hides labels
            require(term.count(term[axis]) == 1 and term[axis] in result)
            layouts.append(call[i].layout_at(result.index(term[axis])))
    return common_layout(*layouts)


def layout_after_concat(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that joins values; along the batch axis, it must join whole batches."""
    layout = common_layout_of(call.inputs)
    return layout_of_whole_batches(call) if layout.axis == call.axis_attribute(0) else layout


def layout_of_whole_batches(call: OperatorCall) -> BatchLayout:
    """Rule of an operator whose operands can have different numbers of rows along the batch axis.

    Each must have whole batches of runs. Operands with equal rows (run length None) can differ
    from each other, so the rows of the result need not be equal: it gets a run length.
    """
    layout = common_layout_of(call.inputs)
    if layout.axis is None:
        return layout

    run_length = layout.run_length or 1
    for value in call.present:
        require(value.batch_axis == layout.axis)  # rows of a constant would belong to no image
        require(value.shapes[0][layout.axis] % (BATCHES[0] * run_length) == 0)
    return layout._replace(run_length=run_length)


def layout_after_element_access(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that reads or writes single elements along an axis other than that of the batch.

    If the data have more rows than the indices, it accesses the first rows, which must be whole
    batches.
    """
    layout = layout_of_whole_batches(call)
    require(layout.axis != call.axis_attribute(0))
    return layout


def layout_after_slice(call: OperatorCall) -> BatchLayout:
    """Rule of a slice: along the batch axis, it must take whole batches.

    Along other axes, it must begin at the same position for every batch size. The ends need
    no rule: one that changes with the batch size either changes the shape of the result, which
    `has_whole_images` refuses, or nothing.
    """
    # The inputs are data, starts, ends, axes and steps.
    starts_by_size = [start.reshape(-1).tolist() for start in call[1].contents]
    axes = call.axes_operand(3, default=range(len(starts_by_size[0])))
    steps = [1] * len(axes)
    if len(call.inputs) > 4 and call.inputs[4]:
        steps = call[4].numbers()

    for i, axis in enumerate(axes):
        starts = [starts_of_axes[i] for starts_of_axes in starts_by_size]
        if axis == call.x.batch_axis:
            require(steps[i] == 1)
            _require_whole_batches(call, axis, starts)
        else:
            require(len(set(starts)) == 1)

    return call.x.layout


def _require_whole_batches(call: OperatorCall, axis: int, starts: Sequence[int]) -> None:
    """Raise `MixesError` unless a slice along *axis*, that of the batch, takes the same whole batches.

    For example, it may take the second batch at every batch size. *starts* has a number for each
    batch size; the shape of the result shows where the slice ends.
    """
    slices_in_batches = set()
    by_batch = zip(BATCHES, starts, call.x.shapes, call.shapes, strict=True)
    for batch, start, shape, result in by_batch:
        run_length = call.x.layout.run_length or 1  # of equal rows, any number is right
        rows_of_batch = batch * run_length
        first = start if start >= 0 else max(start + shape[axis], 0)  # counted from the end
        num_rows = result[axis]
        require(first % rows_of_batch == 0 and num_rows % rows_of_batch == 0)
        slices_in_batches.add((first // rows_of_batch, num_rows // rows_of_batch))

    require(len(slices_in_batches) == 1)


def layout_after_pad(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that pads axes other than that of the batch."""
    axes = call.axes_operand(3, range(call.x.rank))

    # The sizes in front of all axes, then those behind them.
    sizes = call[1].numbers()
    sizes_before = sizes[: len(axes)]
    sizes_after = sizes[len(axes) :]
    padded = [
        axis
        for axis, before, after in zip(axes, sizes_before, sizes_after, strict=True)
        if before or after
    ]
    return layout_after_combining(call, padded)


def layout_after_repeat(call: OperatorCall, *, tile: bool = False) -> BatchLayout:
    """Rule of an operator that repeats `x`; a constant can get a batch axis.

    A constant (1, 4) that is expanded to (batch, 4) has equal rows, which fit any image. With
    *tile*, (3, 4) becomes (batch * 3, 4): each image has a copy of the 3 rows.
    """
    axis = batch_axis_of(call.shapes)
    if axis is None or call.x.batch_axis is not None:
        return layout_after_broadcast(call)  # the result has the batch axis of `x`, or none

    # A constant got the batch axis.
    if not tile:
        return BatchLayout(axis=axis, run_length=None)  # equal rows
    rows_of_image = call.shapes[0][axis] // BATCHES[0]
    return BatchLayout(axis=axis, run_length=rows_of_image)


def layout_of_range(call: OperatorCall) -> BatchLayout:
    """Rule of a range: of constant length, or with as many numbers for each image.

    `row_numbers.py` says what these numbers are.
    """
    axis = batch_axis_of(call.shapes)
    if axis is None:
        return NO_BATCH

    # Numbers of other types than int64 are data, or indices that wrap.
    require(call.x.type == TensorProto.INT64)

    # The inputs are start, limit and step; start and step must be known.
    require(len(call[0].numbers()) == len(call[2].numbers()) == 1)
    return BatchLayout(axis=axis, run_length=call.shapes[0][axis] // BATCHES[0])


def layout_after_gather(call: OperatorCall) -> BatchLayout:
    """Rule of a selection along one axis of data, by indices.

    One of three must hold: along the batch axis, each image selects rows of its own; the data
    have no batch axis; or the indices have none, and select along another axis than that of the
    batch.
    """
    data = call.x
    indices = call[1]
    axis = call.axis_attribute(0)

    # Data (batch * 5, 7), indices (batch,): image i must take one of the rows 5 * i to 5 * i + 4.
    if data.batch_axis == axis:
        require(select_own_rows(indices, data))
        return indices.layout_shifted(axis)

    # Anywhere else, what an image selects by its number would depend on its place in the batch.
    require(not indices.has_image_numbers)

    # Data (5, 7), indices (batch, 2), axis 0: result (batch, 2, 7).
    if data.layout == NO_BATCH:
        return indices.layout_shifted(axis)

    # Data (5, batch), indices (2, 3), axis 0: result (2, 3, batch).
    require(indices.layout == NO_BATCH)
    is_behind = data.batch_axis is not None and data.batch_axis > axis
    return data.layout_shifted(indices.rank - 1 if is_behind else 0)


def layout_after_gather_nd(call: OperatorCall) -> BatchLayout:
    """Rule of a selection by positions in several axes.

    The inputs are data (*shared, *selected, *kept) and indices (*shared, *others, n); the
    result is (*shared, *others, *kept). The last axis of the indices holds a position: one
    number for each of the n selected axes. There are `batch_dims` shared axes.
    """
    data = call.x
    indices = call[1]
    num_shared = call.attributes.get("batch_dims", 0)
    axis_of_n = indices.rank - 1
    require(indices.batch_axis != axis_of_n)

    # Each image selects from its own rows: data (batch * 5, 7), pairs of row and column (batch, 2).
    if num_shared == 0 and positions_begin_with_own_rows(indices, data):
        return indices.layout
    require(not indices.has_image_numbers)

    # All images select from the same data: data (5, 7), indices (batch, 2).
    if data.batch_axis is None:
        return indices.layout

    # The batch axis is shared: data (batch, 7), indices (batch, 3, 1).
    if data.batch_axis < num_shared:
        require(data.batch_axis == indices.batch_axis)
        return common_layout_of([data, indices])

    # Else it must be a kept axis: data (7, batch), indices (3, 1), result (3, batch).
    first_kept = num_shared + indices.shapes[0][-1]
    first_kept_of_result = indices.rank - 1
    require(indices.batch_axis is None and data.batch_axis >= first_kept)
    return data.layout_shifted(first_kept_of_result - first_kept)


def layout_after_scatter_nd(call: OperatorCall) -> BatchLayout:
    """Rule of writing updates (*others, *kept) to data (*selected, *kept) at indices (*others, n)."""
    data = call.x
    indices = call[1]
    updates = call[2]

    # Each image writes to its own rows: data (batch * 5, 7), pairs of row and column (batch, 2),
    # updates (batch,).
    if indices.batch_axis is not None:
        require(positions_begin_with_own_rows(indices, data))
        require(updates.batch_axis == indices.batch_axis)
        common_layout(indices.layout, updates.layout)  # raises an error if there is none
        return data.layout._replace(run_length=data.rows_of_image)  # rows are no longer equal

    # Else the batch axis, if any, must be the same kept axis of the data and the updates: data
    # (7, batch), indices (3, 1), updates (3, batch).
    first_kept = indices.shapes[0][-1]
    first_kept_of_updates = indices.rank - 1
    layout_of_updates = updates.layout_shifted(first_kept - first_kept_of_updates)
    require(data.batch_axis is None or data.batch_axis >= first_kept)
    require(data.batch_axis == layout_of_updates.axis)
    return common_layout(data.layout, layout_of_updates)


def layout_after_one_hot(call: OperatorCall) -> BatchLayout:
    """Rule of an operator that inserts an axis of classes: axes there and behind it move to the right."""
    axis_of_classes = call.axis_attribute(-1, rank=call.rank)
    is_moved = call.x.batch_axis is not None and axis_of_classes <= call.x.batch_axis
    return call.x.layout_shifted(1 if is_moved else 0)


def select_own_rows(
    indices: TracedValue, data: TracedValue, *, only_first: bool = False
) -> bool:
    """Return whether each of *indices* selects, along the batch axis of *data*, a row of its own image.

    With *only_first*, these are the first indices along the last axis, and no others.
    """
    integers = indices.integers
    return (
        integers is not None
        and integers.only_first == only_first
        and integers.select_own(data.rows_of_image)
    )


def positions_begin_with_own_rows(indices: TracedValue, data: TracedValue) -> bool:
    """Return whether each position, along the last axis of *indices*, begins with a row of its image in *data*."""
    numbers_of_position = indices.shapes[0][-1]
    return data.batch_axis == 0 and select_own_rows(
        indices, data, only_first=numbers_of_position > 1
    )


def layouts_after_recurrence(call: OperatorCall) -> list[BatchLayout]:
    """Rule of a recurrent layer over (length, batch, features), with states (directions, batch, features)."""
    first_states = call.inputs[5:7]  # `initial_h` and `initial_c`
    shared = [*call.inputs[1:5], *call.inputs[7:]]  # `W`, `R`, `B`, `sequence_lens` and `P`
    layout = common_layout_of([call.x, *first_states])
    require(layout.axis in (None, 1) and common_layout_of(shared) == NO_BATCH)
    require(not call.attributes.get("layout"))  # layout 1 has the batch first

    # The outputs are all results (length, directions, batch, features), and the last states.
    layout_of_results = layout if layout.axis is None else layout._replace(axis=2)
    return [layout_of_results, layout, layout]


_TABLE: dict[str, Callable[[OperatorCall], BatchLayout | list[BatchLayout]]] = {
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast "
    "CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or "
    "PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan "
    "Tanh ThresholdedRelu Where Xor": layout_after_broadcast,
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare": layout_after_reduction,
    "AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool GlobalMaxPool "
    "Col2Im GroupNormalization InstanceNormalization LRN LpPool MaxPool Resize "
    "SpaceToDepth": layout_after_rowwise,
    "GridSample": partial(layout_after_rowwise, num_operands=2),
    "Flatten Reshape Squeeze Unsqueeze": layout_after_reshape,
    "LogSoftmax Softmax Hardmax LpNormalization TopK": lambda call: layout_after_combining(
        call, [call.axis_attribute(-1)]
    ),
    "ArgMax ArgMin": lambda call: layout_after_combining(
        call, [call.axis_attribute(0)], keeps=call.attributes.get("keepdims", 1)
    ),
    "LayerNormalization": lambda call: layout_after_combining(
        call, range(call.axis_attribute(-1), call.x.rank)
    ),
    "CumSum": lambda call: layout_after_combining(call, [call[1].numbers()[0] % call.x.rank]),
    "Trilu": lambda call: layout_after_combining(call, range(call.x.rank)[-2:]),
    "Det": lambda call: layout_after_combining(call, range(call.x.rank)[-2:], keeps=False),
    "DFT": lambda call: layout_after_combining(call, [call.axis_attribute(1)]),
    "OneHot": layout_after_one_hot,
    # `images.has_whole_images` checks every part
    "Split": lambda call: layout_after_combining(call, []),
    "Expand ConstantOfShape": layout_after_repeat, "Tile": partial(layout_after_repeat, tile=True),
    "Concat": layout_after_concat, "EyeLike": lambda _: NO_BATCH,
    "GatherElements ScatterElements": layout_after_element_access,
    "GatherND": layout_after_gather_nd, "ScatterND": layout_after_scatter_nd,
    "Gather": layout_after_gather, "Slice": layout_after_slice, "Range": layout_of_range,
    "Pad": layout_after_pad, "Transpose": layout_after_transpose,
    "MatMul": layout_after_product, "Gemm": layout_after_gemm, "Einsum": layout_after_einsum,
    "LSTM GRU RNN": layouts_after_recurrence,
}  # fmt: skip
RULES = {name: rule for names, rule in _TABLE.items() for name in names.split()}
