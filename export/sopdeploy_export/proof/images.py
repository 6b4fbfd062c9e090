"""Statement 7: no output of an image depends on the other images of its batch.

The proof follows the data flow in the ONNX graph. Every value has at most one batch axis, of `outer * batch *
inner` rows: row r belongs to the image `r // inner % batch`. A table has one rule for each operator, which
says where this axis is in the results. An operator to which its rule does not apply mixes images; one without
a rule may mix them. Shapes, and numbers computed from them, are evaluated for three batch sizes: every size
must be constant or a multiple of the batch, and a number that depends on the batch size is used as a size,
never as data. The number of an image in its batch selects the rows of this image, and nothing else.

The proof covers all contents of the images, also those that no probe has, and batches of at most
`_BATCHES[-1]` images. It assumes that the runtime implements the operators as ONNX defines them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

_BATCHES = (2, 999_999, 1_000_000)  # the limits of `--max-batch` above 1, and the last size but one
_MOST_NUMBERS = 1024  # of a value that is evaluated
Shapes = Sequence[tuple[int, ...]]  # one for each batch size


class Place(NamedTuple):
    """The batch axis of a value, and how many neighboring rows along it belong to one image.

    For example, (batch * 3, 4) has `axis` 0 and `inner` 3: rows 0 to 2 belong to the first image. Both are
    None for a value without the images; only `inner` is None if all rows are equal and thus fit any image.
    """

    axis: int | None = None
    inner: int | None = None


_NO_BATCH = Place()


class MixesError(Exception):
    """An operator may combine several images; every rule raises it unless the operator keeps them apart."""


def _require(keeps_apart: bool) -> None:
    """Raise `MixesError` unless *keeps_apart*."""
    if not keeps_apart:
        raise MixesError


@dataclass(frozen=True, slots=True)
class TracedValue:
    """What is known of a value; `shapes` and `contents` have one item for each size in `_BATCHES`."""

    type: int = 0  # in the numbering of ONNX
    shapes: Shapes = ()  # empty if they are unknown
    contents: Sequence[NDArray[Any]] = ()  # empty unless the value is small and depends on sizes only
    place: Place = _NO_BATCH
    # Which elements are the number of their image in the batch: none, all, or the first of the last axis.
    image_numbers: Literal["", "all", "first"] = ""
    mixed: tuple[str, ...] = ()  # the operators through which the value depends on other images

    @property
    def axis(self) -> int | None:
        """The batch axis."""
        return self.place.axis

    @property
    def has_row_per_image(self) -> bool:
        """Whether the first axis is that of the batch, with one row for each image."""
        return self.axis == 0 and self.shapes[0][0] == _BATCHES[0]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shapes[0])

    @property
    def is_size(self) -> bool:
        """Whether the contents depend on the batch size."""
        return any(not np.array_equal(content, self.contents[0]) for content in self.contents)

    def at(self, axis: int) -> Place:
        """Return the place with the batch axis, if any, moved to *axis*."""
        return _NO_BATCH if self.axis is None else Place(axis, self.place.inner)

    def shifted(self, axes: int) -> Place:
        """Return the place with the batch axis, if any, moved by *axes*, to the right if this is positive."""
        return _NO_BATCH if self.axis is None else Place(self.axis + axes, self.place.inner)

    def numbers(self) -> list[int]:
        """List the integers of a constant; raise `MixesError` if they depend on images or the batch size."""
        _require(len(self.contents) > 0 and not self.is_size)
        return [int(number) for number in self.contents[0].reshape(-1)]  # equal for every batch size


class OperatorCall:
    """What a rule reads of an operator.

    `x` is its first input, `shapes` and `rank` are those of its first result, `present` are its inputs
    without the optional ones that are absent.
    """

    def __init__(self, node: onnx.NodeProto, inputs: Sequence[TracedValue | None], shapes: Shapes) -> None:
        self.attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        self.inputs, self.shapes, self.rank = inputs, shapes, len(shapes[0])
        self.present = [value for value in inputs if value is not None]
        self.num_outputs = len([name for name in node.output if name])  # "" is one that nothing reads
        self.x = self[0]

    def __getitem__(self, index: int) -> TracedValue:
        """Return input *index*, which the rule needs; without it, images count as mixed."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise MixesError
        return value

    def axis(self, default: int, rank: int | None = None) -> int:
        """Return the attribute `axis` of a value of *rank*, by default that of `x`, counted from 0."""
        rank = self.x.rank if rank is None else rank
        return int(self.attributes.get("axis", default)) % max(rank, 1)  # a scalar has axis 0, as in torch

    def axes(self, index: int, default: Sequence[int]) -> list[int]:
        """List the axes of `x` that input *index* or the attribute names, counted from 0."""
        operand = self.inputs[index] if index < len(self.inputs) else None
        listed = self.attributes.get("axes", default) if operand is None else operand.numbers()
        return [int(axis) % max(self.x.rank, 1) for axis in listed]


