"""INT8: quantize the convolutions of a float32 graph after training.

QuantizeLinear and DequantizeLinear nodes surround the operators, and runtimes fuse them. Weights are int8 per
output channel; second-order layers, pooling and classifier stay in float32. The runtimes need different
activations:

- `cpu`: uint8 with a zero point. Outputs of convolutions and biases are quantized as well, so that ReLU,
  addition and max pooling between two convolutions need no float32.
- `tensorrt`: int8 around zero, only for the inputs of convolutions and for shortcuts, because TensorRT
  fuses what follows a convolution. Biases stay in float32, because the parser cannot dequantize int32. The
  convolution that reads the image stays in float32, because the builder has no int8 kernel that fuses three
  input channels, ReLU and max pooling (observed with 10.16). On a CPU this form is slower than float32.

The cost of int8 is measured in torch by quantizing one layer or part at a time. Weights are rounded per
output channel, which commutes with the batch norm after the convolution. Inputs are rounded to the grid that
calibration found. A cost is the root mean square change of the logits divided by their standard deviation.
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from torch import Tensor, nn

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError, LoweringError
from sopdeploy.models.base import is_in
from sopdeploy_export.graph import PREFIX, Deployed
from sopdeploy_export.precision.casts import Calibration

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PERCENTILE = 99.999
OPERATORS = ["Conv"]
IMAGE_CHANNELS = 3
EXAMPLES = 3  # number of layer names in an error message


class Form(NamedTuple):
    """Activation type and quantizer options for one runtime."""

    activations: QuantType
    options: Mapping[str, Any]


FORMS: Mapping[Int8For, Form] = {
    "cpu": Form(QuantType.QUInt8, {}),
    "tensorrt": Form(
        QuantType.QInt8,
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(OPERATORS),
        },
    ),
}


def quantize(
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    in_float: Sequence[str] = (),
    method: Calibration = "percentile",
    runtime: Int8For = "cpu",
) -> onnx.ModelProto:
    """Quantize the convolutions of *model*, with ranges measured on *images*.

    Parts named in *in_float* stay in float32. Raises `LoweringError` if no convolution is left to quantize.
    """
    named = onnx.shape_inference.infer_shapes(model)
    for position, node in enumerate(named.graph.node):
        node.name = node.name or f"node {position}"
    chosen = _convolutions(named, in_float, read_images=runtime == "cpu")
    if not chosen:
        raise LoweringError("the network has no convolution to quantize; export it with --precision fp16")
    form = FORMS[runtime]
    quantizer = QDQQuantizer(
        named,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=form.activations,
        tensors_range=_ranges(named, images, method),
        nodes_to_quantize=sorted(chosen),
        nodes_to_exclude=[],
        op_types_to_quantize=list(OPERATORS),
        extra_options=dict(form.options),
    )
    if runtime == "tensorrt":
        for value in _shortcuts(named, chosen):
            quantizer.quantize_activation_tensor(value)
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    del quantized.opset_import[:]
    quantized.opset_import.extend(model.opset_import)
    quantized.producer_name, quantized.producer_version = model.producer_name, model.producer_version
    quantized.ir_version = model.ir_version
    del quantized.metadata_props[:]
    del quantized.graph.value_info[:]
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def check_part_names(model: onnx.ModelProto, parts: Sequence[str]) -> None:
    """Raise `ConfigError` if a part named in *parts* contains no convolution of *model*."""
    weights = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    for part in parts:
        if not any(is_in(weight, part) for weight in weights):
            examples = ", ".join(weight.rpartition(".")[0] or weight for weight in weights[:EXAMPLES])
            raise ConfigError(
                f"--keep-float: {part!r} contains no convolution; choose for example one of {examples}"
            )


def _ranges(model: onnx.ModelProto, images: NDArray[np.uint8], method: Calibration) -> TensorsData:
    """Measure the ranges of the inputs and outputs of convolutions on *images*."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # the tool prints progress
        path = Path(folder) / "float.onnx"
        onnx.save(model, path)
        calibrator = create_calibrator(
            path,
            list(OPERATORS),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=METHODS[method],
            extra_options={"percentile": PERCENTILE} if method == "percentile" else {},
        )
        name = model.graph.input[0].name
        for image in images:  # one per reader, because ONNX Runtime keeps all activations of a reader
            reader = SimpleNamespace(get_next=partial(next, iter([{name: image[None]}]), None))
            calibrator.collect_data(reader)
        return calibrator.compute_data()


def _convolutions(model: onnx.ModelProto, in_float: Sequence[str], *, read_images: bool) -> set[str]:
    """Return the names of the convolutions to quantize; *read_images* includes those that read the image."""
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    chosen = set()
    for node in model.graph.node:
        if node.op_type != "Conv" or is_in(node.input[1], *in_float):
            continue
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        size = sizes.get(node.input[1])
        if read_images or size is None or int(size[1]) * groups > IMAGE_CHANNELS:
            chosen.add(node.name)
    return chosen


