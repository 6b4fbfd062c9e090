"""The layers of an engine must have the precision that the graph asks for."""

import json
import re
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from sopdeploy_export.tensorrt.precision_check import check_engine_precision
from sopdeploy_export.tensorrt.rewrites import graph_precision
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


def test_layers_are_counted_by_precision() -> None:
    found = check_engine_precision(network(half=True), "fp16", inspected(half=True))
    assert (found.warnings, found.layers) == ((), {"fp16": 2, "fp32": 4})
    assert (found.operators, found.operators_seen) == (6, 6)


WRONG: dict[str, tuple[bool, str, dict[str, Any], str]] = {
    "fp16 instead of fp32": (
        False, "node_covariance", {"Outputs": tensor("Half")},
        r"^layer .* computes with fp16, the graph asks for fp32",
    ),
    "tf32": (
        False, "node_covariance", {"TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n"},
        r"tf32, the graph asks for fp32",
    ),
    "fp32 instead of fp16": (
        True, "node_convolved", {"Inputs": tensor("Float"), "Outputs": tensor("Float")},
        r"the graph asks for fp16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_another_precision_than_the_graphs_is_a_warning(case: str) -> None:
    half, node, change, message = WRONG[case]
    information = inspected({node: change}, half=half)
    found = check_engine_precision(network(half=half), "fp16" if half else "fp32", information)
    assert re.search(message, found.warnings[0])


def test_a_low_precision_that_no_layer_has_is_a_warning() -> None:
    exact = {"Inputs": tensor("Float"), "Outputs": tensor("Float")}
    changes = {"node_convolved": exact, "node_features": exact}
    found = check_engine_precision(network(half=True), "fp16", inspected(changes, half=True))
    assert found.warnings[-1] == "the graph asks for fp16, the engine computes in fp32"


def shown(kind: str, name: str, types: str, *operators: str, separator: str = "") -> dict[str, Any]:
    """A layer as inspectors show it; *types* are those of input and output, *operators* its metadata."""
    before, after = types.split(" -> ")
    metadata = separator.join(f"[ONNX Layer: node_{name}]" for name in operators)
    borders = {"Inputs": tensor(WORDS[before]), "Outputs": tensor(WORDS[after])}
    return {"Name": name, "LayerType": kind, **borders} | ({"Metadata": metadata} if operators else {})


# Layouts of the inspector: metadata with separators (10); Myelin's kernels without separators (10 and 11).
WORDS = {
    "HWC": "Channel major FP16 format where channel % 8 == 0",
    "LINEAR": "Row major linear FP32",
    "Half": "Half",
    "Float": "Float",
    "UInt8": "UInt8",
}
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "metadata with separators": [
        shown("CaskConvActPool", "conv", "HWC -> HWC", "convolved", "features", separator="\x1e"),
        shown("Shuffle", "copy", "LINEAR -> HWC"),
        shown("kgen", "mean", "LINEAR -> LINEAR", "mean", "centered", separator="\x1f"),
        shown("gemm", "products", "LINEAR -> LINEAR", "covariance", "logits", separator="\x1f"),
    ],
    "Myelin": [
        shown("kgen", "__myl_MoveCast_myl0_0", "UInt8 -> Half", "pixels"),
        shown("conv", "node_convolved_myl0_1", "Half -> Half", "convolved", "features"),
        shown("kgen", "__myl_CastMeanSub_myl0_2", "Half -> Float", "exact", "mean", "centered"),
        shown("gemm", "node_covariance_myl0_3", "Float -> Float", "covariance"),
        shown("gemm", "node_logits_myl0_4", "Float -> Float", "logits"),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_every_release_are_understood(layout: str) -> None:
    found = check_engine_precision(network(half=True), "fp16", json.dumps({"Layers": LAYOUTS[layout]}))
    assert found.warnings == ()
    assert (found.operators, found.operators_seen) == (6, 6)


def test_reformats_and_layers_without_operators_are_ignored() -> None:
    changes = {
        "node_mean": {"LayerType": "Reformat", "Outputs": tensor("Half")},
        "node_moved": {"Metadata": "", "Name": "shape call", "Outputs": tensor("Half")},
    }
    found = check_engine_precision(network(), "fp32", inspected(changes))
    assert (found.warnings, found.operators_seen) == ((), 5)


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": [{"Name": "other", "LayerType": "gemm"}]}'])
def test_an_inspector_without_types_is_a_warning(text: str) -> None:
    (warning,) = check_engine_precision(network(), "fp32", text).warnings
    assert warning.startswith("the engine's inspector")
    assert warning.endswith("precision is unknown")


def test_the_precision_of_a_graph_is_the_lowest_of_its_products() -> None:
    model = network()
    weight = next(t for t in model.graph.initializer if t.name == "layer1.weight")
    scale = numpy_helper.from_array(np.float32(1e-3), "scale")
    codes = numpy_helper.from_array(np.ones(tuple(weight.dims), np.int8), "layer1.weight_quantized")
    model.graph.initializer.extend([scale, codes])
    model.graph.node[2].input[1] = "widened"
    back = helper.make_node("DequantizeLinear", [codes.name, "scale"], ["widened"], name="back")
    model.graph.node.insert(2, back)
    graphs = network(), network(half=True), model
    assert [graph_precision(graph) for graph in graphs] == ["fp32", "fp16", "int8"]
