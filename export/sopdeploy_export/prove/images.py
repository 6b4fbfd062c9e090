"""Images: no output of an image depends on the other images of its batch.

The proof follows the data flow in the ONNX graph. Every value has at most one batch axis, of
`outer * batch * run_length` rows: row r belongs to the image `r // run_length % batch`. The
rules of `batch_layouts.py` say where this axis is in the results of each operator. An operator
to which its rule does not apply mixes images; one without a rule may mix them. Shapes, and
numbers computed from them, are evaluated for three batch sizes: every size must be constant or
a multiple of the batch, and a number that depends on the batch size is used as a size, never as
data. The number of an image in its batch selects rows of this image, and nothing else:
`row_numbers.py` follows it, and bounds what is added to it.

The proof covers all contents of the images, also those that no probe has, and batches of at
most `BATCHES[-1]` images. It assumes that the runtime implements the operators as ONNX defines
them.

Refused: operators that combine rows of several images (`tests/export/prove/test_proof.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from sopdeploy.errors import LoweringError
from sopdeploy_export.prove.batch_layouts import RULES
from sopdeploy_export.prove.row_numbers import bounds_of, trace_integers
from sopdeploy_export.prove.traced_values import (
    BATCHES,
    BatchLayout,
    MixesError,
    OperatorCall,
    Shapes,
    TracedValue,
    batch_axis_of,
    require,
)

STATEMENT = (
    "No output depends on other images of the batch. Otherwise the export names the operators."
)

# Their input 1 may have the numbers of images.
_TAKES_INDICES = ("Gather", "GatherND", "ScatterND")
_MOST_NUMBERS = 1024  # in a value whose contents are computed
# By operator: the numbers of the inputs that hold sizes, or positions along an axis.
_SIZES = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (1,), "Slice": (1, 2),
    "Split": (1,), "Resize": (3,),
}  # fmt: skip
# Operators that may compute sizes from the batch size, see `is_linear`.
_SIZE_OPERATORS = (
    "Add", "Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Sub",
    "Unsqueeze",
)  # fmt: skip
NO_RULE = "no rule for "


def find_mixing(model: onnx.ModelProto) -> tuple[str, ...]:
    """Name the operators of *model* through which its outputs depend on other images; none if proved.

    In front of the name of an operator without a rule stands `NO_RULE`.
    """
    # What is known of the images: a row for each, along the first axis.
    images = model.graph.input[0]
    batch, *sizes = [size.dim_value for size in images.type.tensor_type.shape.dim]
    if batch == 1:  # there are no other images
        return ()
    images_type = images.type.tensor_type.elem_type
    shapes = [(batch, *sizes) for batch in BATCHES]
    values = {images.name: TracedValue(images_type, shapes, layout=BatchLayout(0, 1))}

    # What is known of the weights: the same for every batch size.
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        contents = [array] * len(BATCHES) if array.size <= _MOST_NUMBERS else ()
        shapes = [array.shape] * len(BATCHES)
        integers = bounds_of([array])
        values[tensor.name] = TracedValue(tensor.data_type, shapes, contents, integers=integers)

    # Follow the data through the graph, whose nodes are in topological order.
    opsets = list(model.opset_import)
    for node in model.graph.node:
        values |= zip(node.output, _trace_node(node, values, opsets), strict=True)

    # The operators behind the outputs that mix images. An output also needs a row for each image,
    # and must not contain the number of an image in the batch, which depends on other images.
    outputs = {output.name: values[output.name] for output in model.graph.output}
    mixing = [name for value in outputs.values() for name in value.mixed]
    for name, value in outputs.items():
        is_of_image = value.has_row_per_image and not value.has_image_numbers
        if not value.mixed and not is_of_image:
            mixing.append(f"output {name}")

    return tuple(dict.fromkeys(mixing))  # each once


def _trace_node(
    node: onnx.NodeProto, values: dict[str, TracedValue], opsets: list[Any]
) -> list[TracedValue]:
    """Find out what is known of the results of *node*, from what is known of its inputs, *values* by name.

    If the operator mixes images, the results name it in `mixed`. Behind such an operator, only
    its name is handed on, because nothing is left to show.
    """
    # The operators in front that mix images. Shapes never depend on the contents of images.
    inputs = [values[name] if name else None for name in node.input]
    mixed: tuple[str, ...] = ()
    if node.op_type != "Shape":
        names = [name for value in inputs if value is not None for name in value.mixed]
        mixed = tuple(dict.fromkeys(names))

    # Results with known contents do not depend on images, so they have no batch axis.
    results = [TracedValue()] * len(node.output)  # if the shapes cannot be inferred
    try:
        results = infer_results(node, inputs, opsets)
        are_sizes = all(len(result.contents) for result in results)
        if not mixed and not are_sizes:
            results = locate_batch_axes(node, inputs, results)
    except Exception as error:  # no rule, or an operator that onnx does not know
        if not mixed:
            part = next(
                (item.value for item in node.metadata_props if item.key == "part"), "forward"
            )
            operator = f"{node.op_type} in {part}"
            mixed = (operator if isinstance(error, MixesError) else f"{NO_RULE}{operator}",)

    return [replace(result, mixed=mixed) for result in results]


def infer_results(
    node: onnx.NodeProto, inputs: Sequence[TracedValue | None], opsets: list[Any]
) -> list[TracedValue]:
    """Infer the shapes of the results of *node*, and the contents of small ones.

    Contents are known if they depend on sizes and constants only. Raises `MixesError` if they
    are not linear in the batch size.
    """
    values_by_name = {
        name: value for name, value in zip(node.input, inputs, strict=True) if value is not None
    }
    results = _infer_shapes(node, values_by_name, opsets)
    operands_by_batch = _known_operands(node, values_by_name, results[0].shapes)
    if operands_by_batch is None:
        return results

    # Compute all results for each batch size; then the contents of each result.
    runs: list[Any] = [
        ReferenceEvaluator(node).run(None, operands) for operands in operands_by_batch
    ]
    computed = []
    for position, result in enumerate(results):
        contents = [np.asarray(results_of_run[position]) for results_of_run in runs]
        computed.append(replace(result, contents=contents, integers=bounds_of(contents)))

    # Contents that depend on the batch size must be linear in it: then three batch sizes show them
    # for all (`is_linear`).
    if any(value.depends_on_batch_size for value in values_by_name.values()):
        require(node.op_type in _SIZE_OPERATORS and all(map(is_linear, computed)))
    return computed


def _known_operands(
    node: onnx.NodeProto, values_by_name: dict[str, TracedValue], shapes: Shapes
) -> list[dict[str, NDArray[Any]]] | None:
    """Return the operands of *node* by name, for each batch size, with which its results can be computed.

    Returns None if the contents of an operand in *values_by_name* are not known, or if the first
    result, with *shapes*, is large or has another shape for another batch size.
    """
    # `Shape` reads no contents, so its operand can be an array that takes no memory.
    if node.op_type == "Shape":
        name = node.input[0]
        return [{name: np.broadcast_to(False, shape)} for shape in values_by_name[name].shapes]

    # One shape for all batch sizes; a result that the graph leaves out has none.
    is_small = len(set(shapes)) == 1 and math.prod(shapes[0]) <= _MOST_NUMBERS
    if not is_small or not all(value.contents for value in values_by_name.values()):
        return None
    return [
        {name: value.contents[i] for name, value in values_by_name.items()}
        for i in range(len(BATCHES))
    ]


def _infer_shapes(
    node: onnx.NodeProto, values_by_name: dict[str, TracedValue], opsets: list[Any]
) -> list[TracedValue]:
    """Infer the types and shapes of the results of *node*, whose operands are *values_by_name*.

    Raises `ValueError` if onnx infers no shape, and the errors of onnx.
    """
    version = next(opset.version for opset in opsets if opset.domain == node.domain)
    schema = defs.get_schema(node.op_type, version, node.domain)

    # The types of the results by name, for each batch size.
    types_by_batch = []
    for i in range(len(BATCHES)):
        contents = {
            name: numpy_helper.from_array(value.contents[i])
            for name, value in values_by_name.items()
            if value.contents
        }
        types = {
            name: helper.make_tensor_type_proto(value.type, value.shapes[i])
            for name, value in values_by_name.items()
        }
        types_by_batch.append(
            shape_inference.infer_node_outputs(
                schema, node, types, contents, opset_imports=opsets
            )
        )

    # The shapes of each result.
    results = []
    for name in node.output:
        if not name:  # an optional result that the graph leaves out
            results.append(TracedValue())
            continue

        tensors = [types[name].tensor_type for types in types_by_batch]
        sizes = [size for tensor in tensors for size in tensor.shape.dim]
        if not all(size.HasField("dim_value") for size in sizes):
            raise ValueError("onnx infers no shape")
        shapes = [tuple(size.dim_value for size in tensor.shape.dim) for tensor in tensors]
        results.append(TracedValue(tensors[0].elem_type, shapes))

    return results


def is_linear(value: TracedValue) -> bool:
    """Return whether every number is a * batch + c for the three sizes of `BATCHES`.

    If so, it has this form for all sizes between them, because it was computed with
    `_SIZE_OPERATORS`: a product of two sizes is not linear, and the rounding of a quotient is
    monotonic.
    """
    if not value.contents:
        return True
    if value.contents[0].dtype.kind == "b":
        return False  # a truth value, such as that of size > 100, can change anywhere

    # Python's numbers cannot overflow.
    low, middle, high = BATCHES
    at_low, at_middle, at_high = (content.astype(object) for content in value.contents)

    # The slope (at_middle - at_low) / (middle - low) equals the next one. Without divisions:
    return bool(
        np.all((at_middle - at_low) * (high - middle) == (at_high - at_middle) * (middle - low))
    )


def locate_batch_axes(
    node: onnx.NodeProto, inputs: Sequence[TracedValue | None], results: Sequence[TracedValue]
) -> list[TracedValue]:
    """Find the batch axes of *results*, those of *node*.

    Raises `MixesError` if the rule of the operator does not show that images are independent,
    and `KeyError` if the operator has no rule.
    """
    # A number that depends on the batch size may be used as a size, but not as data.
    positions_of_sizes = _SIZES.get(node.op_type, ())
    data = [value for i, value in enumerate(inputs) if value and i not in positions_of_sizes]
    require(not any(value.depends_on_batch_size for value in data))

    # The rule of the operator, with one layout for all results, or one for each.
    call = OperatorCall(node, inputs, results[0].shapes)
    layouts = RULES[node.op_type](call)
    if isinstance(layouts, BatchLayout):
        layouts = [layouts] * len(results)

    # An input may have numbers of images in two cases: the results have them, too, or input 1 uses
    # them as indices, which then select rows of the same image.
    integers = trace_integers(node.op_type, call, results)
    inputs_with_numbers = [
        i for i, value in enumerate(inputs) if value and value.has_image_numbers
    ]
    if inputs_with_numbers:
        are_indices = node.op_type in _TAKES_INDICES and inputs_with_numbers == [1]
        require(are_indices or None not in integers)

    # A recurrent layer can have fewer results than layouts.
    located = [
        replace(result, layout=layout, integers=integers_of_result)
        for result, layout, integers_of_result in zip(results, layouts, integers, strict=False)
    ]
    require(all(map(has_whole_images, located)))
    return located


def has_whole_images(value: TracedValue) -> bool:
    """Return whether only the batch axis of *value* changes its size, and has whole runs for every image."""
    if not value.shapes:  # an optional result that the graph leaves out
        return True
    axis = batch_axis_of(value.shapes)
    if axis != value.batch_axis:
        return False
    if axis is None:
        return True

    # Runs of 3 rows fit batch * 6, not batch * 4. The size is the same multiple of every batch
    # (`batch_axis_of`), so the smallest batch shows it for all.
    rows_of_batch = BATCHES[0] * value.rows_of_image
    return value.shapes[0][axis] % rows_of_batch == 0


def prove_images(model: onnx.ModelProto, *, allowed: bool) -> tuple[str, ...]:
    """Name the operators through which *model* mixes images; raise `LoweringError` unless *allowed*."""
    mixing = find_mixing(model)
    if not mixing or allowed:
        return mixing
    problem = f"the network mixes images: {mixing[0]} combines them, or uses their number or positions"
    if mixing[0].startswith(NO_RULE):  # such as "no rule for Einsum in head"
        problem = f"{mixing[0]} shows that it keeps images apart; compare the outputs of batches, then"
    raise LoweringError(problem, remedies={"allow_batch_dependence": True})