def _shortcuts(model: onnx.ModelProto, chosen: set[str]) -> list[str]:
    """List the outputs of convolutions in shortcuts, which TensorRT fuses as int8.

    Of two convolutions whose outputs are added, the one in the shortcut shares its input with other nodes.
    """
    producers = {node.output[0]: node for node in model.graph.node if node.name in chosen}
    used = [name for node in model.graph.node for name in node.input]
    return [
        value
        for node in model.graph.node
        if node.op_type == "Add" and all(name in producers for name in node.input)
        for value in node.input
        if used.count(producers[value].input[0]) > 1
    ]


MAX_LAYERS = 10  # in the report
IMAGES = 8


class Cost(StrictModel):
    """Change of the logits, relative to their spread, if only this part is quantized."""

    part: str
    share: float


class Grid(NamedTuple):
    """Quantization grid of a tensor: scale, zero point and ends of its 8-bit type."""

    scale: float
    zero: int
    lowest: int
    highest: int

    def __call__(self, values: Tensor) -> Tensor:
        """Round *values* to the grid."""
        steps = torch.round(values / self.scale) + self.zero
        return (steps.clamp(self.lowest, self.highest) - self.zero) * self.scale


def input_grids(model: onnx.ModelProto) -> dict[str, Grid]:
    """Map the name of each quantized convolution to the grid of its input."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    grids = {}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[0] not in producers or node.input[1] not in producers:
            continue
        _, scale, zero = (constants.get(name) for name in producers[node.input[0]].input)
        if scale is None or zero is None:
            continue
        point = numpy_helper.to_array(zero)
        ends = np.iinfo(point.dtype)
        step = float(numpy_helper.to_array(scale).item())
        part = producers[node.input[1]].input[0].rpartition(".")[0]
        grids[part] = Grid(step, int(point.item()), int(ends.min), int(ends.max))
    return grids


def measure_sensitivity(
    deployed: Deployed, grids: Mapping[str, Grid], images: NDArray[np.uint8]
) -> tuple[tuple[Cost, ...], tuple[Cost, ...]]:
    """Measure the costs of the layers in *grids* and of the parts that contain them.

    Parts are groups of layers with the same name prefix, the shortest that gives more than one group. Returns
    the ten layers that cost most and all parts, both in descending order of cost.
    """
    parts: dict[str, list[str]] = {}
    for depth in range(1, max((layer.count(".") for layer in grids), default=0) + 2):
        parts = {}
        for layer in grids:
            parts.setdefault(".".join(layer.split(".")[:depth]), []).append(layer)
        if len(parts) > 1:
            break
    some = np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int)
    pixels, network = torch.from_numpy(images[some]), copy.deepcopy(deployed)
    layers = _costs(network, pixels, grids, {layer: [layer] for layer in grids})
    return layers[:MAX_LAYERS], _costs(network, pixels, grids, parts)


@torch.no_grad()
def _costs(
    network: Deployed, pixels: Tensor, grids: Mapping[str, Grid], groups: Mapping[str, Sequence[str]]
) -> tuple[Cost, ...]:
    """Measure for each group the change of the logits if only its layers are int8; sorted, largest first."""
    plain = network(pixels)[0]
    spread = (float(plain.std()) if plain.numel() > 1 else 0.0) or 1.0
    modules = dict(network.named_modules())
    costs = []
    for name, layers in groups.items():
        convolutions = [(modules.get(PREFIX + layer), grids[layer]) for layer in layers]
        with ExitStack() as stack:
            found = False
            for convolution, grid in convolutions:
                if isinstance(convolution, nn.Conv2d):  # other parts also hold weights of Conv nodes
                    stack.enter_context(_quantized(convolution, grid))
                    found = True
            if found:
                change = float((network(pixels)[0] - plain).square().mean().sqrt())
                costs.append(Cost(part=name, share=change / spread))
    return tuple(sorted(costs, key=lambda cost: -cost.share))


@contextmanager
def _quantized(convolution: nn.Conv2d, grid: Grid) -> Iterator[None]:
    """Quantize weights and input of *convolution* within the context."""
    original = convolution.weight.data
    dims = tuple(range(1, original.dim()))
    scale = original.abs().amax(dim=dims, keepdim=True).clamp_min(1e-12) / 127
    convolution.weight.data = torch.round(original / scale).clamp(-127, 127) * scale
    handle = convolution.register_forward_pre_hook(lambda _part, inputs: (grid(inputs[0]),))
    try:
        yield
    finally:
        handle.remove()
        convolution.weight.data = original
