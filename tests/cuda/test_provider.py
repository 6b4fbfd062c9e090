"""The real CUDA provider of ONNX Runtime: what it opens, and its errors as the service shows them."""

import json
import subprocess
from pathlib import Path

import onnx.parser
import pytest
from onnx import TensorProto, helper

from tests.cuda.stand_in import ABSENT, installed, opened, start
from tests.tensorrt.networks import CLASSES, SIDE, network, write

pytestmark = pytest.mark.skipif(not installed(), reason=ABSENT)


def without_convolution() -> onnx.ModelProto:
    """Return a network that the stand-in can run: convolutions need cuDNN."""
    size = SIDE * SIDE * 3
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["": 18]>
        without_convolution (uint8[batch, {SIDE}, {SIDE}, 3] images) => (float[batch, {CLASSES}] logits)
        <float[{size}, {CLASSES}] fc_weight, int64[2] rows = {{0, {size}}}>
        {{
            pixels = Cast <to = 1> (images)
            vector = Reshape (pixels, rows)
            logits = MatMul (vector, fc_weight)
        }}
        """
    )
    weight = helper.make_tensor("fc_weight", TensorProto.FLOAT, [size, CLASSES], [0.5] * size * CLASSES)
    model.graph.initializer.append(weight)
    return model


@pytest.mark.parametrize("half", [False, True])
def test_a_second_order_graph_opens(half: bool) -> None:
    assert opened(network(half=half), "fp16" if half else "fp32") == "ok"


def test_an_operator_without_a_cuda_kernel_is_named() -> None:
    model = network()
    model.graph.node.append(helper.make_node("Det", ["covariance"], ["determinant"]))
    model.graph.output.append(helper.make_tensor_value_info("determinant", TensorProto.FLOAT, ["batch"]))
    assert opened(model) == "Det, 1 MemcpyToHost"


def reading_shapes(*values: str) -> onnx.ModelProto:
    """Return a network with one convolution that expands a constant to the number of rows of each value."""
    model = network(half=True)
    for name in values:
        rows, size, expanded = f"{name}_rows", f"{name}_size", f"{name}_expanded"
        model.graph.node.extend(
            [
                helper.make_node("Shape", [name], [rows], start=0, end=1),
                helper.make_node("Concat", [rows, "one"], [size], axis=0),
                helper.make_node("Expand", ["row", size], [expanded]),
            ]
        )
        model.graph.output.append(helper.make_tensor_value_info(expanded, TensorProto.FLOAT, ["batch", 1]))
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


FAILURES = [
    ("", 0, "run", "", ""),
    ("cudaMalloc", 2, "open", "RuntimeUnavailableError", "graph: Failed to allocate memory"),
    ("cudaStreamSynchronize", 719, "run", "Fail", "CUDA failure 719"),
]


@pytest.mark.parametrize(("function", "code", "when", "error", "message"), FAILURES)
def test_a_failure_of_cuda_is_one_line_of_the_right_kind(
    function: str, code: int, when: str, error: str, message: str, tmp_path: Path
) -> None:
    bundle = write(tmp_path / "bundle", without_convolution())
    process = start("-m", "tests.cuda.run_bundle", str(bundle.path), function, str(code), when)
    kind, text = json.loads(process.communicate(timeout=120)[0])
    assert kind == error
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("verify",)])
def test_a_first_batch_that_fails_ends_a_command_in_one_line(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """Convolutions fail: the stand-in has no cuDNN."""
    name, *options = command
    bundle = write(tmp_path / "bundle", network())
    process = start("-m", "sopdeploy", name, str(bundle.path), *options, stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "cannot run a batch on cuda:0: EPFail: CUDNN_FE failure 11" in stderr
    assert len(stderr.splitlines()) == 1
