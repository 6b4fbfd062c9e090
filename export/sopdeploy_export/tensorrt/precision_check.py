"""Check that every layer of an engine has the precision that the graph asks for.

A build may succeed with another precision than requested. TensorRT's inspector lists the ONNX operators of
every layer. The check warns if a layer has a floating type that none of its operators has, or if a low
precision of the graph appears nowhere in its part of the engine. It cannot prove that an engine is wrong: the
inspector's layout differs between releases, and fused layers hide types. The bundle's probes decide.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from sopdeploy.tensorrt.record import PartPrecision, Receipt
from sopdeploy_export.tensorrt.rewrites import PRECISIONS, operator_parts, operator_precisions, value_types

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


@dataclass(frozen=True)
class Requested:
    """What the graph requests, by operator: precision, part, floating types of inputs and outputs."""

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

    *information* is the inspector's JSON. The receipt holds a warning for each difference, and one if the
    inspector shows too little to compare.
    """
    types = value_types(model)
    border = {
        node.name: frozenset(
            PRECISIONS[types[name]] for name in (*node.input, *node.output) if types.get(name) in PRECISIONS
        )
        for node in model.graph.node
    }
    wanted = Requested(precision=operator_precisions(model), part=operator_parts(model), border=border)
    layers, warnings = _inspected_layers(information)
    actual: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seen: set[str] = set()
    for layer in layers:
        operators = ONNX_LAYER.findall(str(layer.get("Metadata", "")))
        operators = operators or NAME_PARTS.split(str(layer.get("Name", "")))
        names = [name for name in operators if name in wanted.precision]
        if not names or str(layer.get("LayerType")) in MOVES_ONLY:
            continue
        seen.update(names)
        found = _floating_types(layer)
        warning = _layer_warning(layer, found, operators, wanted)
        warnings += [warning] if warning else []
        for part in {wanted.part[name] for name in names}:
            actual[part].update(found)
    if layers and not seen:
        warnings.append("the engine's inspector names no operator of the graph; its precision is unknown")
    parts = _part_precisions(wanted, actual)
    for part, both in parts.items():
        missing = (set(both.requested) & LOW) - set(both.actual)
        if missing and both.actual:
            computed = ", ".join(both.actual)
            warnings.append(f"{part}: the graph asks for {min(missing)}, the engine computes in {computed}")
    return Receipt(
        requested=requested,
        parts=parts,
        layers=len(layers),
        operators=len(wanted.precision),
        operators_seen=len(seen),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _part_precisions(wanted: Requested, actual: Mapping[str, Counter[str]]) -> dict[str, PartPrecision]:
    """Collect requested and actual precisions by part, in graph order."""
    requested: dict[str, set[str]] = {}
    for name, precision in wanted.precision.items():
        requested.setdefault(wanted.part[name], set()).add(precision)
    return {
        part: PartPrecision(
            requested=tuple(sorted(precisions)), actual=dict(sorted(actual.get(part, Counter()).items()))
        )
        for part, precisions in requested.items()
    }


def _inspected_layers(information: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the layers in the inspector's JSON; if it lists none or no types, return a warning instead."""
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as problem:
        return [], [f"the engine's inspector gave no list of layers ({problem}); the precision is unknown"]
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        return [], ["the engine's inspector shows no types of layers; the precision is unknown"]
    return list(layers), []


def _floating_types(layer: dict[str, Any]) -> list[str]:
    """List the floating types at the inputs and outputs of *layer*."""
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    shown = (next((tensor[key] for key in TYPE_KEYS if key in tensor), "") for tensor in tensors)
    types = {precision_of_format(str(text)) for text in shown}
    return sorted(precision for precision in types if precision is not None)


def _layer_warning(
    layer: dict[str, Any], found: Sequence[str], operators: Sequence[str], wanted: Requested
) -> str | None:
    """Compare the types *found* at *layer* with those of its *operators*; None if they agree."""
    names = [name for name in operators if name in wanted.precision]
    requested = {wanted.precision[name] for name in names}
    allowed = requested.union(*(wanted.border.get(name, frozenset()) for name in operators))
    wrong = None
    if foreign := [precision for precision in found if precision not in allowed]:
        wrong = foreign[0]
    elif len(requested) == 1 and requested <= LOW and found and not requested & set(found):
        wrong = ", ".join(found)
    elif "fp32" in requested and "tf32" in str(layer.get("TacticName", "")).lower():
        wrong = "tf32"
    if wrong is None:
        return None
    part, expected = wanted.part[names[0]], ", ".join(sorted(requested))
    return f"{part}: layer {layer.get('Name')} computes with {wrong}, the graph asks for {expected}"
