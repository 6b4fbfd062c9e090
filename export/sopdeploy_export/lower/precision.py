"""Convert the certified network to the requested precision, and report its types.

fp32 exports the certified graph. For fp16, casts are placed in a copy of the certified network,
which is captured and converted again. int8 quantizes the convolutions of the certified graph.

Types are read from the initializers of the exported graph, not from the options. A graph whose
types differ from the requested ones is rejected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sopdeploy.base.config import StrictModel
from sopdeploy.bundle.manifest import Int8For, Precision
from sopdeploy.bundle.onnx_root import num_bytes_of
from sopdeploy.errors import LoweringError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.capture.deployed import Deployed, generated_images, output_names
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.float16 import (
    float32_parts,
    in_float16,
    sum_in_float32,
    weight_dtypes,
)
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.program_hashes import module_of
from sopdeploy_export.runs import (
    BatchRun,
    GateRun,
    file_outputs,
    find_gate,
    gate_logits,
    open_session,
)

OBSERVED_IMAGES = 2  # the smallest batch of several images
# The largest finite number of float16 must be at least so many times the largest value that the
# network computes in float16.
HEADROOM = 8
LARGEST_USED = torch.finfo(torch.float16).max / HEADROOM
HEADROOM_BATCH = 4
TYPE_NAMES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT8: "int8",
}


class Quantization(StrictModel):
    """The quantization to int8 for `runtime`: the numbers of calibration images and of int8 convolutions."""

    runtime: Int8For
    num_images: int
    num_layers: int


class Accuracy(StrictModel):
    """The float32 graph compared with the exported one on the same images.

    Attributes:
        num_images: Number of images.
        before: Top-1 of the float32 graph as a fraction; `None` without labels.
        after: Top-1 of the exported graph as a fraction; `None` without labels.
        num_agreeing: Number of images with the same top class.
        drop: Lost points of top-1; without labels the percentage of images that disagree, an upper bound.
        deviation: Root mean square difference of the logits in standard deviations of those in float32.
    """

    num_images: int
    before: float | None
    after: float | None
    num_agreeing: int
    drop: float
    deviation: float = 0.0


class PrecisionReport(StrictModel):
    """The content of `precision.json`; `parts` has the type of the weights of each part that has any."""

    precision: Precision
    parts: dict[str, str]
    quantisation: Quantization | None = None
    accuracy: Accuracy | None = None


class UserImages(NamedTuple):
    """Images of the user that a conversion needs.

    Attributes:
        calibration: For int8, uint8 (P, H, W, 3): the ranges of values are measured on them.
        photographs: For fp16, uint8 (H, W, 3) each: what the network computes of them must fit float16.
    """

    calibration: NDArray[np.uint8]
    photographs: Sequence[NDArray[np.uint8]]


NO_IMAGES = UserImages(np.empty((0, 0, 0, 3), np.uint8), ())


class Lowered(NamedTuple):
    """A network, its program for any batch size, and the program as ONNX."""

    network: nn.Module
    program: ExportedProgram
    model: onnx.ModelProto


def weight_types(model: onnx.ModelProto) -> dict[str, str]:
    """Map each part to the type of its largest weight in *model*; only weights of the `TYPE_NAMES` count."""
    largest: dict[str, tuple[int, str]] = {}  # by part: bytes and type

    for tensor in model.graph.initializer:
        part = tensor.name.rpartition(".")[0]
        size = num_bytes_of(tensor)
        largest_size, _ = largest.get(part, (0, ""))
        if part and tensor.data_type in TYPE_NAMES and size > largest_size:
            largest[part] = size, TYPE_NAMES[tensor.data_type]

    return {part: name for part, (_, name) in largest.items()}


def check_float16(model: onnx.ModelProto, network: nn.Module) -> None:
    """Raise `LoweringError` if *model* has weights in another type than in `weight_dtypes`.

    Convolutions, linear layers and lists of parameters are checked, each by its largest weight. It
    is also an error if no part has weights in float16. *network* is the certified network, without
    casts, so that a missing cast is detected.
    """
    in_graph = weight_types(model)
    dtypes = weight_dtypes(network)
    expected = {
        part: str(dtypes[part]).removeprefix("torch.")
        for part, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ParameterList)
    }

    # A part whose weights are no longer in the graph, because of folding, has no wrong type.
    wrong = [part for part, dtype in expected.items() if in_graph.get(part, dtype) != dtype]
    if wrong:
        raise LoweringError(
            f"fp16 was requested, but the graph holds {wrong[0]} in "
            f"{in_graph[wrong[0]]}: {len(wrong)} of {len(expected)} parts have the "
            "wrong type"
        )
    if "float16" not in in_graph.values():
        raise LoweringError("no part has weights in float16; choose precision fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """The graph to export and how to check it.

    Attributes:
        model: The graph in the requested precision.
        run: Runs the same computation without the runtime's fusions; its error is the noise floor.
        gate: Computes the gate's logits in the same precision. If the network has no gate, it is
            None or must not be called.
        precision: Report of the types.
    """

    model: onnx.ModelProto
    run: BatchRun
    gate: GateRun | None
    precision: PrecisionReport


def cast_types(
    certified: Lowered,
    preprocess: Preprocess,
    options: ExportOptions,
    folder: Path | None = None,
) -> Lowered:
    """Place the casts of fp16 in a copy of the *certified* network, capture it, and convert it to ONNX.

    Weights that do not fit into one file are written to *folder*, as `lower` says. Raises `LoweringError`
    if the network computes complex numbers, as Fourier transforms do, and the errors of `in_float16`,
    `capture_any_batch` and `lower`.
    """
    for node in certified.program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            raise LoweringError(
                f"{node.target} in {module_of(node)} computes complex numbers, which runtimes do not have in "
                "float16; choose precision fp32"
            )

    # A copy of the network with casts. A few images check the folds of its batch norms, and show
    # which operators add.
    images = torch.from_numpy(generated_images(preprocess.crop)[:OBSERVED_IMAGES])
    normalize = Normalize(preprocess, images_format(certified.network))
    network = in_float16(certified.network, certified.program, normalize(images))

    program = capture_any_batch(network, preprocess, options.batch)
    program = sum_in_float32(program, images[: options.max_batch])
    model = lower(program, output_names(certified.network), folder=folder)
    return Lowered(network, program, model)


class _Headroom(fx.Interpreter):
    """Runs a program, and raises `LoweringError` if a float16 value is too close to the largest number."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; refuse values close to float16's largest. -inf, as in masks of attention, may occur."""
        value = super().run_node(n)
        is_float16 = isinstance(value, Tensor) and value.dtype == torch.float16
        if n.op != "call_function" or not is_float16:
            return value

        unmasked = value.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=0)  # -inf is a mask
        largest = float(unmasked.abs().max())
        if largest > LARGEST_USED:
            raise LoweringError(
                f"{module_of(n)} computes {largest:.3g} in float16 for an image; "
                f"values above {LARGEST_USED:g}, an eighth of the largest, are "
                "refused, because other images may overflow; train "
                "longer, normalize the input of this part, or choose precision "
                "fp32"
            )
        return value


