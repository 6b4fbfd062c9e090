"""Compare two small ONNX models by running them on inputs that are made here.

`difference` decides whether one part of a graph may replace another. It knows neither rules nor networks: it
reads the types and sizes of the inputs, and makes images of many kinds in batches of 1, 2 and 3.

In float64, the order of operations changes no digit that float32 can show. So the results must agree, except
where the original in float32 is noise, and a NaN or an infinity must have the same place in both. If an input
of an image contains an infinity, the network has exceeded its range before this part; then only the finite
results of the original must be kept.

In float32, the error of the replacement is at most `_FLOORS` times that of the original.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Feeds = dict[str, NDArray[Any]]
Types = dict[str, onnx.TypeProto.Tensor]
ModelRun = Callable[[Feeds], NDArray[Any]]

_SEED = 20_261_123
USUAL = ("normal", "normal", "normal")
_BATCHES: tuple[tuple[str, ...], ...] = (
    ("normal",),
    ("repeated", "repeated"),
    ("huge", "tiny"),
    ("positive", "rank one", "constant"),
    ("few values", "zero", "subnormal squares"),
)
# Of one input at a time.
SPECIAL = (("NaN", "infinity", "normal"), ("zero", "subnormal", "negative infinity"))
_SCALES = {"huge": 1e30, "tiny": 1e-30, "subnormal squares": 1e-155, "subnormal": 1e-310}
ELEMENTS = {"infinity": np.inf, "negative infinity": -np.inf, "NaN": np.nan}
TOLERANCE = 16 * float(np.finfo(np.float32).eps)  # of the largest value of an image, in float64
_FLOORS = 16.0
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
    random = np.random.default_rng(_SEED)
    try:
        exact, exact_after = (run_in(model, TensorProto.DOUBLE) for model in (before, after))
        rounded, rounded_after = (run_in(model, TensorProto.FLOAT) for model in (before, after))
        for kinds in make_batches(types):
            feeds = {name: make_input(types[name], kinds[name], random) for name in types}
            images = [" and ".join(dict.fromkeys(image)) for image in zip(*kinds.values(), strict=True)]
            has_infinity = ["infinity" in image for image in images]
            expected, found = exact(feeds), exact_after(feeds)
            problem = _compare(expected, found, expected, has_infinity)
            if problem is not None:  # where the result is noise, float32 shows how much
                problem = _compare(expected, found, rounded(feeds), has_infinity)
            if problem is not None:
                return f"{problem} (images: {', '.join(images)})"
        usual = ("normal",) * (fixed_batch(types) or len(USUAL))
        feeds = {name: make_input(tensor, usual, random) for name, tensor in types.items()}
        expected = exact(feeds)
        own, other = (np.abs(run(feeds) - expected).max() for run in (rounded, rounded_after))
    except Exception as error:  # operators raise errors without a common base class
        return f"cannot be run: {str(error).strip().partition(chr(10))[0][:200]}"
    floor = max(own, 4 * np.finfo(np.float32).eps * np.abs(expected).max())
    exceeds = np.isfinite(own) and not other <= _FLOORS * floor
    return f"its error of {other:.2g} is {other / floor:.0f} noise floors" if exceeds else None


def _compare(
    expected: NDArray[Any], found: NDArray[Any], rounded: NDArray[Any], has_infinity: Sequence[bool]
) -> str | None:
    """Describe the first difference of *found* from *expected*, the results in float64.

    *rounded* is *expected* in float32, or *expected* itself if its noise is not measured.
    """
    if expected.shape != found.shape or len(expected) != len(has_infinity):
        return f"the shape {found.shape} instead of {expected.shape}"
    for image, other, inexact, lenient in zip(expected, found, rounded, has_infinity, strict=True):
        finite = np.isfinite(image)
        if not lenient and not np.array_equal(image[~finite], other[~finite], equal_nan=True):
            return "a result is not NaN or infinite, as it was"
        if not np.isfinite(other[finite]).all():
            return "a result is NaN or infinite that was finite"
        known = finite & np.isfinite(inexact)
        error = np.abs(image[finite] - other[finite]).max(initial=0.0)
        noise = np.abs(image[known] - inexact[known]).max(initial=0.0)
        largest = np.abs(image[finite]).max(initial=0.0)
        if error > max(TOLERANCE * largest, noise):
            return f"a result differs by {error:.2g}, where the largest is {largest:.2g}"
    return None


def make_batches(types: Types) -> Iterator[dict[str, tuple[str, ...]]]:
    """List the batches to compare: for every input, the kinds of its images.

    First all inputs have the same kinds; then one input at a time has a special kind. A model with a fixed
    batch size gets each batch in several of that size; usual images complete the last one.
    """
    batches = [dict.fromkeys(types, kinds) for kinds in _BATCHES]
    for special in SPECIAL:
        batches += [{other: special if other == name else USUAL for other in types} for name in types]
    for batch in batches:
        num_images = len(next(iter(batch.values())))
        size = fixed_batch(types) or num_images
        for start in range(0, num_images, size):
            parts = {name: kinds[start : start + size] for name, kinds in batch.items()}
            yield {name: (part + USUAL * size)[:size] for name, part in parts.items()}


def make_input(
    tensor: onnx.TypeProto.Tensor, kinds: Sequence[str], random: np.random.Generator
) -> NDArray[Any]:
    """Make one input: float64 for every floating-point type, small integers or booleans for others."""
    sizes = [size.dim_value for size in tensor.shape.dim]
    if batch_varies(tensor):
        sizes[0] = len(kinds)
    if tensor.elem_type not in FLOATS:
        return random.integers(0, 2, sizes).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
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
        image *= _SCALES.get(kind, 1.0)
    return values


def input_types(model: onnx.ModelProto) -> Types:
    """Map the inputs of *model* to their types."""
    return {value.name: value.type.tensor_type for value in model.graph.input}


def batch_varies(tensor: onnx.TypeProto.Tensor) -> bool:
    """Return whether the first axis has no fixed size."""
    return bool(tensor.shape.dim) and not tensor.shape.dim[0].HasField("dim_value")


def fixed_batch(types: Types) -> int:
    """Return the size of the first axes, 0 if it varies."""
    return max(0 if batch_varies(tensor) else int(tensor.shape.dim[0].dim_value) for tensor in types.values())


def count_elements(model: onnx.ModelProto) -> int:
    """Count the elements of all values of *model*, where their sizes are known, for three images."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.value_info)]
    return sum(math.prod(size.dim_value or len(USUAL) for size in shape) for shape in shapes)


def run_in(model: onnx.ModelProto, precision: int) -> ModelRun:
    """Build a function that runs *model* with *precision* in place of every floating-point type."""
    changed, dtype = onnx.ModelProto(), helper.tensor_dtype_to_np_dtype(precision)
    changed.CopyFrom(model)
    attributes = [attribute for node in changed.graph.node for attribute in node.attribute]
    tensors = [attribute.t for attribute in attributes if attribute.HasField("t")]
    for tensor in (*changed.graph.initializer, *tensors):
        if tensor.data_type in FLOATS:
            with np.errstate(over="ignore"):
                array = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for attribute in attributes:
        if attribute.name in {"to", "dtype"} and attribute.i in FLOATS:
            attribute.i = precision
    for value in (*changed.graph.input, *changed.graph.output):
        if value.type.tensor_type.elem_type in FLOATS:
            value.type.tensor_type.elem_type = precision
    evaluator = ReferenceEvaluator(changed)

    def run(feeds: Feeds) -> NDArray[Any]:
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            given = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in feeds.items()}
            return np.asarray(next(iter(evaluator.run(None, given))), np.float64)

    return run