def agreed_place(*places: Place) -> Place:
    """Return the place of a result whose rows are computed from the same row of every operand."""
    axes = {place.axis for place in places} - {None}  # an operand without the images (None) fits all others
    inner = {place.inner for place in places} - {None}  # equal rows (None) fit any number of rows per image
    _require(len(axes) <= 1 and len(inner) <= 1)
    return Place(axis=next(iter(axes), None), inner=next(iter(inner), None))


def place_of_unaligned(values: Sequence[TracedValue | None]) -> Place:
    """Return the place on which all *values* agree that are not None.

    Axes are counted from the first one: unlike `place_of_aligned`, this does not align the last axes. Raises
    `MixesError` if the places differ.
    """
    return agreed_place(*(value.place for value in values if value is not None))


def batch_axis_of(shapes: Shapes) -> int | None:
    """Return the axis whose size is a multiple of the batch, if any; all others must be constant."""
    axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if not axes:
        return None
    _require(len(axes) == 1)
    sizes = [shape[axes[0]] for shape in shapes]
    rows_of_image = sizes[0] // _BATCHES[0]
    _require(sizes == [rows_of_image * batch for batch in _BATCHES])
    return axes[0]


def place_of_aligned(call: OperatorCall) -> Place:
    """Rule of an operator that aligns its operands at their last axes, as broadcasting does."""
    return agreed_place(*(value.shifted(call.rank - value.rank) for value in call.present))


def place_beside(call: OperatorCall, axes: Sequence[int], *, keeps: bool = True) -> Place:
    """Rule of an operator that combines elements of `x` along *axes*, which must not be that of the batch.

    The result lacks these axes unless the operator *keeps* them. Further inputs are weights.
    """
    axis, are_weights = call.x.axis, place_of_unaligned(call.inputs[1:]) == _NO_BATCH
    _require(axis not in axes and are_weights)
    if keeps or axis is None:
        return call.x.place
    removed_before = {removed for removed in axes if removed < axis}  # each moves the batch axis to the left
    return call.x.shifted(-len(removed_before))


def place_after_reduction(call: OperatorCall) -> Place:
    """Rule of an operator that reduces the listed axes, by default all."""
    axes = call.axes(1, [] if call.attributes.get("noop_with_empty_axes") else range(call.x.rank))
    return place_beside(call, axes, keeps=call.attributes.get("keepdims", 1))


def place_of_rows(call: OperatorCall, operands: int = 1) -> Place:
    """Rule of an operator that computes each row, along the first axis, from this row of its operands.

    These are the first *operands* of its inputs; the others are weights.
    """
    place, are_weights = (
        place_of_unaligned(call.inputs[:operands]),
        place_of_unaligned(call.inputs[operands:]) == _NO_BATCH,
    )
    _require(place.axis in (None, 0) and are_weights)
    _require(call.num_outputs == 1)  # the second output of MaxPool numbers the elements of the whole batch
    _require(not call.attributes.get("training_mode"))  # in which batch norm subtracts the mean of all images
    # Resize can change the number of rows, or cut a region first, so that a row comes from other rows of `x`.
    _require([shape[:1] for shape in call.x.shapes] == [shape[:1] for shape in call.shapes])
    _require(call.attributes.get("coordinate_transformation_mode") != b"tf_crop_and_resize")
    return place