@torch.no_grad()
def check_headroom(
    program: ExportedProgram, images: Sequence[NDArray[np.uint8]], batch: int
) -> None:
    """Raise `LoweringError` if a float16 value of *program* exceeds an eighth of the largest float16 number.

    *program* runs on *images*, uint8 (H, W, 3) each, in batches of at most *batch*. The message
    names the part of the network.
    """
    interpreter = _Headroom(program.module(check_guards=False))
    size = min(batch, HEADROOM_BATCH)

    for start in range(0, len(images), size):
        interpreter.run(torch.from_numpy(np.stack(images[start : start + size])))


def convert_precision(
    certified: Lowered,
    preprocess: Preprocess,
    options: ExportOptions,
    images: UserImages,
    folder: Path | None = None,
) -> Converted:
    """Convert the *certified* graph to the precision in *options*.

    int8 needs *images* that calibrate; fp16 also runs the photographs in *images*. The nodes of the
    result have no metadata; in fp32 and int8, the nodes of *certified* lose theirs as well. Weights in fp16 that
    do not fit into one file are written to *folder*. Raises `LoweringError` if the types in the graph are
    not the requested ones, and the errors of `cast_types` and `check_headroom`.
    """
    # fp32 exports the certified graph as it is, int8 quantizes it; fp16 captures another network.
    lowered = certified
    if options.precision == "fp16":
        lowered = cast_types(certified, preprocess, options, folder)
        images_to_run = [*images.photographs, *generated_images(preprocess.crop)]
        check_headroom(lowered.program, images_to_run, options.max_batch)
        check_float16(lowered.model, certified.network)

    # Remove the metadata, which name the part of each node for messages about the graph.
    for node in lowered.model.graph.node:
        del node.metadata_props[:]

    # The run and the gate whose error is the noise floor: those of the network. No module computes
    # in int8, so there, they are those of the quantized graph without the runtime's fusions.
    model = lowered.model
    quantization: Quantization | None = None
    if options.precision == "int8":
        model, quantization = _quantize(lowered, images.calibration, options.int8_for)
        run = unfused_runner(model)
        gate = _gate_runner(model, lowered.network)
    else:
        deployed = Deployed(lowered.network, preprocess).eval()
        run = deployed
        gate = partial(gate_logits, deployed)

    report = PrecisionReport(
        precision=options.precision, parts=weight_types(model), quantisation=quantization
    )
    return Converted(model=model, run=run, gate=gate, precision=report)


