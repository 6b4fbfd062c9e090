"""From the certified network to the graph that ships: in the precision asked for, with what is known of it.

fp32 ships the graph that the lowering rules made. fp16 and bf16-backbone ship a copy of the network that the
rules rewrote, with casts in it, captured and lowered anew. int8 ships the rules' graph with quantised
convolutions.
"""

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

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import BatchRange, Int8For, Precision
from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError, LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.graph.onnx_export import OPSET, OPSET_OF_BFLOAT16
from sopdeploy_export.graph.probe_images import calibration_images, probe_images
from sopdeploy_export.graph.torch_export import Deployed, capture_any_batch
from sopdeploy_export.parity.bisect import find_first_drift, part_drifts
from sopdeploy_export.parity.bisect_int8 import Int8Graphs, find_first_int8_drift, part_drifts_int8
from sopdeploy_export.parity.reference import Gate, Run
from sopdeploy_export.parity.report import PartDrift
from sopdeploy_export.parity.routing import gate_logits, gate_of, has_gate
from sopdeploy_export.parity.session import file_outputs, fixed_batch, open_session
from sopdeploy_export.precision.casts import (
    STORED,
    Calibration,
    Iteration,
    float32_parts,
    place_casts,
    with_precision,
)
from sopdeploy_export.precision.int8 import quantize, refuse_unknown_parts
from sopdeploy_export.precision.report import (
    PrecisionReport,
    Quantisation,
    part_precisions,
    refuse_other_types,
)
from sopdeploy_export.precision.sensitivity import Trial, input_grids
from sopdeploy_export.rewrites.apply import LoweredGraph, LoweringOptions
from sopdeploy_export.rewrites.context import LoweringReport

Locate = Callable[[Path, NDArray[np.uint8], float], str | None]
Drifts = Callable[[Path, NDArray[np.uint8]], tuple[PartDrift, ...]]
PROVED = 2  # pictures that a fold is proved on, beside as many random ones


class PrecisionOptions(StrictModel):
    """What a user may ask of the precision.

    `max_drop` is in points of top-1 on the pictures of `evaluate`, one subfolder per class; without them,
    of agreement with float32 on the pictures of `calibrate`. `int8_for` is the runtime whose form of int8
    is wanted, `keep_float` names parts whose convolutions stay in float32.
    """

    precision: Precision = "fp32"
    newton_schulz: Iteration = "fp32"
    calibrate: Path | None = None
    calibration: Calibration = "percentile"
    int8_for: Int8For = "cpu"
    keep_float: tuple[str, ...] = ()
    evaluate: Path | None = None
    max_drop: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedGraph:
    """The graph that ships: its model, and the run whose noise is its floor.

    `own_gate` gives the logits of its gate, `spectral` is the network with the roots that ship, `rules` what
    the lowering did, `certified` the float32 graph, `calibration` the pictures that ranges were read off.
    `locate` names the first part of its file that is off, `drifts` says how far each is.
    """

    model: onnx.ModelProto
    own: Run
    own_gate: Gate | None
    spectral: nn.Module
    rules: LoweringReport
    certified: onnx.ModelProto
    report: PrecisionReport
    opset: int
    locate: Locate
    drifts: Drifts
    calibration: NDArray[np.uint8] | None = None


def lowering_options(options: PrecisionOptions, *, rules: bool, autotune: bool) -> LoweringOptions:
    """Return what to ask of the lowering so that its result may ship in the precision of *options*.

    Raises `ConfigError` where the two do not go together.
    """
    if options.newton_schulz == "fp16" and not rules:
        raise ConfigError(
            "--newton-schulz fp16: --no-lowering writes the papers' loop in float32; leave one of the two out"
        )
    if autotune and options.precision == "bf16-backbone":
        raise ConfigError(
            "--autotune: onnxruntime has no bfloat16 kernels on the CPU to time; leave it out, or choose "
            "--precision fp32 or fp16"
        )
    stored: Literal["float32", "float16"] = "float16" if options.newton_schulz == "fp16" else "float32"
    if options.precision not in STORED:
        return LoweringOptions(rules, autotune, stored)
    return LoweringOptions(rules, autotune, stored, partial(place_casts, precision=options.precision))