def place_after_reshape(call: OperatorCall) -> Place:
    """Rule of an operator that keeps the order of all elements: those of an image become rows of the result.

    For example, (batch, 3, 8) becomes (batch * 6, 4): the 24 elements of an image fill 6 rows of 4.
    """
    axis, inner = call.x.place
    new_axis = batch_axis_of(call.shapes)
    if axis is None or new_axis is None:
        _require(axis == new_axis)  # neither has the batch
        return _NO_BATCH
    shape, new_shape, batch = call.x.shapes[0], call.shapes[0], _BATCHES[0]  # all for the smallest batch
    rows_of_image = shape[axis] // batch if inner is None else inner  # of equal rows, any number is right
    elements_of_image = rows_of_image * math.prod(shape[axis + 1 :])
    elements_of_row = math.prod(new_shape[new_axis + 1 :]) or 1  # 1 for a value without elements
    new_inner, rest = divmod(elements_of_image, elements_of_row)
    _require(rest == 0 and new_inner > 0)  # the neighboring elements of an image fill whole rows
    _require(new_shape[new_axis] // batch % new_inner == 0)  # and whole batches of these fill the axis
    return Place(axis=new_axis, inner=new_inner)


def place_after_transpose(call: OperatorCall) -> Place:
    """Rule of an operator that permutes the axes."""
    order = list(call.attributes.get("perm", reversed(range(call.x.rank))))
    return _NO_BATCH if call.x.axis is None else call.x.at(order.index(call.x.axis))


def place_after_product(call: OperatorCall) -> Place:
    """Rule of the product of *a* (..., m, k) and *b* (..., k, n) or (k,); the batch may be any axis but k."""
    a, b = call.x, call[1]
    _require(a.axis != a.rank - 1)  # so a vector *a* has no batch axis
    if a.rank == 1 or b.rank == 1:
        _require(b.axis is None)
        return a.place  # the result (..., m) has the axes of *a* before k
    _require(b.axis != b.rank - 2)
    return place_of_aligned(call)  # the axes before the last two are broadcast, m and n stay where they are


def place_after_gemm(call: OperatorCall) -> Place:
    """Rule of *a* (m, k) @ *b* (k, n) + *added*, which is broadcast to (m, n); the batch is m or n.

    The attributes transA and transB say that *a* is stored as (k, m), and *b* as (n, k).
    """
    a, b, added = call.x, call[1], call.present[2:]
    axis_of_m = 1 if call.attributes.get("transA") else 0
    axis_of_n = 0 if call.attributes.get("transB") else 1
    _require(a.axis in (None, axis_of_m) and b.axis in (None, axis_of_n))
    return agreed_place(a.at(0), b.at(1), *(value.shifted(2 - value.rank) for value in added))


def place_after_einsum(call: OperatorCall) -> Place:
    """Rule of `einsum`: each term has the label of the batch axis once, and the result keeps it."""
    terms, _, result = call.attributes["equation"].decode().replace(" ", "").partition("->")
    places = []
    for i, term in enumerate(terms.split(",")):
        if (axis := call[i].axis) is None:
            continue
        _require(term.isalpha() and result.isalpha())  # an ellipsis hides labels
        _require(term.count(term[axis]) == 1 and term[axis] in result)
        places.append(call[i].at(result.index(term[axis])))
    return agreed_place(*places)


def place_after_concat(call: OperatorCall) -> Place:
    """Rule of an operator that joins values; along the batch axis, their rows keep their images."""
    place = place_of_unaligned(call.inputs)
    if place.axis == call.axis(0):  # then all have this axis: rows of a constant would belong to no image
        _require(all(value.axis == place.axis for value in call.present))
    return place


def place_beside_index(call: OperatorCall) -> Place:
    """Rule of an operator that reads or writes single elements along another axis than that of the batch."""
    _require(
        len({value.axis for value in call.present}) == 1
    )  # all operands have the batch axis, or none has
    place = place_of_unaligned(call.inputs)
    _require(place.axis != call.axis(0))
    return place


def place_after_slice(call: OperatorCall) -> Place:
    """Rule of a slice of other axes than the batch at constant positions, of this one at whole batches."""
    # The inputs are data, starts, ends, axes and steps; the shape of the result shows where a slice ends.
    starts = [start.reshape(-1).tolist() for start in call[1].contents]  # a list for each batch size
    axes = call.axes(3, default=range(len(starts[0])))
    steps = call[4].numbers() if len(call.inputs) > 4 and call.inputs[4] else [1] * len(axes)
    for i, axis in enumerate(axes):
        starts_of_axis = [numbers[i] for numbers in starts]  # a number for each batch size
        if axis == call.x.axis:
            _require(steps[i] == 1 and _cuts_whole_batches(call, axis, starts_of_axis))
        else:
            _require(len(set(starts_of_axis)) == 1)
    return call.x.place


def _cuts_whole_batches(call: OperatorCall, axis: int, starts: Sequence[int]) -> bool:
    """Return whether the slice from *starts* is the same whole batches, such as the second, for each size.

    *starts* and the shapes of *call* have one item for each size in `_BATCHES`.
    """
    slices_in_batches = set()
    for batch, start, shape, result in zip(_BATCHES, starts, call.x.shapes, call.shapes, strict=True):
        rows_of_batch = batch * (call.x.place.inner or 1)  # equal rows (None) can be cut between any two
        first = start if start >= 0 else max(start + shape[axis], 0)  # counted from the end
        if first % rows_of_batch or result[axis] % rows_of_batch:
            return False
        slices_in_batches.add((first // rows_of_batch, result[axis] // rows_of_batch))
    return len(slices_in_batches) == 1


def place_after_pad(call: OperatorCall) -> Place:
    """Rule of an operator that pads other axes than the batch."""
    axes, sizes = call.axes(3, range(call.x.rank)), call[1].numbers()
    pairs = zip(sizes[: len(axes)], sizes[len(axes) :], strict=True)  # in front of an axis, and behind it
    padded = [axis for axis, (before, after) in zip(axes, pairs, strict=True) if before or after]
    return place_beside(call, padded)


def place_after_repeat(call: OperatorCall, *, tile: bool = False) -> Place:
    """Rule of an operator that repeats `x`; a constant can get a batch axis.

    Expanded from (1, 4) to (batch, 4), it has equal rows, which fit any image. With *tile*, (3, 4) becomes
    (batch * 3, 4), where each image has a copy.
    """
    axis = batch_axis_of(call.shapes)
    if axis is None or call.x.axis is not None:  # the result has the batch axis of `x`, or none
        return place_of_aligned(call)
    return Place(axis=axis, inner=call.shapes[0][axis] // _BATCHES[0] if tile else None)  # None: equal rows


def place_of_range(call: OperatorCall) -> Place:
    """Rule of a range of constant length, or of 0, ..., batch - 1: the number of each image in the batch."""
    if batch_axis_of(call.shapes) is None:
        return _NO_BATCH
    start, step = call[0].numbers(), call[2].numbers()  # inputs 0 and 2; input 1 is the limit
    _require(start == [0] and step == [1] and call.shapes[0] == (_BATCHES[0],))
    return Place(axis=0, inner=1)


def place_after_gather(call: OperatorCall) -> Place:
    """Rule of a selection along another axis than the batch, from a constant table, or of the own row."""
    data, indices, axis = call.x, call[1], call.axis(0)
    if data.axis == axis:  # data (batch, 7), indices (batch,): image i must take row i
        _require(indices.image_numbers == "all" and data.shapes[0][axis] == _BATCHES[0])
        return indices.shifted(axis)
    _require(not indices.image_numbers)  # they would select a row by the position in the batch
    if data.place == _NO_BATCH:  # data (5, 7), indices (batch, 2), axis 0: result (batch, 2, 7)
        return indices.shifted(axis)
    _require(indices.place == _NO_BATCH)  # data (5, batch), indices (2, 3), axis 0: result (2, 3, batch)
    return data.shifted(indices.rank - 1 if data.axis is not None and data.axis > axis else 0)


def place_after_gather_nd(call: OperatorCall) -> Place:
    """Rule of a selection by positions in several axes.

    The inputs are data (*shared, *selected, *kept) and indices (*shared, *others, n); the result is
    (*shared, *others, *kept). The n numbers of a position are for the n selected axes.
    """
    data, indices, num_shared = call.x, call[1], call.attributes.get("batch_dims", 0)
    _require(indices.axis is None or indices.axis < indices.rank - 1)  # n is no batch axis
    if selects_own_rows(data, indices, num_shared):  # data (batch, 7), pairs of image and column (batch, 2)
        return indices.place
    _require(not indices.image_numbers)
    if data.axis is None:  # all images select from the same data (5, 7), indices (batch, 2)
        return indices.place
    if data.axis < num_shared:  # data (batch, 7), indices (batch, 3, 1), where the batch axis is shared
        _require(data.axis == indices.axis)
        return place_of_unaligned([data, indices])
    # The batch axis must be a kept one: data (7, batch), indices (3, 1), result (3, batch).
    first_kept, first_kept_of_result = num_shared + indices.shapes[0][-1], indices.rank - 1
    _require(indices.axis is None and data.axis >= first_kept)
    return data.shifted(first_kept_of_result - first_kept)


def place_after_scatter_nd(call: OperatorCall) -> Place:
    """Rule of writing updates (*others, *kept) to data (*selected, *kept) at indices (*others, n)."""
    data, indices, updates = call.x, call[1], call[2]
    if indices.axis is not None:  # data (batch, 7), pairs of image and column (batch, 2), updates (batch,)
        _require(selects_own_rows(data, indices, 0) and updates.axis == indices.axis)
        return agreed_place(data.place, indices.at(0), updates.at(0))  # `inner` must agree, too
    # The batch axis, if any, must be a kept one: data (7, batch), indices (3, 1), updates (3, batch).
    first_kept, first_kept_of_updates = indices.shapes[0][-1], indices.rank - 1
    place_of_updates = updates.shifted(first_kept - first_kept_of_updates)  # as an operand of the data's rank
    _require(data.axis == place_of_updates.axis and (data.axis is None or data.axis >= first_kept))
    return agreed_place(data.place, place_of_updates)


def place_after_one_hot(call: OperatorCall) -> Place:
    """Rule of an operator that inserts an axis of classes, which moves a batch axis there or behind it."""
    is_moved = call.x.axis is not None and call.axis(-1, rank=call.rank) <= call.x.axis
    return call.x.shifted(1 if is_moved else 0)


def selects_own_rows(data: TracedValue, indices: TracedValue, num_shared: int) -> bool:
    """Return whether each position in *indices* begins with the number of its image, a row of *data*."""
    numbers_of_position = indices.shapes[0][-1]
    begin_with_image = indices.image_numbers == ("first" if numbers_of_position > 1 else "all")
    return data.has_row_per_image and num_shared == 0 and begin_with_image


def places_after_recurrence(call: OperatorCall) -> list[Place]:
    """Rule of a recurrent layer over (length, batch, features), with states (directions, batch, features)."""
    first_states = call.inputs[5:7]  # `initial_h` and `initial_c`
    shared = [*call.inputs[1:5], *call.inputs[7:]]  # `W`, `R`, `B`, `sequence_lens` and `P`
    place = place_of_unaligned([call.x, *first_states])
    _require(place.axis in (None, 1) and place_of_unaligned(shared) == _NO_BATCH)
    _require(not call.attributes.get("layout"))  # another layout has the batch first
    # The outputs are all results (length, directions, batch, features), and the last states.
    place_in_results = place if place.axis is None else Place(axis=2, inner=place.inner)
    return [place_in_results, place, place]


TABLE: dict[str, Callable[[OperatorCall], Place | list[Place]]] = {
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast "
    "CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or "
    "PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan "
    "Tanh ThresholdedRelu Where Xor": place_of_aligned,
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare": place_after_reduction,
    "AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool GlobalMaxPool "
    "Col2Im GroupNormalization InstanceNormalization LRN LpPool MaxPool Resize SpaceToDepth": place_of_rows,
    "GridSample": partial(place_of_rows, operands=2),
    "Flatten Reshape Squeeze Unsqueeze": place_after_reshape,
    "LogSoftmax Softmax Hardmax LpNormalization TopK": lambda call: place_beside(call, [call.axis(-1)]),
    "ArgMax ArgMin": lambda call: place_beside(
        call, [call.axis(0)], keeps=call.attributes.get("keepdims", 1)
    ),
    "LayerNormalization": lambda call: place_beside(call, range(call.axis(-1), call.x.rank)),
    "CumSum": lambda call: place_beside(call, [call[1].numbers()[0] % call.x.rank]),
    "Trilu": lambda call: place_beside(call, range(call.x.rank)[-2:]),
    "Det": lambda call: place_beside(call, range(call.x.rank)[-2:], keeps=False),
    "DFT": lambda call: place_beside(call, [call.axis(1)]),
    "OneHot": place_after_one_hot,
    "Split": lambda call: place_beside(call, []),  # `has_whole_images` checks every part
    "Expand ConstantOfShape": place_after_repeat, "Tile": partial(place_after_repeat, tile=True),
    "Concat": place_after_concat, "EyeLike": lambda _: _NO_BATCH,
    "GatherElements ScatterElements": place_beside_index,
    "GatherND": place_after_gather_nd, "ScatterND": place_after_scatter_nd,
    "Gather": place_after_gather, "Slice": place_after_slice, "Range": place_of_range,
    "Pad": place_after_pad, "Transpose": place_after_transpose,
    "MatMul": place_after_product, "Gemm": place_after_gemm, "Einsum": place_after_einsum,
    "LSTM GRU RNN": places_after_recurrence,
}  # fmt: skip
_RULES = {name: rule for names, rule in TABLE.items() for name in names.split()}
_SIZES = {  # the numbers of the inputs that are sizes or positions
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (1,), "Slice": (1, 2),
    "Split": (1,), "Resize": (3,),
}  # fmt: skip
_SIZE_OPERATORS = (
    "Add", "Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Sub",
    "Unsqueeze",
)  # fmt: skip
NO_RULE = "no rule for "
SAME_NUMBERS = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
TAKES_INDICES = ("Gather", "GatherND", "ScatterND")


def find_mixing(model: onnx.ModelProto) -> tuple[str, ...]:
    """Name the operators of *model* through which its outputs depend on other images; none if proved.

    The name of an operator without a rule follows `NO_RULE`.
    """
    image, opsets = model.graph.input[0], list(model.opset_import)
    batch, *sizes = [size.dim_value for size in image.type.tensor_type.shape.dim]
    if batch == 1:  # there are no other images
        return ()
    shapes = [(batch, *sizes) for batch in _BATCHES]
    values = {image.name: TracedValue(image.type.tensor_type.elem_type, shapes, place=Place(0, 1))}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        contents = [array] * len(_BATCHES) if array.size <= _MOST_NUMBERS else ()
        values[tensor.name] = TracedValue(tensor.data_type, [array.shape] * len(_BATCHES), contents)
    for node in model.graph.node:
        values |= zip(node.output, _trace_node(node, values, opsets), strict=True)
    outputs = {output.name: values[output.name] for output in model.graph.output}
    mixing = [name for value in outputs.values() for name in value.mixed]
    for name, value in outputs.items():
        # The number of an image depends on how many images are in front of it in the batch.
        if not value.mixed and (not value.has_row_per_image or value.image_numbers):
            mixing.append(f"output {name}")
    return tuple(dict.fromkeys(mixing))  # each once


def _trace_node(node: onnx.NodeProto, values: dict[str, TracedValue], opsets: list[Any]) -> list[TracedValue]:
    """Find out what is known of the results of *node*; an operator that mixes images is named in them.

    *values* are what is known of its inputs.
    """
    inputs = [values[name] if name else None for name in node.input]
    # Shapes never depend on the contents of images.
    with_contents = [value for value in inputs if value is not None and node.op_type != "Shape"]
    mixed = tuple(dict.fromkeys(name for value in with_contents for name in value.mixed))
    results = [TracedValue()] * len(node.output)  # if the shapes cannot be inferred
    try:
        results = infer_results(node, inputs, opsets)
        are_sizes = all(len(result.contents) for result in results)  # and so no data of images
        if not mixed and not are_sizes:  # after one that mixes images, nothing is left to show
            results = locate_batch_axes(node, inputs, results)
    except Exception as error:  # no rule, or an operator that onnx does not know
        if not mixed:  # otherwise, the first problem counts
            part = next((item.value for item in node.metadata_props if item.key == "part"), "")
            operator = f"{node.op_type} in {part if part not in ('', 'network') else 'forward'}"
            mixed = (operator if isinstance(error, MixesError) else f"{NO_RULE}{operator}",)
    return [replace(result, mixed=mixed) for result in results]


def infer_results(
    node: onnx.NodeProto, inputs: Sequence[TracedValue | None], opsets: list[Any]
) -> list[TracedValue]:
    """Infer the shapes of the results of *node*, and the contents of small ones that depend on sizes only."""
    named = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
    results = _infer_shapes(node, named, opsets)
    operands_by_batch = _operands_by_batch(node, named, results[0].shapes)
    if not operands_by_batch:
        return results
    runs: list[Any] = [ReferenceEvaluator(node).run(None, operands) for operands in operands_by_batch]
    contents_by_result = [[np.asarray(array) for array in arrays] for arrays in zip(*runs, strict=True)]
    pairs = zip(results, contents_by_result, strict=True)
    results = [replace(result, contents=contents) for result, contents in pairs]
    if any(value.is_size for value in named.values()):  # `is_linear` says why three batch sizes are enough
        _require(node.op_type in _SIZE_OPERATORS and all(map(is_linear, results)))
    return results


def _infer_shapes(
    node: onnx.NodeProto, named: dict[str, TracedValue], opsets: list[Any]
) -> list[TracedValue]:
    """Infer the types and shapes of the results of *node*, whose operands are *named*.

    Raises `ValueError` if onnx infers no shape, and the errors of onnx.
    """
    version = next(opset.version for opset in opsets if opset.domain == node.domain)
    schema = defs.get_schema(node.op_type, version, node.domain)
    types_by_batch = []  # for each batch size, a dict from the name of each result to its type
    for i in range(len(_BATCHES)):
        contents = {name: numpy_helper.from_array(v.contents[i]) for name, v in named.items() if v.contents}
        types = {name: helper.make_tensor_type_proto(v.type, v.shapes[i]) for name, v in named.items()}
        types_by_batch.append(
            shape_inference.infer_node_outputs(schema, node, types, contents, opset_imports=opsets)
        )
    results = []
    for name in node.output:
        if not name:  # an optional result that the graph leaves out
            results.append(TracedValue())
            continue
        tensors = [types[name].tensor_type for types in types_by_batch]
        if not all(size.HasField("dim_value") for tensor in tensors for size in tensor.shape.dim):
            raise ValueError("onnx infers no shape")
        shapes = [tuple(size.dim_value for size in tensor.shape.dim) for tensor in tensors]
        results.append(TracedValue(tensors[0].elem_type, shapes))
    return results


def _operands_by_batch(
    node: onnx.NodeProto, named: dict[str, TracedValue], shapes: Shapes
) -> list[dict[str, NDArray[Any]]]:
    """Return the operands of *node* for each batch size; none if its results, of *shapes*, stay unknown."""
    if node.op_type == "Shape":  # reads no contents, so the operand can be an array that takes no memory
        return [{node.input[0]: np.broadcast_to(False, shape)} for shape in named[node.input[0]].shapes]
    is_small = len(set(shapes)) == 1 and math.prod(shapes[0]) <= _MOST_NUMBERS  # for every batch size
    if not is_small or not all(value.contents for value in named.values()):
        return []
    return [{name: value.contents[i] for name, value in named.items()} for i in range(len(_BATCHES))]


def is_linear(value: TracedValue) -> bool:
    """Return whether every number is a * batch + c for the three sizes of `_BATCHES`.

    If so, it has this form for all sizes between them, because it was computed with `_SIZE_OPERATORS`: a
    product of two sizes is not linear, and the rounding of a quotient is monotonic.
    """
    if not value.contents:
        return True
    if value.contents[0].dtype.kind == "b":  # a truth value, such as that of size > 100, can change anywhere
        return False
    low, middle, high = _BATCHES
    at_low, at_middle, at_high = (content.astype(object) for content in value.contents)  # cannot overflow
    # The slope (at_middle - at_low) / (middle - low) equals the next one. Without divisions:
    return bool(np.all((at_middle - at_low) * (high - middle) == (at_high - at_middle) * (middle - low)))


def locate_batch_axes(
    node: onnx.NodeProto, inputs: Sequence[TracedValue | None], results: Sequence[TracedValue]
) -> list[TracedValue]:
    """Find the batch axes of *results*; raise `MixesError` if no rule shows that images are independent."""
    sizes = _SIZES.get(node.op_type, ())
    data = [value for i, value in enumerate(inputs) if value and i not in sizes]
    _require(not any(value.is_size for value in data))  # no data is computed from the batch size
    call = OperatorCall(node, inputs, results[0].shapes)
    places = _RULES[node.op_type](call)
    if isinstance(places, Place):  # one for all results
        places = [places] * len(results)
    # The number of an image may stay such a number, or be an index that selects the row of this image.
    image_numbers = find_image_numbers(node.op_type, call)
    inputs_with_numbers = [i for i, value in enumerate(inputs) if value and value.image_numbers]
    if inputs_with_numbers:
        are_indices = node.op_type in TAKES_INDICES and inputs_with_numbers == [1]  # input 1 holds indices
        _require(image_numbers != "" or are_indices)
    pairs = zip(results, places, strict=False)  # a recurrent layer can have fewer results
    located = [replace(result, place=place, image_numbers=image_numbers) for result, place in pairs]
    _require(all(map(has_whole_images, located)))
    return located


def has_whole_images(value: TracedValue) -> bool:
    """Return whether only the batch axis of *value* changes its size, with as many rows for every image."""
    if not value.shapes:  # an optional result that the graph leaves out
        return True
    axis = batch_axis_of(value.shapes)
    if axis != value.axis:
        return False
    rows_of_batch = _BATCHES[0] * (value.place.inner or 1)  # 3 rows per image fit batch * 6, not batch * 4
    return axis is None or value.shapes[0][axis] % rows_of_batch == 0  # `batch_axis_of` covers other sizes


def find_image_numbers(kind: str, call: OperatorCall) -> Literal["", "all", "first"]:
    """Return which elements of an operator's result are the number of their image in the batch."""
    if kind == "Range":  # 0, ..., batch - 1, as `place_of_range` requires, or a range of constant length
        is_batch = batch_axis_of(call.shapes) is not None and call.x.type == TensorProto.INT64
        return "all" if is_batch else ""
    if call.x.image_numbers != "all":
        return ""
    if kind in SAME_NUMBERS:
        wraps = kind == "Cast" and call.attributes["to"] != TensorProto.INT64  # smaller types repeat numbers
        return "" if wraps else "all"
    # For `x[arange(batch), k]`, `GatherND` takes pairs of an image and its k, which `Concat` joins.
    if kind == "Concat" and not any(value.image_numbers for value in call.present[1:]):
        is_column = call.axis(0) == call.rank - 1 and call.x.shapes[0][-1] == 1
        return "first" if is_column else ""
    return ""