def _quantize(
    lowered: Lowered, calibration: NDArray[np.uint8], runtime: Int8For
) -> tuple[onnx.ModelProto, Quantization]:
    """Quantize convolutions of the graph of *lowered* to int8 for *runtime*.

    *calibration* are the images, uint8 (P, H, W, 3), that show the ranges. Raises `LoweringError`
    if there is no convolution to quantize, or if ONNX Runtime cannot quantize the graph.
    """
    from sopdeploy_export.lower.int8 import Int8Quantizer  # noqa: PLC0415 # takes half a second

    quantizer = Int8Quantizer(
        lowered.model, calibration, float32_parts(lowered.network), runtime
    )
    quantization = Quantization(
        runtime=runtime, num_images=len(calibration), num_layers=len(quantizer.chosen)
    )
    try:
        return quantizer.quantize(), quantization
    except Exception as error:  # ONNX Runtime's quantizer does not limit what it raises
        problem = f"ONNX Runtime cannot quantize the graph: {first_line(error)}"
        raise LoweringError(f"{problem}; choose precision fp32 or fp16") from error


def unfused_runner(model: onnx.ModelProto) -> BatchRun:
    """Build a function that runs *model* operator by operator, without fusions."""
    session = open_session(model, optimized=False)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    fixed_batch = batch.dim_value  # 0 if the batch varies

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        outputs = file_outputs(session, pixels.numpy(), fixed_batch or len(pixels))
        return tuple(torch.from_numpy(values) for values in outputs.values())

    return run


def _gate_runner(model: onnx.ModelProto, network: nn.Module) -> GateRun | None:
    """Build a function that computes the logits of a mixture's gate with *model*, without fusions.

    Returns None if *network* has no such gate (`find_gate`). Raises `LoweringError` unless exactly
    one node reads the weights of the gate.
    """
    gate = find_gate(network)
    if gate is None:
        return None

    # The node that computes the gate's logits is the one that reads its weights.
    name = next(name for name, module in network.named_modules() if module is gate)
    readers = [node for node in model.graph.node if f"{name}.weight" in node.input]
    if len(readers) != 1:
        raise LoweringError(
            f"{len(readers)} nodes of the graph read the weights of {name}, expected one"
        )

    # A copy of the graph in which these logits are the first output.
    logits = readers[0].output[0]
    with_gate = onnx.ModelProto()
    with_gate.CopyFrom(model)
    with_gate.graph.output.insert(0, onnx.ValueInfoProto(name=logits))
    run = unfused_runner(with_gate)
    return lambda pixels: run(pixels)[0].numpy()
