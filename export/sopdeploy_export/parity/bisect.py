"""Part by part: how far the file is off at each named part; on failure, the first that is, and what to try.

The graph that ships keeps the names that the converter gives the values inside. Converting the network again
gives the same names and, for each, the part it belongs to: so the boundary of every part, and every product
of an iteration, can be read from the file and computed in float64 from the captured graph. A boundary is
off where the file drifts from float64 by more than its own floor allows; the first one is the culprit.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import ExportedProgram

from sopdeploy_export.lower_onnx import named_inside
from sopdeploy_export.parity.report import PartDrift
from sopdeploy_export.parity.session import by_casts, fixed_batch, holds_bfloat16, open_session, widened

PREFIX = "network."
PICTURES = 4
PARTS, PICTURES_OF_PARTS = 40, 2  # what every export can afford, in memory too
HALVES = (torch.float16, torch.bfloat16, torch.float32)
PRODUCTS = ("matmul", "bmm", "baddbmm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """The value called `value` in the file and the graph: what a person calls `part`."""

    value: str
    part: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far the file is off at one boundary, and its floor there, both in the units of that value."""

    part: str
    drift: float
    floor: float

    @property
    def in_floors(self) -> float:
        """Return the drift in multiples of the floor; without end where it is not a number."""
        return self.drift / self.floor if np.isfinite(self.drift) else float("inf")


class Exactly(fx.Interpreter):
    """Runs a captured graph, in float64 where *exact*, and keeps the values asked for by name."""

    def __init__(self, program: ExportedProgram, wanted: Sequence[str], *, exact: bool) -> None:
        module = copy.deepcopy(program.module())
        super().__init__(module.double() if exact else module)
        self.exact, self.wanted = exact, set(wanted)
        self.kept: dict[str, NDArray[Any]] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation; types that the graph names are float64 where all is."""
        if self.exact:
            args = tuple(exact_type(value) for value in args)
            kwargs = {key: exact_type(value) for key, value in kwargs.items()}
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its value if it is wanted."""
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, torch.Tensor):
            self.kept[n.name] = value.double().numpy()
        return value


def exact_type(value: Any) -> Any:
    """Return float64 for a smaller floating-point type, anything else as it is."""
    return torch.float64 if isinstance(value, torch.dtype) and value in HALVES else value


def first_off(
    path: Path, program: ExportedProgram, outputs: Sequence[str], images: NDArray[np.uint8], floors: float
) -> str | None:
    """Say which part of the file at *path*, lowered from *program*, is the first off by over *floors*."""
    for place in drifts(path, program, outputs, images[:PICTURES]):
        if place.in_floors > floors:
            found = f"the first part over its floor is {place.part} ({place.in_floors:.0f} floors)"
            return f"{found}; {advice(place.part)}"
    return None


def part_drifts(
    path: Path, program: ExportedProgram, outputs: Sequence[str], images: NDArray[np.uint8]
) -> tuple[PartDrift, ...]:
    """Return how far the file at *path* is off where a part ends, for at most `PARTS` of them."""
    found = drifts(path, program, outputs, images[-PICTURES_OF_PARTS:], spread_over_depth)
    return tuple(
        PartDrift(part=place.part, drift=place.drift, noise_floor=place.floor)
        for place in found
        if np.isfinite(place.drift)
    )


def spread_over_depth(places: Sequence[Boundary]) -> list[Boundary]:
    """Return the ends of parts and of their direct children; every so many of them where there are many."""
    ends = [place for place in places if ": " not in place.part and place.part.count(".") <= 1]
    if len(ends) <= PARTS:
        return ends
    return [ends[position] for position in np.linspace(0, len(ends) - 1, PARTS).round().astype(int)]


def drifts(
    path: Path,
    program: ExportedProgram,
    outputs: Sequence[str],
    images: NDArray[np.uint8],
    choose: Callable[[Sequence[Boundary]], Sequence[Boundary]] = lambda places: places,
) -> Iterator[Drift]:
    """Give the drift of the file at *path*, lowered from *program*, at the boundaries chosen."""
    model = onnx.load(path)
    images = images[: fixed_batch(model)]
    converted = named_inside(program, outputs, max(opset.version for opset in model.opset_import))
    if converted is None:
        return
    places = choose(boundaries(converted, model))
    names = [place.value for place in places]
    found = run_file(model, names, images)
    runs = {}
    with torch.no_grad():
        for exact in (True, False):
            interpreter = Exactly(converted, names, exact=exact)
            interpreter.run(torch.from_numpy(images))
            runs[exact] = interpreter.kept
    for place in places:
        drift = drift_at(place, found, runs[True], runs[False])
        if drift is not None:
            yield drift


