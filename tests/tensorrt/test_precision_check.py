"""The layers of an engine must have the precision that the graph asks for."""

import json
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from sopdeploy.errors import EngineError
from sopdeploy_export.tensorrt.precision_check import check_engine_precision, precision_of_format
from sopdeploy_export.tensorrt.rewrites import graph_precision, operator_parts
from tests.tensorrt.networks import network


def inspected(changes: dict[str, dict[str, Any]] | None = None, *, half: bool = False) -> str:
    """The inspector output for an engine with one layer per operator of the network."""
    low = {"node_convolved", "node_features"} if half else set()
    layers = []
    for node in network(half=half).graph.node:
        word = "Half" if node.name in low else "Float"
        layer = {
            "Name": f"layer of {node.name}",
            "LayerType": "gemm",
            "Inputs": [{"Name": "a", "Format/Datatype": word}],
            "Outputs": [{"Name": "b", "Format/Datatype": word}],
            "TacticName": "sm90_gemm_f32",
            "Metadata": f"[ONNX Layer: {node.name}]",
        }
        layers.append({**layer, **(changes or {}).get(node.name, {})})
    return json.dumps({"Layers": layers})


def tensor(word: str) -> list[dict[str, str]]:
    return [{"Name": "t", "Format/Datatype": word}]


def test_requested_and_realized_precisions_are_listed_by_part() -> None:
    found = check_engine_precision(network(half=True), "fp16", inspected(half=True))
    assert {name: (part.asked, part.realised) for name, part in found.parts.items()} == {
        "layer1": (("fp16",), {"fp16": 2}),
        "second order": (("fp32",), {"fp32": 3}),
        "fc": (("fp32",), {"fp32": 1}),
    }
    assert (found.operators, found.operators_seen) == (6, 6)


WRONG: dict[str, tuple[bool, str, dict[str, Any], str]] = {
    "fp16 instead of fp32": (
        False, "node_covariance", {"Outputs": tensor("Half")},
        r"^second order: layer .* computes with fp16, the graph asks for fp32",
    ),
    "tf32": (
        False, "node_covariance", {"TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n"},
        r"^second order: .*tf32, the graph asks for fp32",
    ),
    "fp32 instead of fp16": (
        True, "node_convolved", {"Inputs": tensor("Float"), "Outputs": tensor("Float")},
        r"^layer1: .* the graph asks for fp16",
    ),
    "int8 instead of fp32": (
        False, "node_convolved",
        {"Inputs": tensor("Thirty-two wide channel vectorized row major Int8 format")}, "computes with int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_another_precision_than_the_graphs_is_rejected_with_the_part(case: str) -> None:
    half, node, change, message = WRONG[case]
    found = inspected({node: change}, half=half)
    with pytest.raises(EngineError, match=message):
        check_engine_precision(network(half=half), "fp16" if half else "fp32", found)


def test_a_fused_layer_may_have_the_types_of_all_its_operators() -> None:
    both = "[ONNX Layer: node_features]\x1f[ONNX Layer: node_exact]\x1f[ONNX Layer: node_mean]"
    changes = {
        "node_features": {"Metadata": both, "Inputs": tensor("Half"), "Outputs": tensor("Float")},
        "node_exact": {"Metadata": ""},
        "node_mean": {"Metadata": ""},
    }
    check_engine_precision(network(half=True), "fp16", inspected(changes, half=True))


def test_reformats_and_layers_without_operators_are_ignored() -> None:
    changes = {
        "node_mean": {"LayerType": "Reformat", "Outputs": tensor("Half")},
        "node_moved": {"Metadata": "", "Name": "shape call", "Outputs": tensor("Half")},
    }
    assert check_engine_precision(network(), "fp32", inspected(changes)).operators_seen == 5


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": ["conv1", "conv2"]}', '{"Layers": []}'])
def test_an_inspector_without_layers_is_rejected(text: str) -> None:
    with pytest.raises(EngineError, match="inspector"):
        check_engine_precision(network(), "fp32", text)


FORMATS: dict[str, str | None] = {
    "Row major linear FP32": "fp32", "Row major linear FP16 format": "fp16", "Half": "fp16", "Float": "fp32",
    "Channel major FP16 format where channel % 8 == 0": "fp16", "BFloat16": "bf16", "UInt8": None,
    "Four wide channel vectorized row major Int8 format": "int8", "Int32": None, "Unknown format": None,
}  # fmt: skip


@pytest.mark.parametrize("text", FORMATS)
def test_the_formats_of_every_release_are_parsed(text: str) -> None:
    assert precision_of_format(text) == FORMATS[text]


def test_a_quantized_weight_keeps_its_part() -> None:
    model = network()
    weight = next(t for t in model.graph.initializer if t.name == "layer1.weight")
    scale = numpy_helper.from_array(np.float32(1e-3), "scale")
    codes = numpy_helper.from_array(np.ones(tuple(weight.dims), np.int8), "layer1.weight_quantized")
    model.graph.initializer.extend([scale, codes])
    convolution = model.graph.node[2]
    convolution.input[1] = "widened"
    back = helper.make_node(
        "DequantizeLinear", ["layer1.weight_quantized", "scale"], ["widened"], name="back"
    )
    model.graph.node.insert(2, back)
    found = operator_parts(model)
    assert (found["node_convolved"], found["node_features"]) == ("layer1", "layer1")
    assert graph_precision(model) == "int8"


PARTS = {
    "input": "moved pixels", "layer1": "convolved features", "fc": "logits",
    "second order": "exact matrix mean centered turned covariance vector",
}  # fmt: skip


def test_parts_are_named_by_weights_and_by_the_product_of_two_computed_matrices() -> None:
    expected = {f"node_{name}": part for part, names in PARTS.items() for name in names.split()}
    assert operator_parts(network()) == expected
    assert (graph_precision(network()), graph_precision(network(half=True))) == ("fp32", "fp16")
