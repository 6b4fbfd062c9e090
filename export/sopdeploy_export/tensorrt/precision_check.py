"""Check that every layer of an engine has the precision that the graph asks for.

A build may succeed with another precision than requested. TensorRT's inspector lists the ONNX operators of
every layer. The check fails if a layer has a floating type that none of its operators has, or if a low
precision of the graph appears nowhere in its part of the engine.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.record import PartPrecision, Receipt
from sopdeploy_export.tensorrt.rewrites import PRECISIONS, operator_parts, operator_precisions, value_types

ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
LOW = frozenset({"fp16", "bf16", "int8"})
MOVES_ONLY = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "shape call", "ShapeHostToDevice"})
# The words of the inspectors of 8.6 ("Row major linear FP16 format") to 11 ("Half"), longest first.
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


@dataclass(frozen=True)
class Requested:
    """The graph's request by operator: precision, part, and floating types of inputs and outputs."""

    precision: Mapping[str, str]
    part: Mapping[str, str]
    border: Mapping[str, "frozenset[str]"]


def precision_of_format(text: str) -> str | None:
    """Parse the floating precision in the inspector's *text*; None for integers."""
    lowered = text.lower()
    if "uint8" in lowered:
        return None
    return next((precision for word, precision in WORDS if word in lowered), None)


def check_engine_precision(model: onnx.ModelProto, requested: str, information: str) -> Receipt:
    """Compare the layers of an engine of *model* with its operators.

    *information* is the inspector's JSON. Raises `EngineError` with the first part that differs.
    """
    types = value_types(model)
    border = {
        node.name: frozenset(
            PRECISIONS[types[name]] for name in (*node.input, *node.output) if types.get(name) in PRECISIONS
        )
        for node in model.graph.node
    }
    wanted = Requested(precision=operator_precisions(model), part=operator_parts(model), border=border)
    layers = _inspected_layers(information)
    realized: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seen: set[str] = set()
    for layer in layers:
        operators = ONNX_LAYER.findall(str(layer.get("Metadata", "")))
        operators = operators or str(layer.get("Name", "")).split(" + ")
        names = [name for name in operators if name in wanted.precision]
        if not names or str(layer.get("LayerType")) in MOVES_ONLY:
            continue
        seen.update(names)
        found = _check_layer(layer, operators, names, wanted)
        for part in {wanted.part[name] for name in names}:
            realized[part].update(found)
    if not seen:
        raise EngineError("the engine's inspector names no operator of the graph; its precision is unknown")
    return Receipt(
        asked=requested,
        parts=_part_precisions(wanted, realized),
        layers=len(layers),
        operators=len(wanted.precision),
        operators_seen=len(seen),
    )


def _part_precisions(wanted: Requested, realized: Mapping[str, Counter[str]]) -> dict[str, PartPrecision]:
    """Collect requested and realized precisions by part, in graph order."""
    requested: dict[str, set[str]] = {}
    for name, precision in wanted.precision.items():
        requested.setdefault(wanted.part[name], set()).add(precision)
    found = {}
    for part, precisions in requested.items():
        seen = dict(sorted(realized.get(part, Counter()).items()))
        missing = (precisions & LOW) - set(seen)
        if missing and seen:
            raise EngineError(
                f"{part}: the graph asks for {min(missing)}, the engine computes in {', '.join(seen)}; "
                "the engine was not kept"
            )
        found[part] = PartPrecision(asked=tuple(sorted(precisions)), realised=seen)
    return found


def _inspected_layers(information: str) -> list[dict[str, Any]]:
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as problem:
        raise EngineError(f"the engine's inspector gave no list of layers ({problem})") from problem
    if not all(isinstance(layer, dict) for layer in layers):
        raise EngineError("the engine's inspector shows layer names only; the precision is unknown")
    return list(layers)


def _check_layer(
    layer: dict[str, Any], operators: Sequence[str], names: Sequence[str], wanted: Requested
) -> list[str]:
    """Check the floating types at the inputs and outputs of *layer*, and list them.

    *names* are those of its *operators* that compute floats.
    """
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    types = {precision_of_format(str(tensor.get("Format/Datatype", ""))) for tensor in tensors}
    found = sorted(precision for precision in types if precision is not None)
    requested = {wanted.precision[name] for name in names}
    allowed = requested.union(*(wanted.border.get(name, frozenset()) for name in operators))
    wrong = None
    if foreign := [precision for precision in found if precision not in allowed]:
        wrong = foreign[0]
    elif len(requested) == 1 and requested <= LOW and found and not requested & set(found):
        wrong = ", ".join(found)
    elif "fp32" in requested and "tf32" in str(layer.get("TacticName", "")).lower():
        wrong = "tf32"
    if wrong is not None:
        raise EngineError(
            f"{wanted.part[names[0]]}: layer {layer.get('Name')} computes with {wrong}, the graph asks for "
            f"{', '.join(sorted(requested))}; the engine was not kept"
        )
    return found