def drift_at(
    place: Boundary, found: Mapping[str, Any], exact: Mapping[str, Any], own: Mapping[str, Any]
) -> Drift | None:
    """Return how far the file is off at *place*, and the floor of the graph's own run; None if unknown."""
    name = place.value
    if name not in exact or name not in own or found[name].shape != exact[name].shape:
        return None
    finite = np.abs(exact[name][np.isfinite(exact[name])])
    smallest = 4 * float(np.finfo(np.float32).eps) * float(finite.max(initial=0.0))
    floor = max(smallest, farthest(own[name], exact[name]), 1e-30)
    return Drift(part=place.part, drift=farthest(found[name], exact[name]), floor=floor)


def farthest(values: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return the largest difference; an infinity in both, as a gate gives what it leaves out, is none."""
    same = values == exact
    difference = np.where(same, 0.0, values.astype(np.float64)) - np.where(same, 0.0, exact)
    return float(np.abs(difference).max(initial=0.0))


def boundaries(program: ExportedProgram, model: onnx.ModelProto) -> list[Boundary]:
    """Return the values of *model* where a part ends, and the products within second-order parts."""
    known = {name for node in model.graph.node for name in node.output}
    ends: dict[str, str] = {}
    inner: list[tuple[str, str]] = []
    order: dict[str, int] = {}
    products: dict[str, int] = {}
    for position, node in enumerate(program.graph.nodes):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op != "call_function" or not stack or node.name not in known:
            continue
        order[node.name] = position
        for path, _ in stack:
            ends[path.removeprefix(PREFIX)] = node.name
        kind, part = node.name.rstrip("0123456789").rstrip("_"), stack[-1][0].removeprefix(PREFIX)
        if kind in PRODUCTS:
            label, products[part] = product_name(kind, products.get(part, 0))
            inner.append((node.name, f"{part}: {label}"))
        elif kind in {"clamp_min", "index_select", "masked_fill"}:
            inner.append((node.name, f"{part}: {INNER[kind]}"))
    named = [(value, part) for part, value in ends.items() if part and part != "network"]
    places = dict([*named, *inner])
    return [Boundary(value=value, part=places[value]) for value in sorted(places, key=order.__getitem__)]


INNER = {"clamp_min": "trace", "index_select": "triangle", "masked_fill": "gate"}


def product_name(kind: str, count: int) -> tuple[str, int]:
    """Return what a product within a second-order part is called, after *count* steps of the iteration."""
    if kind == "baddbmm":
        return f"iteration {count + 1}", count + 1
    return ("covariance", 1) if count == 0 else (f"iteration {count}", count)


def run_file(
    model: onnx.ModelProto, names: Sequence[str], images: NDArray[np.uint8], *, optimised: bool = True
) -> dict[str, Any]:
    """Return the values called *names* in *model* for *images*, with the runtime's fusions or without."""
    probed, wanted = onnx.shape_inference.infer_shapes(model), list(names)
    if holds_bfloat16(model):
        probed, wanted = widened(by_casts(model), names)
    outputs = {value.name for value in probed.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in outputs)
    session: ort.InferenceSession = open_session(probed, optimised=optimised)
    values = session.run(wanted, {session.get_inputs()[0].name: images})
    return dict(zip(names, values, strict=True))


def advice(part: str) -> str:
    """Return the switch to try for *part*."""
    if ": iteration" in part:
        return (
            "its products round too much: --newton-schulz fp32, and no TF32 or half precision in the runtime"
        )
    if ": covariance" in part or ": trace" in part:
        return "second-order statistics need float32: forbid TF32 and half precision in the runtime"
    if ": triangle" in part:
        return "the file takes other elements of the matrix: export it again"
    return "try --no-lowering, or --precision fp32"
