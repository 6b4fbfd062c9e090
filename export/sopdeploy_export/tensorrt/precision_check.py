"""The precision receipt: what the graph asked for, and what the engine's inspector shows it became.

A builder may end without an error and hand out another precision than was asked for. So every layer of the
finished engine is compared with the operators it was made of (TensorRT notes their names in the layer): a
floating type at its border that none of them has at theirs, or a low precision that was asked for and
is nowhere to be seen, fails the build.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.record import PartPrecision, Receipt
from sopdeploy_export.tensorrt.rewrites import PRECISIONS, asked_precisions, parts, value_types

ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
LOW = frozenset({"fp16", "bf16", "int8"})
MOVES_ONLY = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "shape call", "ShapeHostToDevice"})
# what the inspectors of 8.6 ("Row major linear FP16 format") to 11 ("Half") write, longest first
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
class Asked:
    """What the graph says by operator: precision, part, the floating types it takes and gives."""

    precision: Mapping[str, str]
    part: Mapping[str, str]
    border: Mapping[str, "frozenset[str]"]


def what_was_asked(model: onnx.ModelProto) -> Asked:
    """Return what *model* asks of every operator."""
    types = value_types(model)
    border = {
        node.name: frozenset(
            PRECISIONS[types[name]] for name in (*node.input, *node.output) if types.get(name) in PRECISIONS
        )
        for node in model.graph.node
    }
    return Asked(precision=asked_precisions(model), part=parts(model), border=border)


def word_to_precision(text: str) -> str | None:
    """Return the floating precision that the inspector's *text* names; `None` for whole numbers."""
    lowered = text.lower()
    if "uint8" in lowered:
        return None
    return next((precision for word, precision in WORDS if word in lowered), None)


def receipt(model: onnx.ModelProto, asked: str, information: str) -> Receipt:
    """Return the receipt for an engine of *model*, by the inspector's JSON *information*.

    Raises `EngineError` naming the first part that is not what was asked for.
    """
    wanted = what_was_asked(model)
    layers = inspected_layers(information)
    realised: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seen: set[str] = set()
    for layer in layers:
        names = [name for name in operators_of(layer) if name in wanted.precision]
        if not names or str(layer.get("LayerType")) in MOVES_ONLY:
            continue
        seen.update(names)
        found = border_precisions(layer)
        compare_layer(layer, names, found, wanted)
        for part in {wanted.part[name] for name in names}:
            realised[part].update(found)
    if not seen:
        raise EngineError("the engine's inspector names no operator of the graph; its precision is not known")
    return Receipt(
        asked=asked,
        parts=part_precisions(wanted, realised),
        layers=len(layers),
        operators=len(wanted.precision),
        operators_seen=len(seen),
    )


def receipt_without_operators(information: str) -> Receipt:
    """Return the receipt of an engine whose layers name no operator and which must be float32 throughout.

    Raises `EngineError` where a layer computes with another floating type, or in TF32.
    """
    layers = inspected_layers(information)
    whole = "network"
    wanted = Asked(precision={whole: "fp32"}, part={whole: whole}, border={})
    realised: Counter[str] = Counter()
    for layer in layers:
        if str(layer.get("LayerType")) not in MOVES_ONLY:
            found = border_precisions(layer)
            compare_layer(layer, [whole], found, wanted)
            realised.update(found)
    if not realised:
        raise EngineError("the engine's inspector shows no floating type; its precision is not known")
    part = PartPrecision(asked=("fp32",), realised=dict(realised))
    return Receipt(asked="fp32", parts={whole: part}, layers=len(layers), operators=0, operators_seen=0)


def part_precisions(wanted: Asked, realised: Mapping[str, Counter[str]]) -> dict[str, PartPrecision]:
    """Return asked and realised by part, in the order of the graph; a low precision must be seen."""
    asked_by_part: dict[str, set[str]] = {}
    for name, precision in wanted.precision.items():
        asked_by_part.setdefault(wanted.part[name], set()).add(precision)
    found = {
        part: PartPrecision(
            asked=tuple(sorted(asked)), realised=dict(sorted(realised.get(part, Counter()).items()))
        )
        for part, asked in asked_by_part.items()
    }
    for part, shown in found.items():
        lost = (set(shown.asked) & LOW) - set(shown.realised)
        if lost and shown.realised:
            raise EngineError(
                f"{part}: {min(lost)} was asked for, the engine computes in "
                f"{', '.join(shown.realised)}; no engine was kept"
            )
    return found


def inspected_layers(information: str) -> list[dict[str, Any]]:
    """Return the layers in the inspector's JSON, which must be detailed."""
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as problem:
        raise EngineError(f"the engine's inspector gave no list of layers ({problem})") from problem
    if not all(isinstance(layer, dict) for layer in layers):
        raise EngineError("the engine's inspector gives names only; its precision is not known")
    return list(layers)


def operators_of(layer: dict[str, Any]) -> list[str]:
    """Return the names of the ONNX operators that an inspected *layer* was made of."""
    named: list[str] = ONNX_LAYER.findall(str(layer.get("Metadata", "")))
    return named or str(layer.get("Name", "")).split(" + ")


def border_precisions(layer: dict[str, Any]) -> dict[str, int]:
    """Return the floating precisions at the inputs and outputs of *layer*, once for the layer."""
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    found = {word_to_precision(str(tensor.get("Format/Datatype", ""))) for tensor in tensors}
    return {precision: 1 for precision in sorted(found - {None}, key=str) if precision is not None}


def compare_layer(layer: dict[str, Any], names: list[str], found: Mapping[str, int], wanted: Asked) -> None:
    """Refuse a *layer* made of the operators *names* with a type that none of them has, or with TF32."""
    asked = {wanted.precision[name] for name in names}
    allowed = asked.union(*(wanted.border.get(name, frozenset()) for name in operators_of(layer)))
    foreign = sorted(set(found) - allowed)
    where = f"{wanted.part[names[0]]}: layer {layer.get('Name')}"
    if foreign:
        raise EngineError(
            f"{where} computes with {foreign[0]}, the graph asks for {', '.join(sorted(asked))}; "
            "no engine was kept"
        )
    if len(asked) == 1 and asked <= LOW and found and not asked & set(found):
        raise EngineError(
            f"{where} computes with {', '.join(found)}, the graph asks for {min(asked)}; no engine was kept"
        )
    if "fp32" in asked and "tf32" in str(layer.get("TacticName", "")).lower():
        raise EngineError(f"{where} computes with tf32, the graph asks for fp32; no engine was kept")
