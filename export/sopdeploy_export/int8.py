"""INT8: a float32 graph with its convolutions quantised after training, by ONNX Runtime's tools.

Weights are int8 per output channel, activations uint8 per tensor, as QuantizeLinear and DequantizeLinear
around the operators, which runtimes fuse. What stands between two convolutions (ReLU, addition, max-pooling)
is quantised with them, or every convolution would go through float32. Second-order parts, pooling and
classifier stay in float32. Ranges are read off pictures: all of what was seen (`minmax`), the best by
entropy, or all but the outermost (`percentile`).
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from sopdeploy.errors import LoweringError
from sopdeploy_export.precision import Calibration

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


def quantise(
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    in_float: Sequence[str] = (),
    method: Calibration = "minmax",
) -> onnx.ModelProto:
    """Return *model* with its convolutions in int8, ranges measured on *images* (P, H, W, 3).

    Parts named in *in_float* keep float32, by the names of their weights. Raises `LoweringError` where no
    convolution is left to quantise.
    """
    named = with_node_names(onnx.shape_inference.infer_shapes(model))
    chosen = convolutions(named, in_float)
    if not chosen:
        raise LoweringError("the network has no convolution to quantise; export it with --precision fp16")
    quantiser = QDQQuantizer(
        named,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges(named, images, method),
        nodes_to_quantize=chosen,
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTISED),
        extra_options={},
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    return cleaned(quantiser.model.model, model)


def with_node_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return *model* with a name for every node, by which nodes are chosen."""
    for position, node in enumerate(model.graph.node):
        node.name = node.name or f"node {position}"
    return model


def convolutions(model: onnx.ModelProto, in_float: Sequence[str]) -> list[str]:
    """Return the names of the convolutions whose weights belong to no part of *in_float*."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and not any(node.input[1] == part or node.input[1].startswith(f"{part}.") for part in in_float)
    ]


def ranges(model: onnx.ModelProto, images: NDArray[np.uint8], method: Calibration) -> TensorsData:
    """Return the range of every value that is quantised, seen on *images*."""
    with tempfile.TemporaryDirectory() as folder:
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
