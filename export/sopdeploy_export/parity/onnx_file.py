"""Run the exported file in ONNX Runtime, and measure its drift module by module.

Files run with the graph optimizations used for serving. ONNX Runtime has no bfloat16 CPU kernels, so bfloat16
graphs are emulated: each bfloat16 operator runs in float32 between two casts, without graph optimizations,
which could remove the casts. As on a GPU, results are rounded to bfloat16 and sums are float32; only speed
and kernels differ. Reports of such files contain the sentence `EMULATION`.

The exported graph keeps the value names of the converter. Converting the network again gives the same names
and, for each value, its module. So the output of every module and every product of a Newton-Schulz iteration
can be read from the file and computed in float64 from the captured graph, and the first module that exceeds
its noise floor can be named.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
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

from sopdeploy.environment import EXACT_INT8
from sopdeploy.errors import ParityError
from sopdeploy_export.graph import PREFIX, InFloat64, with_converter_names
from sopdeploy_export.parity.report import PROVIDER, PartDrift

Arrays = dict[str, NDArray[Any]]
BFLOAT16 = onnx.TensorProto.BFLOAT16
EMULATION = (
    "this runtime has no bfloat16 kernels: each bfloat16 operator was computed in float32, and its result "
    "was rounded to bfloat16"
)


def open_session(model: Path | onnx.ModelProto, *, optimized: bool = True) -> ort.InferenceSession:
    """Load *model* on the CPU; bfloat16 files are emulated.

    Raises `ParityError` if ONNX Runtime chose another execution provider.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_INT8)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    if isinstance(model, Path) and has_bfloat16(loaded := onnx.load(model)):
        source, optimized = emulate_bfloat16(loaded).SerializeToString(), False
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(source, options, providers=[PROVIDER])
    if session.get_providers()[0] != PROVIDER:
        raise ParityError(f"onnxruntime runs on {session.get_providers()[0]}, not on {PROVIDER}")
    return session


def file_outputs(session: ort.InferenceSession, images: NDArray[np.uint8], batch: int) -> Arrays:
    """Run *images* in batches of exactly *batch* images; repeated images fill the last batch.

    Raises `ParityError` if the file does not accept this batch size.
    """
    source = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]
    chunks = []
    for start in range(0, len(images), batch):
        indices = np.arange(start, start + batch) % len(images)
        try:
            chunks.append(session.run(names, {source: images[indices]}))
        except Exception as problem:  # onnxruntime's errors share no base class
            reason = str(problem).strip().partition("\n")[0][:200]
            raise ParityError(f"the exported file rejects a batch of {batch}: {reason}") from problem
    joined = (np.concatenate(values)[: len(images)] for values in zip(*chunks, strict=True))
    return dict(zip(names, joined, strict=True))


def run_one(path: Path, batch: int) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Build a function that computes the logits (C,) of one image (H, W, 3) with the file at *path*.

    The image is repeated *batch* times.
    """
    session = open_session(path)
    source, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run([output], {source: np.repeat(pixels[None], batch, 0)})[0][0]
        return logits

    return run


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Read the fixed batch size of *model*, set by `--max-batch 1`; None if the batch axis is dynamic."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def has_bfloat16(model: onnx.ModelProto) -> bool:
    """Return whether any weight of *model* is bfloat16."""
    return any(tensor.data_type == BFLOAT16 for tensor in model.graph.initializer)


def emulate_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy *model* with every bfloat16 operator computed in float32 between two casts."""
    typed = onnx.shape_inference.infer_shapes(model)
    narrow = _bfloat16_values(typed)
    narrow |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == BFLOAT16}
    nodes: list[onnx.NodeProto] = []
    widened: set[str] = set()
    for node in typed.graph.node:
        if node.op_type == "Cast":
            nodes.append(node)
            widened.update(node.output)
            continue
        after = []
        for position, name in enumerate(node.input):
            if name in narrow:
                node.input[position] = f"{name}:wide"
                if f"{name}:wide" not in widened:
                    nodes.append(_cast(name, f"{name}:wide", onnx.TensorProto.FLOAT))
                    widened.add(f"{name}:wide")
        for position, name in enumerate(node.output):
            if name in narrow:
                node.output[position] = f"{name}:exact"
                after.append(_cast(f"{name}:exact", name, BFLOAT16))
        nodes += [node, *after]
    del typed.graph.node[:]
    typed.graph.node.extend(nodes)
    del typed.graph.value_info[:]
    return typed


