"""Images: no output of an image depends on the other images of its batch.

The proof follows the data flow in the ONNX graph. Every value has at most one batch axis, of
`outer * batch * run_length` rows: row r belongs to the image `r // run_length % batch`. The
rules of `batch_layouts.py` say where this axis is in the results of each operator. An operator
to which its rule does not apply mixes images; one without a rule may mix them. Shapes, and
numbers computed from them, are evaluated for three batch sizes: every size must be constant or
a multiple of the batch, and a number that depends on the batch size is used as a size, never as
data. The number of an image in its batch selects the rows of this image, and nothing else.

The proof covers all contents of the images, also those that no probe has, and batches of at
most `BATCHES[-1]` images. It assumes that the runtime implements the operators as ONNX defines
them.

Refused: operators that combine rows of several images (`tests/export/prove/test_proof.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from sopdeploy.errors import LoweringError
from sopdeploy_export.prove.batch_layouts import (
    BATCHES,
    RULES,
    BatchLayout,
    MixesError,
    OperatorCall,
    TracedValue,
    batch_axis_of,
    require,
)

STATEMENT = (
    "No output depends on other images of the batch. Otherwise the export names the operators."
)

_MOST_NUMBERS = 1024  # of a value that is evaluated
# The numbers of the inputs that are sizes or positions
_SIZES = {
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
    image = model.graph.input[0]
    opsets = list(model.opset_import)
    batch, *sizes = [size.dim_value for size in image.type.tensor_type.shape.dim]
    if batch == 1:  # there are no other images
        return ()
    shapes = [(batch, *sizes) for batch in BATCHES]
    values = {
        image.name: TracedValue(
            image.type.tensor_type.elem_type, shapes, layout=BatchLayout(0, 1)
        )
    }
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        contents = [array] * len(BATCHES) if array.size <= _MOST_NUMBERS else ()
        values[tensor.name] = TracedValue(
            tensor.data_type, [array.shape] * len(BATCHES), contents
        )
    for node in model.graph.node:
        values |= zip(node.output, _trace_node(node, values, opsets), strict=True)
    outputs = {output.name: values[output.name] for output in model.graph.output}
    mixing = [name for value in outputs.values() for name in value.mixed]
    for name, value in outputs.items():
        # The number of an image depends on how many images are in front of it in the batch.
        if not value.mixed and (not value.has_row_per_image or value.image_numbers):
            mixing.append(f"output {name}")
    return tuple(dict.fromkeys(mixing))  # each once


def _trace_node(
    node: onnx.NodeProto, values: dict[str, TracedValue], opsets: list[Any]
) -> list[TracedValue]:
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
    depend on the batch size in another way than linearly.
    """
    named = {
        name: value for name, value in zip(node.input, inputs, strict=True) if value is not None
    }
    results = _infer_shapes(node, named, opsets)
    shapes = results[0].shapes

    # For every batch size
    is_small = len(set(shapes)) == 1 and math.prod(shapes[0]) <= _MOST_NUMBERS

    # Reads no contents, so the operand can be an array that takes no memory
    if node.op_type == "Shape":
        name = node.input[0]
        operands_by_batch = [
            {name: np.broadcast_to(False, shape)} for shape in named[name].shapes
        ]
    elif is_small and all(value.contents for value in named.values()):
        operands_by_batch = [
            {name: value.contents[i] for name, value in named.items()}
            for i in range(len(BATCHES))
        ]
    else:
        return results
    runs: list[Any] = [
        ReferenceEvaluator(node).run(None, operands) for operands in operands_by_batch
    ]
    computed = []

    # Its contents for each batch size
    for result, *contents in zip(results, *runs, strict=True):
        computed.append(replace(result, contents=[np.asarray(content) for content in contents]))

    # `is_linear` says why three are enough
    if any(value.depends_on_batch_size for value in named.values()):
        require(node.op_type in _SIZE_OPERATORS and all(map(is_linear, computed)))
    return computed


