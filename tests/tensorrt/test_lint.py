"""The lint rewrites exactly what TensorRT misreads, or rejects the graph."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sopdeploy.errors import LoweringError
from sopdeploy_export.engine_builder.lint import lint
from tests.tensorrt.networks import CHANNELS, network, outputs_of, some_images


def test_the_rewritten_graph_gives_the_same_outputs_and_casts_its_input_first() -> None:
    model, images = network(), some_images(5)
    before = model.SerializeToString()
    safe = lint(model)
    np.testing.assert_allclose(outputs_of(safe, images), outputs_of(model, images), rtol=1e-6, atol=1e-4)
    assert model.SerializeToString() == before
    assert [node.op_type for node in safe.graph.node][:2] == ["Cast", "Transpose"]


def graph(
    operator: str,
    inputs: list[str],
    *,
    constants: dict[str, Any] | None = None,
    kind: int = TensorProto.FLOAT,
    others: list[onnx.NodeProto] | None = None,
) -> onnx.ModelProto:
    """A graph of one operator over x (batch, 4, 4)."""
    made = helper.make_graph(
        [*(others or []), helper.make_node(operator, inputs, ["y"], name="it")],
        "one",
        [helper.make_tensor_value_info("x", kind, ["batch", 4, 4])],
        [helper.make_tensor_value_info("y", kind, ["batch", 4, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def quantized(point: Any) -> onnx.ModelProto:
    """x, quantized and back, with the zero point *point*."""
    constants = {"s": np.float32(0.1)} | ({} if point is None else {"z": point})
    first = helper.make_node("QuantizeLinear", ["x", *constants], ["q"], name="quantize")
    return graph("DequantizeLinear", ["q", *constants], constants=constants, others=[first])


def test_only_signed_bytes_around_zero_are_accepted() -> None:
    for point in (np.uint8(0), np.uint8(128), np.int8(3), None):
        with pytest.raises(LoweringError, match="TensorRT needs int8 with zero point 0"):
            lint(quantized(point))
    safe = lint(quantized(np.int8(0)))
    assert "QuantizeLinear" in {node.op_type for node in safe.graph.node}


def test_a_shape_of_the_images_is_taken_after_their_cast() -> None:
    model, images = network(), some_images(5)
    dynamic = helper.make_node("Shape", ["images"], ["count"], name="count", start=0, end=1)
    rest = numpy_helper.from_array(np.array([CHANNELS, -1]), "rest")
    rows = helper.make_node("Concat", ["count", "rest"], ["rows"], name="rows", axis=0)
    del model.graph.initializer[3]
    model.graph.initializer.append(rest)
    for node in (rows, dynamic):
        model.graph.node.insert(0, node)
    safe = lint(model)
    users = {node.op_type for node in safe.graph.node if "images" in node.input}
    assert users == {"Cast"}
    np.testing.assert_array_equal(outputs_of(safe, images), outputs_of(model, images))


def test_other_uses_of_unsigned_bytes_are_rejected() -> None:
    with pytest.raises(LoweringError, match="Add uses unsigned bytes, which TensorRT can only cast"):
        lint(graph("Add", ["x", "x"], kind=TensorProto.UINT8))