def cast_to_float32(model: onnx.ModelProto, names: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """Copy *model* and cast the bfloat16 values among *names* to float32, because numpy cannot read them.

    Returns the copy and, for each of *names*, the name of the readable value.
    """
    typed = onnx.shape_inference.infer_shapes(model)
    narrow = _bfloat16_values(typed)
    existing = {output for node in typed.graph.node for output in node.output}
    for name in narrow.intersection(names):
        if f"{name}:wide" not in existing:
            typed.graph.node.append(_cast(name, f"{name}:wide", onnx.TensorProto.FLOAT))
    return typed, [f"{name}:wide" if name in narrow else name for name in names]


def _bfloat16_values(typed: onnx.ModelProto) -> set[str]:
    return {v.name for v in typed.graph.value_info if v.type.tensor_type.elem_type == BFLOAT16}


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], to=to)


IMAGES = 4
MAX_PARTS, PART_IMAGES = 40, 2  # limits time and memory of every export
PRODUCTS = ("matmul", "bmm", "baddbmm")
SECOND_ORDER = "second-order statistics need float32: disable TF32 and half precision in the runtime"
ADVICE = {  # by the step inside a second-order module
    "iteration": "its products lose precision: try --newton-schulz fp32, and disable TF32 and half precision",
    "covariance": SECOND_ORDER,
    "trace": SECOND_ORDER,
    "triangle": "the file selects other matrix elements: export it again",
}
INNER = {"clamp_min": "trace", "index_select": "triangle", "masked_fill": "gate"}  # operation: step


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """The output of module `part`: its name `value` in the file and `node` in the captured graph."""

    value: str
    node: str
    part: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Drift and noise floor of the value at one boundary, in the units of that value.

    `share` is the root mean square error divided by the standard deviation of the value.
    """

    part: str
    drift: float
    floor: float
    share: float

    @property
    def in_floors(self) -> float:
        """The drift in multiples of the noise floor; infinite if the drift is not finite."""
        return self.drift / self.floor if np.isfinite(self.drift) else float("inf")


def measure_drift(part: str, found: NDArray[Any], exact: NDArray[Any], own: NDArray[Any]) -> Drift:
    """Compute the drift of *found* from *exact*; the noise floor is the drift of *own* from *exact*.

    *found* is read from the file, *exact* is in float64, *own* is the network in the exported precision.
    """
    finite = exact[np.isfinite(exact)]
    error = difference(found, exact)
    floor = max(
        4 * float(np.finfo(np.float32).eps) * float(np.abs(finite).max(initial=0.0)),
        float(np.abs(difference(own, exact)).max(initial=0.0)),
        1e-30,
    )
    return Drift(
        part=part,
        drift=float(np.abs(error).max(initial=0.0)),
        floor=floor,
        share=float(np.sqrt(np.square(error).mean())) / (float(finite.std()) or 1.0),
    )


def difference(values: NDArray[Any], exact: NDArray[Any]) -> NDArray[np.float64]:
    """Compute *values* - *exact* in float64; equal infinities, as in a masked gate, differ by 0."""
    same = values == exact
    found: NDArray[np.float64] = np.where(same, 0.0, values.astype(np.float64)) - np.where(same, 0.0, exact)
    return found


def finite_drifts(found: Iterable[Drift]) -> tuple[PartDrift, ...]:
    """Convert *found* to report entries, without drifts that are not finite."""
    return tuple(
        PartDrift(part=drift.part, drift=drift.drift, noise_floor=drift.floor, share=drift.share)
        for drift in found
        if np.isfinite(drift.drift)
    )


class RecordingInterpreter(fx.Interpreter):
    """Run a captured graph, in float64 if *exact*, and keep the values of the nodes named *wanted*."""

    def __init__(self, module: fx.GraphModule, wanted: Sequence[str], *, exact: bool) -> None:
        super().__init__(copy.deepcopy(module).double() if exact else module)
        self.exact, self.wanted = exact, set(wanted)
        self.kept: dict[str, NDArray[Any]] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation, with `exact` in float64."""
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        with InFloat64() if self.exact else nullcontext():
            return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its value if it is wanted."""
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, torch.Tensor):
            self.kept[n.name] = value.double().numpy()
        return value


def find_first_drift(
    path: Path, program: ExportedProgram, outputs: Sequence[str], images: NDArray[np.uint8], floors: float
) -> str | None:
    """Find the first module of the file at *path* that drifts by more than *floors* noise floors.

    *program* is the captured network. Returns a sentence with the module and an option to try, or None.
    """
    for place in drifts(path, program, outputs, images[:IMAGES]):
        if place.in_floors > floors:
            inner = place.part.partition(": ")[2].partition(" ")[0]
            found = f"the first module over its noise floor is {place.part} ({place.in_floors:.0f}x)"
            return f"{found}; {ADVICE.get(inner, 'try --no-lowering, or --precision fp32')}"
    return None


def part_drifts(
    path: Path, program: ExportedProgram, outputs: Sequence[str], images: NDArray[np.uint8]
) -> tuple[PartDrift, ...]:
    """Measure the drift of the file at *path* at the outputs of at most `MAX_PARTS` modules."""
    return finite_drifts(drifts(path, program, outputs, images[-PART_IMAGES:], select_parts))


def select_parts(places: Sequence[Boundary]) -> list[Boundary]:
    """Select at most `MAX_PARTS` outputs of top-level modules and their children, evenly spaced.

    The covariance and the triangle of a second-order module are selected too.
    """
    ends = []
    for place in places:
        name, _, inner = place.part.partition(": ")
        if name.count(".") <= 1 and inner in {"", "covariance", "triangle"}:
            ends.append(place)
    if len(ends) <= MAX_PARTS:
        return ends
    return [ends[position] for position in np.linspace(0, len(ends) - 1, MAX_PARTS).round().astype(int)]


def drifts(
    path: Path,
    program: ExportedProgram,
    outputs: Sequence[str],
    images: NDArray[np.uint8],
    choose: Callable[[Sequence[Boundary]], Sequence[Boundary]] = lambda places: places,
) -> Iterator[Drift]:
    """Yield the drift of the file at *path* at the boundaries that *choose* selects, in graph order."""
    model = onnx.load(path)
    images = images[: fixed_batch(model)]
    converted = with_converter_names(program, outputs, max(opset.version for opset in model.opset_import))
    if converted is None:
        return
    places = choose(boundaries(converted, model))
    found = run_file(model, [place.value for place in places], images)
    runs: dict[bool, dict[str, NDArray[Any]]] = {}
    module = converted.module()
    with torch.no_grad():
        for exact in (True, False):
            interpreter = RecordingInterpreter(module, [place.node for place in places], exact=exact)
            interpreter.run(torch.from_numpy(images))
            runs[exact] = interpreter.kept
    for place in places:
        if place.node in runs[True] and found[place.value].shape == runs[True][place.node].shape:
            yield measure_drift(
                place.part, found[place.value], runs[True][place.node], runs[False][place.node]
            )


def boundaries(program: ExportedProgram, model: onnx.ModelProto) -> list[Boundary]:
    """Find the values of *model* that are outputs of modules or of steps inside second-order modules."""
    known = {name for node in model.graph.node for name in node.output}
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    output_names = dict(zip(results, (value.name for value in model.graph.output), strict=True))
    ends: dict[str, str] = {}
    inner: dict[str, str] = {}
    values: dict[str, str] = {}
    products: dict[str, int] = {}
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        value = output_names.get(node, node.name)
        if node.op != "call_function" or not stack or value not in known:
            continue
        values[node.name] = value
        for path, _ in stack:
            ends[path.removeprefix(PREFIX)] = node.name
        kind, part = _operation(node), stack[-1][0].removeprefix(PREFIX)
        # Where baddbmm is decomposed, an iteration step ends with the addition to a product.
        is_sum = kind == "add" and any(_operation(operand) in PRODUCTS for operand in node.all_input_nodes)
        if kind in PRODUCTS or (part in products and is_sum):
            count = products.get(part, 0)
            if kind in {"baddbmm", "add"}:
                label, products[part] = f"iteration {count + 1}", count + 1
            else:
                label, products[part] = ("covariance", 1) if count == 0 else (f"iteration {count}", count)
            inner[node.name] = f"{part}: {label}"
        elif kind in INNER:
            inner[node.name] = f"{part}: {INNER[kind]}"
    places = {name: part for part, name in ends.items() if part and part != "network"} | inner
    return [Boundary(value=values[name], node=name, part=places[name]) for name in values if name in places]


def _operation(node: fx.Node) -> str:
    # `matmul_4` is a matmul.
    return node.name.rstrip("0123456789").rstrip("_")


def run_file(
    model: onnx.ModelProto, names: Sequence[str], images: NDArray[np.uint8], *, optimized: bool = True
) -> dict[str, Any]:
    """Run *model* on *images* and read the intermediate values *names*.

    A bfloat16 model is emulated, without graph optimizations, as `open_session` does.
    """
    if emulated := has_bfloat16(model):
        probed, wanted = cast_to_float32(emulate_bfloat16(model), names)
    else:
        probed, wanted = onnx.shape_inference.infer_shapes(model), list(names)
    outputs = {value.name for value in probed.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in outputs)
    session = open_session(probed, optimized=optimized and not emulated)
    values = session.run(wanted, {session.get_inputs()[0].name: images})
    return dict(zip(names, values, strict=True))