def _infer_shapes(
    node: onnx.NodeProto, named: dict[str, TracedValue], opsets: list[Any]
) -> list[TracedValue]:
    """Infer the types and shapes of the results of *node*, whose operands are *named*.

    Raises `ValueError` if onnx infers no shape, and the errors of onnx.
    """
    version = next(opset.version for opset in opsets if opset.domain == node.domain)
    schema = defs.get_schema(node.op_type, version, node.domain)
    types_by_batch = []  # for each batch size, a dict from the name of each result to its type
    for i in range(len(BATCHES)):
        contents = {
            name: numpy_helper.from_array(v.contents[i])
            for name, v in named.items()
            if v.contents
        }
        types = {
            name: helper.make_tensor_type_proto(v.type, v.shapes[i])
            for name, v in named.items()
        }
        types_by_batch.append(
            shape_inference.infer_node_outputs(
                schema, node, types, contents, opset_imports=opsets
            )
        )
    results = []
    for name in node.output:
        if not name:  # an optional result that the graph leaves out
            results.append(TracedValue())
            continue
        tensors = [types[name].tensor_type for types in types_by_batch]
        if not all(
            size.HasField("dim_value") for tensor in tensors for size in tensor.shape.dim
        ):
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
    # a truth value, such as that of size > 100, can change anywhere
    if value.contents[0].dtype.kind == "b":
        return False
    low, middle, high = BATCHES

    # Cannot overflow
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
    sizes = _SIZES.get(node.op_type, ())
    data = [value for i, value in enumerate(inputs) if value and i not in sizes]
    require(not any(value.depends_on_batch_size for value in data))  # only sizes may
    call = OperatorCall(node, inputs, results[0].shapes)
    layouts = RULES[node.op_type](call)
    if isinstance(layouts, BatchLayout):  # one for all results
        layouts = [layouts] * len(results)

    # The number of an image may stay such a number, or be an index that selects the row of this
    # image.
    image_numbers = find_image_numbers(node.op_type, call)
    inputs_with_numbers = [i for i, value in enumerate(inputs) if value and value.image_numbers]
    if inputs_with_numbers:
        # Input 1 holds indices
        are_indices = node.op_type in TAKES_INDICES and inputs_with_numbers == [1]
        require(image_numbers != "" or are_indices)
    pairs = zip(results, layouts, strict=False)  # a recurrent layer can have fewer results
    located = [
        replace(result, layout=layout, image_numbers=image_numbers) for result, layout in pairs
    ]
    require(all(map(has_whole_images, located)))
    return located


def has_whole_images(value: TracedValue) -> bool:
    """Return whether only the batch axis of *value* changes its size, with as many rows for every image."""
    if not value.shapes:  # an optional result that the graph leaves out
        return True
    axis = batch_axis_of(value.shapes)
    if axis != value.batch_axis:
        return False

    # Runs of 3 fit batch * 6, not batch * 4
    rows_of_batch = BATCHES[0] * (value.layout.run_length or 1)

    # `batch_axis_of` covers other sizes
    return axis is None or value.shapes[0][axis] % rows_of_batch == 0


def find_image_numbers(kind: str, call: OperatorCall) -> Literal["", "all", "first"]:
    """Return which elements of a result are the number of their image in the batch.

    They are none, all, or the first of the last axis, as `TracedValue.image_numbers` says.
    """
    # 0, ..., batch - 1, as `layout_of_range` requires, or a range of constant length
    if kind == "Range":
        return "" if batch_axis_of(call.shapes) is None else "all"
    if call.x.image_numbers != "all":
        return ""
    if kind in SAME_NUMBERS:
        # Smaller types repeat numbers
        wraps = kind == "Cast" and call.attributes["to"] != TensorProto.INT64
        return "" if wraps else "all"

    # For `x[arange(batch), k]`, `GatherND` takes pairs of an image and its k, which `Concat`
    # joins.
    if kind == "Concat" and not any(value.image_numbers for value in call.present[1:]):
        is_column = call.axis_attribute(0) == call.rank - 1 and call.x.shapes[0][-1] == 1
        return "first" if is_column else ""
    return ""


def prove_images(model: onnx.ModelProto, *, allowed: bool) -> tuple[str, ...]:
    """Name the operators through which *model* mixes images; raise `LoweringError` unless *allowed*."""
    mixing = find_mixing(model)
    if not mixing or allowed:
        return mixing
    problem = f"the network mixes images: {mixing[0]} combines them, or uses their number or positions"

    # For example "no rule for Einsum in head shows that it keeps ..."
    if mixing[0].startswith(NO_RULE):
        problem = f"{mixing[0]} shows that it keeps images apart; compare the outputs of batches, then"
    raise LoweringError(problem, remedies={"allow_batch_dependence": True})