def convert_precision(
    lean: Backbone,
    lowered: LoweredGraph,
    preprocess: Preprocess,
    batch: BatchRange,
    options: PrecisionOptions,
) -> ConvertedGraph:
    """Return what ships of *lean*, the certified network, which the rules made *lowered*."""
    deployed = Deployed(lean, preprocess).eval()
    if options.precision == "int8":
        return quantised(deployed, lowered, preprocess, options)
    opset = OPSET_OF_BFLOAT16 if options.precision == "bf16-backbone" else OPSET
    shipped, own = lowered, deployed
    if options.precision in STORED:
        pixels = Normalize(preprocess)(torch.from_numpy(probe_images(preprocess)[:PROVED]))
        cast = with_precision(lowered.network, lowered.program, options.precision, pixels)
        program = capture_any_batch(cast, preprocess, batch)
        shipped = lowered.in_other_types(cast, program, opset)
        own = Deployed(cast, preprocess).eval()
    refuse_other_types(shipped.model, lowered.network, options.precision)
    program = shipped.program
    report = PrecisionReport(
        precision=options.precision,
        newton_schulz=options.newton_schulz,
        parts=part_precisions(shipped.model, program),
    )
    return ConvertedGraph(
        model=shipped.model,
        own=own,
        own_gate=(lambda pixels: gate_logits(own, pixels)) if has_gate(lean) else None,
        spectral=Deployed(shipped.network, preprocess).eval(),
        rules=shipped.report,
        certified=lowered.model,
        report=report,
        opset=opset,
        locate=lambda path, images, floors: find_first_drift(path, program, lean.outputs, images, floors),
        drifts=lambda path, images: part_drifts(path, program, lean.outputs, images),
    )


def quantised(
    deployed: Deployed,
    lowered: LoweredGraph,
    preprocess: Preprocess,
    options: PrecisionOptions,
) -> ConvertedGraph:
    """Return *lowered* with int8 convolutions; its floor is its own run without the runtime's fusions."""
    if options.calibrate is None:
        raise ConfigError("--precision int8 needs pictures to read ranges off: add --calibrate DIR")
    images = calibration_images(options.calibrate, preprocess)
    refuse_unknown_parts(lowered.model, options.keep_float)
    kept = [*float32_parts(deployed.network), *options.keep_float]
    shipped = quantize(lowered.model, images, kept, options.calibration, options.int8_for)
    refuse_other_types(shipped, deployed.network, "int8")
    grids = input_grids(shipped)
    trial = Trial(deployed, grids, images)
    graphs, outputs = Int8Graphs(int8=shipped, float32=lowered.model), deployed.network.outputs
    report = PrecisionReport(
        precision="int8",
        newton_schulz="fp32",
        parts=part_precisions(shipped, lowered.program),
        quantisation=Quantisation(
            runtime=options.int8_for,
            kept=options.keep_float,
            calibration=options.calibration,
            images=len(images),
            layers=len(grids),
            costs=trial.layers(),
            parts=trial.parts(),
        ),
    )
    return ConvertedGraph(
        model=shipped,
        own=run_unfused(shipped),
        own_gate=gate_of_file(shipped, deployed.network),
        spectral=Deployed(lowered.network, preprocess).eval(),
        rules=lowered.report,
        certified=lowered.model,
        report=report,
        opset=OPSET,
        locate=lambda path, pixels, floors: find_first_int8_drift(path, graphs, pixels, floors),
        drifts=lambda path, pixels: part_drifts_int8(path, graphs, lowered.program, outputs, pixels),
        calibration=images,
    )


def run_unfused(model: onnx.ModelProto) -> Run:
    """Return a run of *model* operator by operator: quantize, dequantise, convolve in float32."""
    session = open_session(model, optimized=False)
    batch = fixed_batch(model)

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        found = file_outputs(session, pixels.numpy(), batch or len(pixels))
        return tuple(torch.from_numpy(values) for values in found.values())

    return run


def gate_of_file(model: onnx.ModelProto, network: nn.Module) -> Gate | None:
    """Return what gives the gate's logits of *model*, operator by operator; None where there is no gate."""
    if not has_gate(network):
        return None
    name = next(name for name, part in network.named_modules() if part is gate_of(network))
    readers = [node for node in model.graph.node if f"{name}.weight" in node.input]
    if len(readers) != 1:
        raise LoweringError(f"the graph does not read the weights of {name} exactly once")
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.insert(0, onnx.ValueInfoProto(name=readers[0].output[0]))
    run = run_unfused(probed)
    return lambda pixels: run(pixels)[0].numpy()
