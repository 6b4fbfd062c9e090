"""The real CUDA provider of ONNX Runtime: what it opens."""

import onnx
import pytest
from onnx import TensorProto, helper

from tests.cuda.stand_in import ABSENT, installed, opened
from tests.tensorrt.networks import network

pytestmark = pytest.mark.skipif(not installed(), reason=ABSENT)


@pytest.mark.parametrize("half", [False, True])
def test_a_second_order_graph_opens(half: bool) -> None:
    assert opened(network(half=half), "fp16" if half else "fp32") == "ok"


def test_an_operator_without_a_cuda_kernel_is_named() -> None:
    model = network()
    model.graph.node.append(helper.make_node("Det", ["covariance"], ["determinant"]))
    model.graph.output.append(
        helper.make_tensor_value_info("determinant", TensorProto.FLOAT, ["batch"])
    )

    assert opened(model) == "Det, 1 MemcpyToHost"


def reading_shapes(*values: str) -> onnx.ModelProto:
    """Return a network with one convolution that expands a constant to the number of rows of each value."""
    model = network(half=True)
    for name in values:
        rows = f"{name}_rows"
        size = f"{name}_size"
        expanded = f"{name}_expanded"
        model.graph.node.extend(
            [
                helper.make_node("Shape", [name], [rows], start=0, end=1),
                helper.make_node("Concat", [rows, "one"], [size], axis=0),
                helper.make_node("Expand", ["row", size], [expanded]),
            ]
        )
        model.graph.output.append(
            helper.make_tensor_value_info(expanded, TensorProto.FLOAT, ["batch", 1])
        )
    model.graph.initializer.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
    model.graph.initializer.append(helper.make_tensor("row", TensorProto.FLOAT, [1, 1], [0.5]))
    return model


@pytest.mark.parametrize(
    ("values", "precision", "answer"),
    [
        (["images"], "fp32", "ok"),
        (["images"], "fp16", "1 MemcpyFromHost, 1 MemcpyToHost"),
        (["images", "vector"], "fp16", "ok"),
    ],
)
def test_a_graph_with_more_shapes_than_convolutions_copies_none_of_them(
    values: list[str], precision: str, answer: str
) -> None:
    assert opened(reading_shapes(*values), precision) == answer
