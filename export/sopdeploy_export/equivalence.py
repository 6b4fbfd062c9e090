"""Compare two small ONNX models by running them on inputs that are made here.

`difference` decides whether one part of a graph may replace another. It knows neither rules nor networks: it
reads the types and sizes of the inputs, and makes images of many kinds in batches of 1, 2 and 3.

In float64, the order of operations changes no digit that float32 can show. So the results must agree, and a
NaN or an infinity must have the same place in both. If an input of an image contains an infinity, the network
has exceeded its range before this part; then only the finite results of the original must be kept.

In the precision of the graph, the error of the replacement is at most `FLOORS` times that of the original.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Arrays = dict[str, NDArray[Any]]
Types = dict[str, onnx.TypeProto.Tensor]
Run = Callable[[Arrays], NDArray[Any]]

SEED = 20_261_123
USUAL = ("normal", "normal", "normal")
BATCHES: tuple[tuple[str, ...], ...] = (
    ("normal",),
    ("repeated", "repeated"),
    ("huge", "tiny"),
    ("positive", "rank one", "constant"),
    ("few values", "zero", "subnormal squares"),
)
# Of one input at a time.
SPECIAL = (("NaN", "infinity", "normal"), ("zero", "subnormal", "negative infinity"))
SCALES = {"huge": 1e30, "tiny": 1e-30, "subnormal squares": 1e-155, "subnormal": 1e-310}
ELEMENTS = {"infinity": np.inf, "negative infinity": -np.inf, "NaN": np.nan}
TOLERANCE = 1e-8  # in float64, of the largest value of an image
FLOORS = 16.0
MOST_ELEMENTS = 2**27  # of all values of a model, for three images
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> str | None:
    """Describe how *after* differs from *before*; None if it does not.

    Both have the same inputs and one output. A first axis without a fixed size is the batch.
    """
    types, others = (input_types(model) for model in (before, after))
    if types.keys() != others.keys():
        return "the inputs differ"
    if max(count_elements(before), count_elements(after)) > MOST_ELEMENTS:
        return f"its values have more than {MOST_ELEMENTS} elements"
    random = np.random.default_rng(SEED)
    try:
        exact, rewritten = run_in_float64(before), run_in_float64(after)
        for kinds in make_batches(types):
            feeds = {name: make_input(types[name], kinds[name], random) for name in types}
            images = [" and ".join(dict.fromkeys(image)) for image in zip(*kinds.values(), strict=True)]
            problem = compare(exact(feeds), rewritten(feeds), ["infinity" in image for image in images])
            if problem is not None:
                return f"{problem} (images: {', '.join(images)})"
        return compare_errors(types, random, exact, (before, after))
    except Exception as error:  # the runtimes' errors share no base class
        return f"cannot be run: {str(error).strip().partition(chr(10))[0][:200]}"


def compare(expected: NDArray[Any], found: NDArray[Any], lenient: Sequence[bool]) -> str | None:
    """Describe the first difference of *found* from *expected*, the results in float64.

    An image that is *lenient* has an infinity in its inputs.
    """
    if expected.shape != found.shape or len(expected) != len(lenient):
        return f"the shape {found.shape} instead of {expected.shape}"
    for image, other, has_infinity in zip(expected, found, lenient, strict=True):
        finite = np.isfinite(image)
        if not has_infinity and not np.array_equal(image[~finite], other[~finite], equal_nan=True):
            return "a result is not NaN or infinite, as it was"
        if not np.isfinite(other[finite]).all():
            return "a result is NaN or infinite that was finite"
        error = np.abs(image[finite] - other[finite]).max(initial=0.0)
        largest = np.abs(image[finite]).max(initial=0.0)
        if error > TOLERANCE * largest:
            return f"a result differs by {error:.2g}, where the largest is {largest:.2g}"
    return None


def compare_errors(
    types: Types, random: np.random.Generator, exact: Run, models: tuple[onnx.ModelProto, onnx.ModelProto]
) -> str | None:
    """Compare the errors of both *models*, in their own precision, on usual images."""
    used = {tensor.elem_type for tensor in types.values()}
    used.update(tensor.data_type for model in models for tensor in model.graph.initializer)
    if used & {TensorProto.BFLOAT16, TensorProto.DOUBLE}:
        return None  # the runtime has no kernels for bfloat16, and few for float64
    batch = ("normal",) * (fixed_batch(types) or len(USUAL))
    feeds = {name: make_input(tensor, batch, random) for name, tensor in types.items()}
    rounded = {name: array.astype(numpy_type(types[name])) for name, array in feeds.items()}
    widened = {name: rounded[name].astype(feeds[name].dtype) for name in types}
    expected = exact(widened)
    own, other = (np.abs(run_as_it_is(model)(rounded) - expected).max() for model in models)
    floor = max(own, 4 * np.finfo(np.float32).eps * np.abs(expected).max())
    exceeds = np.isfinite(own) and not other <= FLOORS * floor
    return f"its error of {other:.2g} is {other / floor:.0f} noise floors" if exceeds else None


def make_batches(types: Types) -> Iterator[dict[str, tuple[str, ...]]]:
    """List the batches to compare: for every input, the kinds of its images."""
    batches = [dict.fromkeys(types, kinds) for kinds in BATCHES]
    for special in SPECIAL:
        batches += [{other: special if other == name else USUAL for other in types} for name in types]
    fixed = fixed_batch(types)
    for batch in batches:
        count = len(next(iter(batch.values())))
        for start in range(0, count, fixed or count):
            end = start + (fixed or count)
            yield {name: (kinds[start:end] + USUAL * end)[: end - start] for name, kinds in batch.items()}


def make_input(
    tensor: onnx.TypeProto.Tensor, kinds: Sequence[str], random: np.random.Generator
) -> NDArray[Any]:
    """Make one input: float64 for every floating-point type, small integers or booleans for others."""
    sizes = [size.dim_value for size in tensor.shape.dim]
    if batch_varies(tensor):
        sizes[0] = len(kinds)
    if tensor.elem_type not in FLOATS:
        return random.integers(0, 2, sizes).astype(numpy_type(tensor))
    values = random.standard_normal(sizes)
    repeated = random.standard_normal(sizes[1:])
    for i, kind in enumerate(kinds):
        image = values[i : i + 1].reshape(sizes[1], -1) if len(sizes) > 1 else values[i : i + 1, None]
        if kind == "rank one":
            image[:] = image[:, :1] * image[:1]
        elif kind == "few values":
            image[:] = random.integers(-1, 2, image.shape)
        elif kind in ELEMENTS:
            image.flat[random.integers(image.size)] = ELEMENTS[kind]
        elif kind == "positive":
            image[:] = np.abs(image)
        elif kind in {"zero", "constant"}:
            image[:] = float(kind == "constant")
        elif kind == "repeated":
            image[:] = repeated.reshape(image.shape)
        image *= SCALES.get(kind, 1.0)
    return values


def input_types(model: onnx.ModelProto) -> Types:
    """Map the inputs of *model* to their types."""
    return {value.name: value.type.tensor_type for value in model.graph.input}


def numpy_type(tensor: onnx.TypeProto.Tensor) -> np.dtype[Any]:
    """Return the type of the elements."""
    return helper.tensor_dtype_to_np_dtype(tensor.elem_type)


def batch_varies(tensor: onnx.TypeProto.Tensor) -> bool:
    """Return whether the first axis has no fixed size."""
    return bool(tensor.shape.dim) and not tensor.shape.dim[0].HasField("dim_value")


def fixed_batch(types: Types) -> int:
    """Return the size of the first axes, 0 if it varies."""
    return max(tensor.shape.dim[0].dim_value * (not batch_varies(tensor)) for tensor in types.values())


def count_elements(model: onnx.ModelProto) -> int:
    """Count the elements of all values of *model*, where their sizes are known, for three images."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.value_info)]
    return sum(math.prod(size.dim_value or len(USUAL) for size in shape) for shape in shapes)


def run_as_it_is(model: onnx.ModelProto) -> Run:
    """Build a function that runs *model* in ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: np.asarray(session.run(None, feeds)[0], np.float64)


def run_in_float64(model: onnx.ModelProto) -> Run:
    """Build a function that runs *model* with float64 in place of every floating-point type."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    attributes = [attribute for node in wide.graph.node for attribute in node.attribute]
    tensors = [attribute.t for attribute in attributes if attribute.HasField("t")]
    for tensor in (*wide.graph.initializer, *tensors):
        if tensor.data_type in FLOATS:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for attribute in attributes:
        if attribute.name in {"to", "dtype"} and attribute.i in FLOATS:
            attribute.i = TensorProto.DOUBLE
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type in FLOATS:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    evaluator = ReferenceEvaluator(wide)

    def run(feeds: Arrays) -> NDArray[Any]:
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            return np.asarray(evaluator.run(None, feeds)[0])

    return run
