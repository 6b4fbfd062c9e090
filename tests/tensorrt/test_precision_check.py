"""The layers of an engine must have the types of the graph."""

import json
from typing import Any

import pytest

from sopdeploy_export.engine_builder.precision_check import check_engine_precision
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


EXACT, MIXED = {"fp32"}, {"fp16", "fp32"}  # types of the values of the graphs


def test_layers_are_counted_by_type() -> None:
    found = check_engine_precision(MIXED, inspected(half=True))
    assert (found.warnings, found.layers) == ((), {"fp16": 2, "fp32": 10})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "fp16 instead of fp32": (
        {"Outputs": tensor("Half")},
        "layer layer of node_covariance computes with fp16, which the graph does not have",
    ),
    "tf32": (
        {"TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n"},
        "layer layer of node_covariance computes with tf32, which the graph does not have",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_type_that_the_graph_does_not_have_is_a_warning(case: str) -> None:
    change, message = WRONG[case]
    found = check_engine_precision(EXACT, inspected({"node_covariance": change}))
    assert found.warnings == (message,)


def test_a_low_precision_that_no_layer_has_is_a_warning() -> None:
    found = check_engine_precision(MIXED, inspected())
    assert found.warnings == ("the graph asks for fp16, the engine computes in fp32",)


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
    found = check_engine_precision(MIXED, json.dumps({"Layers": LAYOUTS[layout]}))
    assert (found.warnings, set(found.layers)) == ((), MIXED)


def test_layers_that_only_move_values_are_ignored() -> None:
    changes = {"node_mean": {"LayerType": "Reformat", "Outputs": tensor("Half")}}
    found = check_engine_precision(EXACT, inspected(changes))
    assert (found.warnings, found.layers) == ((), {"fp32": 11})


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": [{"Name": "other", "LayerType": "gemm"}]}'])
def test_an_inspector_without_types_is_a_warning(text: str) -> None:
    (warning,) = check_engine_precision(EXACT, text).warnings
    assert warning.startswith("the engine's inspector")
    assert warning.endswith("precision is unknown")
