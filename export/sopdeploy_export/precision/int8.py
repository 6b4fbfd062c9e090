"""INT8: a float32 graph with its convolutions quantised after training, by ONNX Runtime's tools.

QuantizeLinear and DequantizeLinear stand around the operators, which runtimes fuse. Weights are int8 per
output channel; second-order parts, pooling and classifier stay in float32. No form of the activations suits
both runtimes:

`cpu`       uint8 with a zero point, outputs of convolutions and biases quantised as well, so that ReLU,
            addition and max-pooling between two convolutions need no float32.
`tensorrt`  int8 around zero, inputs of convolutions and shortcuts only: it fuses what follows a convolution
            itself. Biases stay float32 and so does the convolution that reads the picture: the parser
            takes no int32 to dequantise, the builder has no int8 kernel for three channels, ReLU and
            max-pooling in one (seen with 10.16). A CPU runs this form slower than float32.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.errors import ConfigError, LoweringError
from sopdeploy.module_names import is_in, is_in_any
from sopdeploy_export.precision.casts import Calibration

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PERCENTILE = 99.999
QUANTISED = ("Conv",)


class OneByOne(CalibrationDataReader):  # type: ignore[misc]
    """The pictures as the graph takes them, one each; ONNX Runtime keeps what it computes on all it gets."""

    def __init__(self, source: str, images: NDArray[np.uint8]) -> None:
        self.feeds: Iterator[dict[str, NDArray[np.uint8]]] = (
            {source: images[i : i + 1]} for i in range(len(images))
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Return the next picture, `None` after the last."""
        return next(self.feeds, None)


def ranges(model: onnx.ModelProto, images: NDArray[np.uint8], method: Calibration) -> TensorsData:
    """Return the range of every input and output of a convolution of *model*, seen on *images* (P, H, W, 3).

    ONNX Runtime tells its progress on the standard output, which is the caller's: it is not shown.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        path = Path(folder) / "float.onnx"
        onnx.save(model, path)
        options = {"percentile": PERCENTILE} if method == "percentile" else {}
        calibrator = create_calibrator(
            path,
            list(QUANTISED),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=METHODS[method],
            extra_options=options,
        )
        source = model.graph.input[0].name
        for start in range(len(images)):
            calibrator.collect_data(OneByOne(source, images[start : start + 1]))
        return calibrator.compute_data()


PICTURE = 3  # channels
SHOWN = 3


class Form(NamedTuple):
    """How a runtime wants activations: their type, and the switches of ONNX Runtime's tool."""

    activations: QuantType
    switches: Mapping[str, Any]


FORMS: Mapping[Int8For, Form] = {
    "cpu": Form(QuantType.QUInt8, {}),
    "tensorrt": Form(
        QuantType.QInt8,
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(QUANTISED),
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
    """Return *model* with its convolutions in int8 for *runtime*, ranges measured on *images* (P, H, W, 3).

    Parts named in *in_float* keep float32, by the names of their weights. Raises `LoweringError` where no
    convolution is left to quantise.
    """
    named = with_node_names(onnx.shape_inference.infer_shapes(model))
    chosen = convolutions(named, in_float)
    if runtime == "tensorrt":
        chosen -= of_the_picture(named)
    if not chosen:
        raise LoweringError("the network has no convolution to quantise; export it with --precision fp16")
    form = FORMS[runtime]
    quantiser = QDQQuantizer(
        named,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=form.activations,
        tensors_range=ranges(named, images, method),
        nodes_to_quantize=sorted(chosen),
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTISED),
        extra_options=dict(form.switches),
    )
    if runtime == "tensorrt":
        for value in shortcuts(named, chosen):
            quantiser.quantize_activation_tensor(value)
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    return cleaned(quantiser.model.model, model)


def with_node_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return *model* with a name for every node, by which nodes are chosen."""
    for position, node in enumerate(model.graph.node):
        node.name = node.name or f"node {position}"
    return model


def convolutions(model: onnx.ModelProto, in_float: Sequence[str]) -> set[str]:
    """Return the names of the convolutions whose weights belong to no part of *in_float*."""
    return {
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and not is_in_any(node.input[1], in_float)
    }


def refuse_unknown_parts(model: onnx.ModelProto, parts: Sequence[str]) -> None:
    """Refuse a name in *parts* to which no convolution of *model* belongs; raises `ConfigError`."""
    weights = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    for part in parts:
        if not any(is_in(weight, part) for weight in weights):
            some = ", ".join(weight.rpartition(".")[0] or weight for weight in weights[:SHOWN])
            raise ConfigError(
                f"--keep-float: no convolution belongs to {part!r}; there are {some} and others"
            )


def of_the_picture(model: onnx.ModelProto) -> set[str]:
    """Return the names of the convolutions that read a picture's three channels."""
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return {
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] in sizes and inputs_of(node, sizes) <= PICTURE
    }


def inputs_of(node: onnx.NodeProto, sizes: Mapping[str, Sequence[int]]) -> int:
    """Return how many channels the convolution *node* reads."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return int(sizes[node.input[1]][1]) * groups


def shortcuts(model: onnx.ModelProto, chosen: set[str]) -> list[str]:
    """Return the outputs of the convolutions of *chosen* that stand in a shortcut, as TensorRT wants them.

    It adds a shortcut within the kernel of the main path if it comes as int8. Of two convolutions that are
    added, the shortcut's is the one whose input others read too: the block begins there.
    """
    made = {node.output[0]: node for node in model.graph.node if node.name in chosen}
    readers = [name for node in model.graph.node for name in node.input]
    return [
        value
        for node in model.graph.node
        if node.op_type == "Add" and all(name in made for name in node.input)
        for value in node.input
        if readers.count(made[value].input[0]) > 1
    ]


def cleaned(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Return *model* with the border of *original* and without names and notes of the tool."""
    del model.opset_import[:]
    model.opset_import.extend(original.opset_import)
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.ir_version = original.ir_version
    del model.metadata_props[:]
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model
