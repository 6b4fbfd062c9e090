"""Convert the lowered graph to the requested precision, and report its types.

fp32 exports the graph of the rewrite rules. fp16 and bf16-backbone export a copy of the rewritten network
with casts, captured and converted again. int8 exports the graph of the rewrite rules with quantized
convolutions.

Types are read from the exported graph, not from the options: weights from its initializers, operations from
the captured program. A graph whose types differ from the requested ones is rejected.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import BatchRange, Int8For, Precision
from sopdeploy.config import NonNegative, StrictModel
from sopdeploy.errors import ConfigError, LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.graph import (
    CALIBRATE,
    OPSET,
    OPSET_OF_BFLOAT16,
    PREFIX,
    Deployed,
    capture_any_batch,
    load_images,
    output_names,
    probe_images,
)
from sopdeploy_export.parity.bisect_int8 import Int8Graphs, find_first_int8_drift, part_drifts_int8
from sopdeploy_export.parity.compare import Gate, Run
from sopdeploy_export.parity.onnx_file import (
    file_outputs,
    find_first_drift,
    fixed_batch,
    open_session,
    part_drifts,
)
from sopdeploy_export.parity.report import PartDrift, find_gate, gate_logits
from sopdeploy_export.precision.casts import (
    LOW_PRECISION,
    Calibration,
    Iteration,
    float32_parts,
    place_casts,
    weight_dtypes,
    with_precision,
)
from sopdeploy_export.precision.int8 import Cost, check_part_names, input_grids, measure_sensitivity, quantize
from sopdeploy_export.rewrites.apply import OBSERVED_IMAGES, LoweredGraph, LoweringOptions, lower_converted
from sopdeploy_export.rewrites.attention import FoldedExcitation
from sopdeploy_export.rewrites.context import LoweringReport

TYPE_NAMES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT8: "int8",
}


class PartPrecision(StrictModel):
    """Floating-point types of one part of the network in the exported file.

    `weights` is the type of its weights, None if it has none. `operations` maps each result type to the
    number of operations.
    """

    part: str
    weights: str | None
    operations: dict[str, int]


class Quantization(StrictModel):
    """The quantization to int8: method, calibration data and accuracy cost per layer.

    Attributes:
        runtime: The runtime that the graph is quantized for.
        kept: Parts that `--keep-float` keeps in float32.
        calibration: Method that found the ranges.
        images: Number of calibration images.
        layers: Number of int8 convolutions.
        costs: The layers that cost most, in descending order.
        parts: All parts with int8 convolutions, in descending order of cost.
    """

    runtime: Int8For
    kept: tuple[str, ...]
    calibration: str
    images: int
    layers: int
    costs: tuple[Cost, ...]
    parts: tuple[Cost, ...] = ()


class Accuracy(StrictModel):
    """The float32 graph compared with the exported one on the same images.

    Attributes:
        images: Number of images.
        before: Top-1 of the float32 graph as a fraction; `None` without labels.
        after: Top-1 of the exported graph as a fraction; `None` without labels.
        agree: Number of images with the same top class.
        low: Lower end of the 95 % confidence interval of the fraction that agrees.
        high: Upper end of that interval.
        drop: Lost points of top-1; without labels the percentage of images that disagree, an upper bound.
    """

    images: int
    before: float | None
    after: float | None
    agree: int
    low: float
    high: float
    drop: float


class PrecisionReport(StrictModel):
    """The content of `precision.json`."""

    precision: Precision
    newton_schulz: Iteration
    parts: tuple[PartPrecision, ...]
    quantisation: Quantization | None = None
    accuracy: Accuracy | None = None

    def summary(self) -> dict[str, int]:
        """Count the parts by the type of their weights."""
        return dict(sorted(Counter(part.weights for part in self.parts if part.weights).items()))


def part_precisions(model: onnx.ModelProto, program: ExportedProgram) -> tuple[PartPrecision, ...]:
    """List the types of every named part, in the order of computation."""
    weights = weight_types(model)
    operations: dict[str, Counter[str]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op == "call_function" and stack and isinstance(value, torch.Tensor):
            part = stack[-1][0].removeprefix(PREFIX)
            if value.is_floating_point():
                operations.setdefault(part, Counter())[str(value.dtype).removeprefix("torch.")] += 1
    return tuple(
        PartPrecision(
            part=name,
            weights=weights.get(name),
            operations=dict(sorted(operations.get(name, Counter[str]()).items())),
        )
        for name in dict.fromkeys([*operations, *weights])
    )


def weight_types(model: onnx.ModelProto) -> dict[str, str]:
    """Map each part to the type of its largest weight in *model*."""
    found: dict[str, tuple[int, str]] = {}
    for tensor in model.graph.initializer:
        part = tensor.name.rpartition(".")[0]
        size = len(tensor.raw_data)
        if part and tensor.data_type in TYPE_NAMES and size > found.get(part, (0, ""))[0]:
            found[part] = size, TYPE_NAMES[tensor.data_type]
    return {part: name for part, (_, name) in found.items()}


def check_weight_types(model: onnx.ModelProto, network: nn.Module, precision: Precision) -> None:
    """Raise `LoweringError` if a weight of *model* does not have the requested type.

    *network* is the rewritten network before the casts, so that a missing cast is detected.
    """
    found = weight_types(model)
    if precision == "int8" and "int8" not in found.values():
        raise LoweringError("int8 was requested, but no convolution of the graph is int8")
    if precision not in LOW_PRECISION:
        return
    dtypes = weight_dtypes(network, precision)
    expected = {
        name: str(dtypes[name]).removeprefix("torch.")
        for name, part in network.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear | nn.ParameterList | FoldedExcitation)
    }
    wrong = [part for part, name in expected.items() if found.get(part, name) != name]
    if wrong or str(LOW_PRECISION[precision]).removeprefix("torch.") not in found.values():
        part = wrong[0] if wrong else next(iter(found), "no part")
        raise LoweringError(
            f"{precision} was requested, but the graph holds {part} in {found.get(part, 'no type')}: "
            f"{len(wrong)} of {len(expected)} parts have the wrong type"
        )


class PrecisionOptions(StrictModel):
    """The precision options of an export.

    Attributes:
        precision: Types in the graph.
        newton_schulz: Type of the Newton-Schulz matrices between two products; fp16 needs precision fp16.
        calibrate: Folder of images to measure int8 ranges on.
        calibration: Method that finds the ranges.
        int8_for: Runtime to quantize for.
        keep_float: Parts whose convolutions stay in float32.
        evaluate: Folder of images, one subfolder per class, to measure top-1 before and after.
        max_drop: Allowed loss in points of top-1 on *evaluate*, or of agreement with float32 on *calibrate*.
    """

    precision: Precision = "fp32"
    newton_schulz: Iteration = "fp32"
    calibrate: Path | None = None
    calibration: Calibration = "percentile"
    int8_for: Int8For = "cpu"
    keep_float: tuple[str, ...] = ()
    evaluate: Path | None = None
    max_drop: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedGraph:
    """The graph to export and how to check it.

    Attributes:
        model: The graph in the requested precision.
        run: Runs the same computation without the runtime's fusions; its error is the noise floor.
        gate: Computes the gate's logits in the same precision; `None` without a gate.
        spectral: The network whose matrix square roots are exported.
        lowering: Report of the rewrite rules.
        float32_model: The graph in float32, before the conversion.
        precision: Report of the types.
        opset: ONNX opset of `model`.
        find_first_drift: Names the first part of a file that exceeds its noise floor.
        part_drifts: Measures the drift of each part of a file.
        calibration: The images (P, H, W, 3) that int8 ranges were measured on.
    """

    model: onnx.ModelProto
    run: Run
    gate: Gate | None
    spectral: nn.Module
    lowering: LoweringReport
    float32_model: onnx.ModelProto
    precision: PrecisionReport
    opset: int
    find_first_drift: Callable[[Path, NDArray[np.uint8], float], str | None]
    part_drifts: Callable[[Path, NDArray[np.uint8]], tuple[PartDrift, ...]]
    calibration: NDArray[np.uint8] | None = None


def lowering_options(options: PrecisionOptions, *, rules: bool, autotune: bool) -> LoweringOptions:
    """Return the options of the rewrite rules; raise `ConfigError` for options that exclude each other."""
    if options.newton_schulz == "fp16" and not rules:
        raise ConfigError(
            "--newton-schulz fp16: --no-lowering exports the papers' loop in float32; remove one of the two"
        )
    if autotune and options.precision == "bf16-backbone":
        raise ConfigError(
            "--autotune: onnxruntime has no bfloat16 kernels on the CPU to time; remove it, or choose "
            "--precision fp32 or fp16"
        )
    stored: Literal["float32", "float16"] = "float16" if options.newton_schulz == "fp16" else "float32"
    if options.precision not in LOW_PRECISION:
        return LoweringOptions(rules, autotune, stored)
    return LoweringOptions(rules, autotune, stored, partial(place_casts, precision=options.precision))


def convert_precision(
    lean: nn.Module,
    lowered: LoweredGraph,
    preprocess: Preprocess,
    batch: BatchRange,
    options: PrecisionOptions,
) -> ConvertedGraph:
    """Convert *lowered*, the graph of the rewritten network *lean*, to the precision in *options*.

    Raises `ConfigError` for int8 without calibration images, and `LoweringError` if the types in the graph
    are not the requested ones.
    """
    deployed = Deployed(lean, preprocess).eval()
    if options.precision == "int8":
        return _convert_int8(deployed, lowered, preprocess, options)
    opset = OPSET_OF_BFLOAT16 if options.precision == "bf16-backbone" else OPSET
    converted, own = lowered, deployed
    if options.precision in LOW_PRECISION:
        pixels = Normalize(preprocess)(torch.from_numpy(probe_images(preprocess)[:OBSERVED_IMAGES]))
        cast = with_precision(lowered.network, lowered.program, options.precision, pixels)
        converted = lower_converted(lowered, cast, capture_any_batch(cast, preprocess, batch), opset)
        own = Deployed(cast, preprocess).eval()
    check_weight_types(converted.model, lowered.network, options.precision)
    program = converted.program
    return ConvertedGraph(
        model=converted.model,
        run=own,
        gate=(lambda pixels: gate_logits(own, pixels)) if find_gate(lean) is not None else None,
        spectral=Deployed(converted.network, preprocess).eval(),
        lowering=converted.report,
        float32_model=lowered.model,
        precision=PrecisionReport(
            precision=options.precision,
            newton_schulz=options.newton_schulz,
            parts=part_precisions(converted.model, program),
        ),
        opset=opset,
        find_first_drift=lambda path, images, floors: find_first_drift(
            path, program, output_names(lean), images, floors
        ),
        part_drifts=lambda path, images: part_drifts(path, program, output_names(lean), images),
    )


def _convert_int8(
    deployed: Deployed, lowered: LoweredGraph, preprocess: Preprocess, options: PrecisionOptions
) -> ConvertedGraph:
    if options.calibrate is None:
        raise ConfigError("--precision int8 needs images to measure ranges on: add --calibrate DIR")
    images = load_images(options.calibrate, preprocess, CALIBRATE)
    check_part_names(lowered.model, options.keep_float)
    in_float = [*float32_parts(deployed.network), *options.keep_float]
    model = quantize(lowered.model, images, in_float, options.calibration, options.int8_for)
    check_weight_types(model, deployed.network, "int8")
    grids = input_grids(model)
    layers, parts = measure_sensitivity(deployed, grids, images)
    graphs, outputs = Int8Graphs(int8=model, float32=lowered.model), output_names(deployed.network)
    return ConvertedGraph(
        model=model,
        run=run_unfused(model),
        gate=_gate_of_file(model, deployed.network),
        spectral=Deployed(lowered.network, preprocess).eval(),
        lowering=lowered.report,
        float32_model=lowered.model,
        precision=PrecisionReport(
            precision="int8",
            newton_schulz="fp32",
            parts=part_precisions(model, lowered.program),
            quantisation=Quantization(
                runtime=options.int8_for,
                kept=options.keep_float,
                calibration=options.calibration,
                images=len(images),
                layers=len(grids),
                costs=layers,
                parts=parts,
            ),
        ),
        opset=OPSET,
        find_first_drift=lambda path, pixels, floors: find_first_int8_drift(path, graphs, pixels, floors),
        part_drifts=lambda path, pixels: part_drifts_int8(path, graphs, lowered.program, outputs, pixels),
        calibration=images,
    )


def run_unfused(model: onnx.ModelProto) -> Run:
    """Build a function that runs *model* operator by operator, without fusions."""
    session = open_session(model, optimized=False)
    batch = fixed_batch(model)

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        found = file_outputs(session, pixels.numpy(), batch or len(pixels))
        return tuple(torch.from_numpy(values) for values in found.values())

    return run


def _gate_of_file(model: onnx.ModelProto, network: nn.Module) -> Gate | None:
    """Build a function that computes the gate's logits with *model*, without fusions."""
    gate = find_gate(network)
    if gate is None:
        return None
    name = next(name for name, part in network.named_modules() if part is gate)
    readers = [node for node in model.graph.node if f"{name}.weight" in node.input]
    if len(readers) != 1:
        raise LoweringError(f"{len(readers)} nodes of the graph read the weights of {name}, expected one")
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.insert(0, onnx.ValueInfoProto(name=readers[0].output[0]))
    run = run_unfused(probed)
    return lambda pixels: run(pixels)[0].numpy()
