"""The two int8 forms: which operators read quantized values, and which runtime accepts which form."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sopdeploy.bundle.manifest import BatchRange, Int8For
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy_export.graph import generated_images
from sopdeploy_export.precision.casts import float32_parts
from sopdeploy_export.precision.int8 import input_grids, quantize
from sopdeploy_export.tensorrt.lint import lint
from sopdeploy_export.tensorrt.rewrites import graph_precision
from tests.export.once import graph_of

BATCH = BatchRange(optimum=2, maximum=4)
RUNTIMES: tuple[Int8For, ...] = ("cpu", "tensorrt")
Graph = tuple[dict[Int8For, onnx.ModelProto], list[str]]
NETWORKS: dict[str, dict[str, Any]] = {
    "isqrt-resnet8": {},
    "gsop-net2-preact-resnet29": {"blocks": 2, "cov_width": 32, "final_width": 32},
    "gmsop-16-8-resnet18": {
        "blocks_per_stage": 1,
        "components": 4,
        "chosen": 2,
        "component_widths": (16, 8),
        "gate_widths": (8, 6),
        "iterations": 3,
    },
}
BETWEEN = {  # operators that may read a quantized value
    "cpu": {"Conv", "Relu", "Add", "Slice", "Mul"},
    "tensorrt": {"Conv", "Add", "Slice", "Mul"},
}


@pytest.fixture(scope="module", params=NETWORKS)
def graph(request: pytest.FixtureRequest, preprocess: Preprocess) -> Graph:
    """Quantize a network of each family in both forms; list the parts that stay in float32."""
    made = {
        runtime: graph_of(request.param, preprocess, BATCH, **NETWORKS[request.param]) for runtime in RUNTIMES
    }
    kept = float32_parts(made["cpu"].network)
    return {
        runtime: quantize(made[runtime].model, generated_images(16)[:4], kept, "minmax", runtime)
        for runtime in RUNTIMES
    }, kept


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_convolutions_and_operators_between_them_read_quantized_values(
    graph: Graph, runtime: Int8For
) -> None:
    model = graph[0][runtime]
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    readers = [node for node in model.graph.node if dequantized.keys() & set(node.input)]
    assert {node.op_type for node in readers} <= BETWEEN[runtime]
    weights = [
        dequantized[node.input[1]].input[0]
        for node in readers
        if node.input[1:] and node.input[1] in dequantized
    ]
    assert weights
    assert not [weight for weight in weights for part in graph[1] if is_in(weight, part)]
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    made = {node.op_type for node in model.graph.node if quantized & set(node.output)}
    assert made <= {"Conv", "Relu", "Add"}


def test_tensorrt_accepts_its_form_and_rejects_the_cpu_form_with_advice(graph: Graph) -> None:
    profiles = [Profile(minimum=1, optimum=2, maximum=4)]
    for version in ((8, 6), (10, 0), (10, 16), (11, 0)):
        safe, _ = lint(graph[0]["tensorrt"], version, profiles)
        assert graph_precision(safe) == "int8"
        with pytest.raises(LoweringError, match=r"quantised-for-a-cpu.*--int8-for tensorrt"):
            lint(graph[0]["cpu"], version, profiles)


def test_tensorrt_form_is_symmetric_int8_with_float_biases(graph: Graph) -> None:
    model = graph[0]["tensorrt"]
    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            assert fixed[node.input[2]].dtype == np.int8
            assert not fixed[node.input[2]].any()
    codes = {name: values for name, values in fixed.items() if name.endswith("_quantized")}
    assert {values.dtype for values in codes.values()} == {np.dtype(np.int8)}
    assert min(values.min() for values in codes.values()) >= -127
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    assert fixed[first.input[1]].dtype == np.float32  # it reads the image
    grids = input_grids(model).values()
    assert {(grid.zero, grid.lowest, grid.highest) for grid in grids} == {(0, -128, 127)}


def test_tensorrt_form_quantizes_convolutions_in_shortcuts(preprocess: Preprocess) -> None:
    plain = graph_of("resnet8", preprocess, BATCH, shortcut="projection").model
    model = quantize(plain, generated_images(16)[:4], (), "minmax", "tensorrt")
    made = {name: node for node in model.graph.node for name in node.output}
    quantized = [made[node.input[0]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    dequantized = [made[node.input[1]].input[0] for node in quantized if node.op_type == "Conv"]
    assert dequantized == ["layer2.0.downsample.0.weight_quantized", "layer3.0.downsample.0.weight_quantized"]
