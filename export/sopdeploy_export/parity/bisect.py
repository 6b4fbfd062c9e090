"""Part by part: how far the file is off at each named part; on failure, the first that is, and what to try.

The graph that ships keeps the names that the converter gives the values inside. Converting the network again
gives the same names and, for each, the part it belongs to: so the boundary of every part, and every product
of an iteration, can be read from the file and computed in float64 from the captured graph. A boundary is
off where the file drifts from float64 by more than its own floor allows; the first one is the culprit.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from sopdeploy_export.graph.onnx_export import with_converter_names
from sopdeploy_export.parity.report import PartDrift
from sopdeploy_export.parity.session import by_casts, fixed_batch, holds_bfloat16, open_session, widened


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """What a person calls `part` ends with the value that the file calls `value` and the graph `node`."""

    value: str
    node: str
    part: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far the file is off at one boundary, and its floor there, both in the units of that value.

    `share` is the root mean square of the first over the standard deviation of the value.
    """

    part: str
    drift: float
    floor: float
    share: float

    @property
    def in_floors(self) -> float:
        """Return the drift in multiples of the floor; without end where it is not a number."""
        return self.drift / self.floor if np.isfinite(self.drift) else float("inf")


def drift_at(part: str, found: NDArray[Any], exact: NDArray[Any], own: NDArray[Any]) -> Drift:
    """Return how far *found* is off at *part* from *exact*, and the floor: how far its *own* run is."""
    largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
    smallest = 4 * float(np.finfo(np.float32).eps) * largest
    return Drift(
        part=part,
        drift=farthest(found, exact),
        floor=max(smallest, farthest(own, exact), 1e-30),
        share=share_of_spread(found, exact),
    )


def farthest(values: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return the largest difference; an infinity in both, as a gate gives what it leaves out, is none."""
    return float(np.abs(difference(values, exact)).max(initial=0.0))


def share_of_spread(values: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return the root mean square difference over the standard deviation of what is finite in *exact*."""
    spread = float(exact[np.isfinite(exact)].std()) or 1.0
    return float(np.sqrt(np.square(difference(values, exact)).mean())) / spread


def difference(values: NDArray[Any], exact: NDArray[Any]) -> NDArray[np.float64]:
    """Return *values* - *exact* in float64, 0 where they are equal."""
    same = values == exact
    found: NDArray[np.float64] = np.where(same, 0.0, values.astype(np.float64)) - np.where(same, 0.0, exact)
    return found


def finite(found: Iterable[Drift]) -> tuple[PartDrift, ...]:
    """Return what a report can say of *found*: all that is a number."""
    return tuple(
        PartDrift(part=place.part, drift=place.drift, noise_floor=place.floor, share=place.share)
        for place in found
        if np.isfinite(place.drift)
    )


PREFIX = "network."
PICTURES = 4
PARTS, PICTURES_OF_PARTS = 40, 2  # what every export can afford, in memory too
HALVES = (torch.float16, torch.bfloat16, torch.float32)
PRODUCTS = ("matmul", "bmm", "baddbmm")


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


def find_first_drift(
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
    return finite(found)


def spread_over_depth(places: Sequence[Boundary]) -> list[Boundary]:
    """Return the ends of parts and of their direct children; where they are many, `PARTS` of them."""
    ends = [place for place in places if is_end(place.part)]
    if len(ends) <= PARTS:
        return ends
    return [ends[position] for position in np.linspace(0, len(ends) - 1, PARTS).round().astype(int)]


def is_end(part: str) -> bool:
    """Say whether *part* ends there, or what a second-order part begins and ends with."""
    name, _, inner = part.partition(": ")
    return name.count(".") <= 1 and inner in {"", "covariance", "triangle"}


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
    converted = with_converter_names(program, outputs, max(opset.version for opset in model.opset_import))
    if converted is None:
        return
    places = choose(boundaries(converted, model))
    found = run_file(model, [place.value for place in places], images)
    runs: dict[bool, dict[str, NDArray[Any]]] = {}
    with torch.no_grad():
        for exact in (True, False):
            interpreter = Exactly(converted, [place.node for place in places], exact=exact)
            interpreter.run(torch.from_numpy(images))
            runs[exact] = interpreter.kept
    for place in places:
        if place.node in runs[True] and found[place.value].shape == runs[True][place.node].shape:
            kept = (runs[exact][place.node] for exact in (True, False))
            yield drift_at(place.part, found[place.value], *kept)


def boundaries(program: ExportedProgram, model: onnx.ModelProto) -> list[Boundary]:
    """Return the values of *model* where a part ends, and the products within second-order parts."""
    known = {name for node in model.graph.node for name in node.output}
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    shown = dict(zip(results, (value.name for value in model.graph.output), strict=True))
    ends: dict[str, str] = {}
    inner: list[tuple[str, str]] = []
    values: dict[str, str] = {}
    products: dict[str, int] = {}
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        value = shown.get(node, node.name)
        if node.op != "call_function" or not stack or value not in known:
            continue
        values[node.name] = value
        for path, _ in stack:
            ends[path.removeprefix(PREFIX)] = node.name
        kind, part = kind_of(node), stack[-1][0].removeprefix(PREFIX)
        if kind in PRODUCTS or (part in products and adds_to_product(node)):
            label, products[part] = product_name(kind, products.get(part, 0))
            inner.append((node.name, f"{part}: {label}"))
        elif kind in {"clamp_min", "index_select", "masked_fill"}:
            inner.append((node.name, f"{part}: {INNER[kind]}"))
    named = [(name, part) for part, name in ends.items() if part and part != "network"]
    places = dict([*named, *inner])
    return [Boundary(value=values[name], node=name, part=places[name]) for name in values if name in places]


def kind_of(node: fx.Node) -> str:
    """Return what *node* computes, as the converter calls it: `matmul` of `matmul_4`."""
    return node.name.rstrip("0123456789").rstrip("_")


def adds_to_product(node: fx.Node) -> bool:
    """Say whether *node* adds to a product, as the end of a step does where the two are not one operator."""
    return kind_of(node) == "add" and any(kind_of(operand) in PRODUCTS for operand in node.all_input_nodes)


INNER = {"clamp_min": "trace", "index_select": "triangle", "masked_fill": "gate"}


def product_name(kind: str, count: int) -> tuple[str, int]:
    """Return what a product within a second-order part is called, after *count* steps of the iteration."""
    if kind in {"baddbmm", "add"}:
        return f"iteration {count + 1}", count + 1
    return ("covariance", 1) if count == 0 else (f"iteration {count}", count)


def run_file(
    model: onnx.ModelProto, names: Sequence[str], images: NDArray[np.uint8], *, optimized: bool = True
) -> dict[str, Any]:
    """Return the values called *names* in *model* for *images*, with the runtime's fusions or without.

    bfloat16 is emulated here as where the file is compared: without them, which could take casts away.
    """
    if emulated := holds_bfloat16(model):
        probed, wanted = widened(by_casts(model), names)
    else:
        probed, wanted = onnx.shape_inference.infer_shapes(model), list(names)
    outputs = {value.name for value in probed.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in outputs)
    session: ort.InferenceSession = open_session(probed, optimized=optimized and not emulated)
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
