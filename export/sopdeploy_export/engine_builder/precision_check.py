"""Compare the types of an engine's layers, which TensorRT's inspector lists, with those of the graph.

A build may succeed with another precision than requested. The check warns if a layer has a floating type that
no value of the graph has, or computes in TF32, and if a low precision of the graph appears in no layer. It
cannot prove that an engine is wrong: the inspector's layout differs between releases, and fused layers hide
types. The bundle's probes decide.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sopdeploy.tensorrt.cache import Receipt

TYPE_KEYS = ("Format/Datatype", "Datatype")
LOW = frozenset({"fp16", "bf16", "int8"})
MOVES_ONLY = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "shape call", "ShapeHostToDevice"})
_UNKNOWN = "the engine's inspector {}; the precision is unknown"
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


def check_engine_precision(graph_types: set[str], information: str) -> Receipt:
    """Count the layers by type and compare with *graph_types*, the floating types of the values of the graph.

    *information* is the inspector's JSON. The receipt holds a warning for each difference, and one if the
    inspector shows no types.
    """
    try:
        layers = [layer for layer in json.loads(information)["Layers"] if _computes(layer)]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        return Receipt(layers={}, warnings=(_UNKNOWN.format(f"gave no list of layers ({problem})"),))
    counts, warnings = Counter[str](), []
    for layer in layers:
        types = _floating_types(layer)
        counts.update(types)
        where = f"layer {layer.get('Name')} computes with"
        warnings += [
            f"{where} {wrong}, which the graph does not have" for wrong in sorted(types - graph_types)
        ]
    if not counts:
        warnings.append(_UNKNOWN.format("shows no types of layers"))
    elif missing := sorted(graph_types & LOW - set(counts)):
        warnings.append(
            f"the graph asks for {missing[0]}, the engine computes in {', '.join(sorted(counts))}"
        )
    return Receipt(layers=dict(sorted(counts.items())), warnings=tuple(dict.fromkeys(warnings)))


def _computes(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") not in MOVES_ONLY


def _floating_types(layer: Mapping[str, Any]) -> set[str]:
    """List the floating types at the inputs and outputs of *layer*, and TF32 if its tactic names it."""
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    shown = [str(next((tensor[key] for key in TYPE_KEYS if key in tensor), "")) for tensor in tensors]
    shown = [text.lower() for text in shown if "uint8" not in text.lower()]
    types = {next((precision for word, precision in WORDS if word in text), "") for text in shown} - {""}
    return types | ({"tf32"} if "tf32" in str(layer.get("TacticName", "")).lower() else set())
