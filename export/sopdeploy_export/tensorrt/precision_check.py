"""Check that every layer of an engine has the precision that the graph asks for.

A build may succeed with another precision than requested. TensorRT's inspector lists the ONNX operators of
every layer. The check warns if a layer has a floating type that none of its operators has, or if a low
precision of the graph appears nowhere in the engine. It cannot prove that an engine is wrong: the inspector's
layout differs between releases, and fused layers hide types. The bundle's probes decide.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from sopdeploy.tensorrt.record import Receipt
from sopdeploy_export.tensorrt.rewrites import PRECISIONS, operator_precisions, value_types

ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
NAME_PARTS = re.compile(r"[\s+(),]+")  # separates the names in "conv + relu" and "PWN(PWN(relu), add)"
TYPE_KEYS = ("Format/Datatype", "Datatype")
LOW = frozenset({"fp16", "bf16", "int8"})
MOVES_ONLY = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "shape call", "ShapeHostToDevice"})
# The words of the inspectors of 10 ("Row major linear FP16 format") and 11 ("Half"), longest first.
WORDS = (
    ("bfloat16", "bf16"),
    ("bf16", "bf16"),
    ("half", "fp16"),
    ("fp16", "fp16"),
    ("int8", "int8"),
    ("fp8", "fp8"),
    ("fp32", "fp32"),
    ("float", "fp32"),
)


def precision_of_format(text: str) -> str | None:
    """Parse the floating precision in the inspector's *text*; None for integers."""
    lowered = text.lower()
    if "uint8" in lowered:
        return None
    return next((precision for word, precision in WORDS if word in lowered), None)


def check_engine_precision(model: onnx.ModelProto, requested: str, information: str) -> Receipt:
    """Compare the layers of an engine of *model* with its operators.

    *information* is the inspector's JSON. The receipt holds a warning for each difference, and one if the
    inspector shows too little to compare.
    """
    types, operator_types = value_types(model), operator_precisions(model)
    bordering = {  # precisions of the inputs and outputs of each operator
        node.name: {
            PRECISIONS[types[name]] for name in (*node.input, *node.output) if types.get(name) in PRECISIONS
        }
        for node in model.graph.node
    }
    layers, warnings = _inspected_layers(information)
    layer_counts: Counter[str] = Counter()
    seen: set[str] = set()
    for layer in layers:
        fused = ONNX_LAYER.findall(str(layer.get("Metadata", "")))
        fused = fused or NAME_PARTS.split(str(layer.get("Name", "")))
        operators = [name for name in fused if name in operator_types]
        if not operators or str(layer.get("LayerType")) in MOVES_ONLY:
            continue
        seen.update(operators)
        actual = _floating_types(layer)
        layer_counts.update(actual)
        requested_types = {operator_types[name] for name in operators}
        allowed = requested_types.union(*(bordering.get(name, ()) for name in fused))
        wrong = _wrong_type(layer, actual, requested_types, allowed)
        if wrong is not None:
            expected = ", ".join(sorted(requested_types))
            warnings.append(f"layer {layer.get('Name')} computes with {wrong}, the graph asks for {expected}")
    if layers and not seen:
        warnings.append("the engine's inspector names no operator of the graph; its precision is unknown")
    missing = sorted((set(operator_types.values()) & LOW) - set(layer_counts))
    if missing and layer_counts:
        warnings.append(
            f"the graph asks for {missing[0]}, the engine computes in {', '.join(sorted(layer_counts))}"
        )
    return Receipt(
        requested=requested,
        layers=dict(sorted(layer_counts.items())),
        operators=len(operator_types),
        operators_seen=len(seen),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def list_precisions(requested: str, information: str) -> Receipt:
    """List the floating types of the layers of an engine whose layers have other names than the ONNX graph.

    *information* is the inspector's JSON. A warning names lower precisions than the *requested* float32.
    """
    layers, warnings = _inspected_layers(information)
    types = Counter(precision for layer in layers for precision in _floating_types(layer))
    if lower := sorted(set(types) & LOW):
        warnings.append(f"layers compute with {', '.join(lower)}, the program asks for {requested}")
    return Receipt(
        requested=requested,
        layers=dict(sorted(types.items())),
        operators=len(layers),
        operators_seen=len(layers),
        warnings=tuple(warnings),
    )


def _inspected_layers(information: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the layers in the inspector's JSON; if it lists none or no types, return a warning instead."""
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as problem:
        return [], [f"the engine's inspector gave no list of layers ({problem}); the precision is unknown"]
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        return [], ["the engine's inspector shows no types of layers; the precision is unknown"]
    return list(layers), []


def _floating_types(layer: Mapping[str, Any]) -> list[str]:
    """List the floating types at the inputs and outputs of *layer*."""
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    shown = (next((tensor[key] for key in TYPE_KEYS if key in tensor), "") for tensor in tensors)
    types = {precision_of_format(str(text)) for text in shown}
    return sorted(precision for precision in types if precision is not None)


def _wrong_type(
    layer: Mapping[str, Any], types: Sequence[str], requested: set[str], allowed: set[str]
) -> str | None:
    """Name a type that *layer* uses although the graph does not ask for it; None if all types fit.

    *types* are the types at the inputs and outputs of the layer. *requested* are the precisions of the
    operators in it; *allowed* adds the types at the inputs and outputs of these operators.
    """
    if not_allowed := [precision for precision in types if precision not in allowed]:
        return not_allowed[0]
    if len(requested) == 1 and requested <= LOW and types and not requested & set(types):
        return ", ".join(types)
    if "fp32" in requested and "tf32" in str(layer.get("TacticName", "")).lower():
        return "tf32"
    return None
