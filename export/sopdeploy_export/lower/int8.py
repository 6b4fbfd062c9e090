"""INT8: quantize the convolutions of a float32 graph after training, with ONNX Runtime's quantizer.

QuantizeLinear and DequantizeLinear nodes surround the operators, and runtimes fuse them.
Weights are int8 per output channel; second-order layers, pooling and classifier stay in
float32. The runtimes need different activations:

- `cpu`: uint8 with a zero point. Outputs of convolutions and biases are quantized as well. A Clip or Relu
  after a convolution becomes part of its output: without these operators in the list, the values in front of
  them get a range of their own, which is wide and grows with the number of images.
- `tensorrt`: int8 around zero, only for the inputs of convolutions and for shortcuts, because TensorRT
  fuses what follows a convolution. Biases stay in float32, because the parser cannot dequantize int32. On a
  CPU this form is slower than float32.

The convolution that reads the image stays in float32: it takes a few percent of the time,
rounding its input costs more accuracy than any other layer of EfficientNet-Lite0, and TensorRT
has no int8 kernel that fuses three input channels, ReLU and max pooling (observed with 10.16).
It is not searched in the graph: each convolution of at most `IMAGE_CHANNELS` input channels
counts as one that reads the image.

Biases are corrected (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", section 4.2, here with measured inputs): rounding the weights W to W' shifts
the mean output of each channel by E[(W' - W) x], which is subtracted from the bias.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.errors import LoweringError
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.deployed import INPUT, evenly_spread
from sopdeploy_export.runs import file_outputs, open_session

ACTIVATIONS = ("Clip", "Relu")  # become part of the convolution before them
IMAGE_CHANNELS = 3  # a convolution of at most so many input channels is taken to read the image
CORRECTION_IMAGES = 64


class Scheme(NamedTuple):
    """Operators, activation type and quantizer options for one runtime."""

    operators: tuple[str, ...]
    activations: QuantType
    options: Mapping[str, Any]


SCHEMES: Mapping[Int8For, Scheme] = {
    "cpu": Scheme(("Conv", *ACTIVATIONS), QuantType.QUInt8, {}),
    "tensorrt": Scheme(
        ("Conv",),
        QuantType.QInt8,
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    ),
}


class _OneImage:
    """Gives *image* (H, W, 3) to ONNX Runtime's calibrator as a batch of one; then None ends the data."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        self._batches = [{INPUT: image[None]}]

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return self._batches.pop() if self._batches else None


class Int8Quantizer:
    """Quantizes a float32 graph.

    `quantize_static` of ONNX Runtime does the same in one call, without the correction of
    biases and without the shortcuts for TensorRT.

    Attributes:
        original: The float32 graph.
        model: A copy of it with inferred shapes and a name for each node. Each chosen convolution
            has weights and a bias of its own. All other values have their names in `original`.
        chosen: The names of the convolutions to quantize, in `model`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        images: NDArray[np.uint8],
        in_float: Sequence[str] = (),
        runtime: Int8For = "cpu",
    ) -> None:
        """Prepare *model* for calibration on *images*, uint8 (P, H, W, 3), and for *runtime*.

        Parts named in *in_float* stay in float32. Raises `LoweringError` if no convolution is
        left to quantize.
        """
        self.images = images
        self.scheme = SCHEMES[runtime]
        self.runtime = runtime
        self.original = model
        self.model = onnx.shape_inference.infer_shapes(model)
        for position, node in enumerate(self.model.graph.node):
            node.name = node.name or f"node {position}"
        self.chosen = self._choose_convolutions(in_float)
        if not self.chosen:
            raise LoweringError(
                "the network has no convolution to quantize; export it in precision fp16"
            )
        self._separate_constants()

    def quantize(self) -> onnx.ModelProto:
        """Quantize the chosen convolutions, and correct their biases.

        For CPUs, the activations after the convolutions are quantized, too; for TensorRT,
        shortcuts.
        """
        # The activations after the convolutions. The quantizer skips them unless they are among
        # the operators of the scheme.
        nodes = self.model.graph.node
        convolved = {name for node in nodes if node.name in self.chosen for name in node.output}
        activations = {
            node.name
            for node in nodes
            if node.op_type in ACTIVATIONS and convolved.intersection(node.input)
        }

        # Quantize a copy, which the quantizer changes.
        copied = onnx.ModelProto()
        copied.CopyFrom(self.model)
        quantizer = QDQQuantizer(
            copied,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=self.scheme.activations,
            tensors_range=self.measure_ranges(),
            nodes_to_quantize=sorted(self.chosen | activations),
            nodes_to_exclude=[],
            op_types_to_quantize=list(self.scheme.operators),
            extra_options=dict(self.scheme.options),
        )
        if self.runtime == "tensorrt":
            for value in _shortcuts(self.model, self.chosen):
                quantizer.quantize_activation_tensor(value)
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantized: onnx.ModelProto = quantizer.model.model
        self._correct_biases(quantized)

        # Restore the versions of the original, and remove the metadata and shapes that the quantizer
        # added.
        del quantized.opset_import[:]
        quantized.opset_import.extend(self.original.opset_import)
        quantized.producer_name = self.original.producer_name
        quantized.producer_version = self.original.producer_version
        quantized.ir_version = self.original.ir_version
        del quantized.metadata_props[:]
        del quantized.graph.value_info[:]
        onnx.checker.check_model(quantized, full_check=True)
        return quantized

    def measure_ranges(self) -> TensorsData:
        """Find the smallest and largest inputs and outputs of the scheme's operators on the images."""
        with (
            tempfile.TemporaryDirectory() as folder,
            redirect_stdout(StringIO()),  # it prints progress
        ):
            path = Path(folder) / "float.onnx"
            onnx.save(self.model, path)
            calibrator = create_calibrator(
                path,
                list(self.scheme.operators),
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=CalibrationMethod.MinMax,
            )
            # A reader for each image, because the activations of a reader stay in memory.
            for image in self.images:
                calibrator.collect_data(_OneImage(image))
            return calibrator.compute_data()

    def _choose_convolutions(self, in_float: Sequence[str]) -> set[str]:
        """Name the convolutions with constant weights outside of *in_float*.

        Convolutions of at most `IMAGE_CHANNELS` input channels are left out, as if they all read
        the image.
        """
        sizes = {tensor.name: tensor.dims for tensor in self.model.graph.initializer}
        chosen = set()

        for node in self.model.graph.node:
            if node.op_type != "Conv" or node.input[1] not in sizes:
                continue

            # The weights are (output channels, input channels / groups, ...).
            weight = node.input[1]
            groups = next(
                (attribute.i for attribute in node.attribute if attribute.name == "group"), 1
            )
            num_input_channels = int(sizes[weight][1]) * groups
            if num_input_channels > IMAGE_CHANNELS and not is_in(weight, *in_float):
                chosen.add(node.name)

        return chosen

    def _separate_constants(self) -> None:
        """Give every chosen convolution weights and a constant bias of its own, zeros if it has none.

        A bias that the graph computes stays. Weights and biases that nothing reads then are removed.

        A quantized bias has the scale of the weights times that of the input. If this is too small
        for the bias, the quantizer increases the scale of the weights. So it can depend on the
        input, and convolutions that share weights can read different inputs.
        """
        graph = self.model.graph
        num_readers = Counter(name for node in graph.node for name in node.input)
        tensors = {tensor.name: tensor for tensor in graph.initializer}

        for position, node in enumerate(graph.node):
            if node.name not in self.chosen:
                continue

            # A copy of shared weights. The inputs of the node are image, weights and bias.
            weight = tensors[node.input[1]]
            if num_readers[weight.name] > 1:
                node.input[1] = f"{weight.name}_{position}"
                graph.initializer.append(
                    numpy_helper.from_array(numpy_helper.to_array(weight), node.input[1])
                )

            # A bias of its own, unless the graph computes it.
            bias = np.zeros(weight.dims[0], np.float32)
            if len(node.input) > 2 and node.input[2]:  # "" means that there is no bias
                if node.input[2] not in tensors:
                    continue
                bias = numpy_helper.to_array(tensors[node.input[2]])
            del node.input[2:]
            node.input.append(f"{node.input[1]}_bias_{position}")
            graph.initializer.append(numpy_helper.from_array(bias, node.input[2]))

        # Leave out what nothing reads any more.
        names_in_use = {name for node in graph.node for name in node.input}
        in_use = [tensor for tensor in graph.initializer if tensor.name in names_in_use]
        del graph.initializer[:]
        graph.initializer.extend(in_use)

    def _correct_biases(self, quantized: onnx.ModelProto) -> None:
        """Add the mean of (W - Q) x over the images to each bias of *quantized*, in place.

        W are the weights of a convolution, Q the quantized ones and x its inputs in float32. With
        this, rounding the weights changes no mean output (Nagel et al., "Data-Free Quantization",
        2019, section 4.2). A bias that the graph computes stays as it is.
        """
        originals = {tensor.name: tensor for tensor in self.model.graph.initializer}
        tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}

        # A dequantized tensor is codes * scale. Map its name to the names of its codes and scale.
        dequantizers = [
            node for node in quantized.graph.node if node.op_type == "DequantizeLinear"
        ]
        codes_and_scale = {node.output[0]: node.input[:2] for node in dequantizers}
        inputs = {
            node.name: node.input for node in quantized.graph.node if node.name in self.chosen
        }

        # W - Q of shape (C, ...), for C output channels, by the name of the convolution.
        errors = {}
        for node in self.model.graph.node:
            if node.name not in self.chosen or node.input[2] not in originals:
                continue
            weight = numpy_helper.to_array(originals[node.input[1]])
            _, weight_name, _ = inputs[node.name]
            codes, scale = (
                numpy_helper.to_array(tensors[name]) for name in codes_and_scale[weight_name]
            )
            scale_by_channel = scale.reshape(-1, *[1] * (codes.ndim - 1))  # (C, 1, ...)
            dequantized = codes * scale_by_channel  # zero points are 0
            errors[node.name] = (weight - dequantized).astype(np.float32)

        # Add the means (C,) to the biases, which are codes in int32 for CPUs, and float32 for
        # TensorRT.
        for convolution, mean in self._mean_outputs(errors).items():
            _, _, bias_name = inputs[convolution]
            if bias_name in codes_and_scale:
                bias, scale = (tensors[name] for name in codes_and_scale[bias_name])
                steps = np.rint(mean / numpy_helper.to_array(scale).astype(np.float64))
                limits = np.iinfo(np.int32)
                codes = np.clip(numpy_helper.to_array(bias) + steps, limits.min, limits.max)
                corrected = codes.astype(np.int32)
            else:
                bias = tensors[bias_name]
                corrected = (numpy_helper.to_array(bias) + mean).astype(np.float32)
            bias.CopyFrom(numpy_helper.from_array(corrected, bias.name))

    def _mean_outputs(
        self, weights: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float64]]:
        """Compute the mean output (C,) of convolutions with other *weights*, without biases.

        *weights* maps the names of convolutions to tensors in place of their weights. In a copy of
        the float32 graph, each convolution gets a second one beside it, with these weights; the
        means of the second ones are the outputs of the copy. At most `CORRECTION_IMAGES` of the images
        count.
        """
        if not weights:  # a graph without outputs cannot run
            return {}

        # A copy of the original, in which the inputs of convolutions have the same names.
        probed = onnx.ModelProto()
        probed.CopyFrom(self.original)
        del probed.graph.output[:]

        for node in self.model.graph.node:
            if node.name not in weights:
                continue
            weight = f"{node.name}:weight"
            axes = f"{node.name}:axes"
            result = f"{node.name}:result"
            mean = f"{node.name}:mean"

            # The convolution of the same input, with the other weights.
            conv = helper.make_node("Conv", [node.input[0], weight], [result])
            conv.attribute.extend(node.attribute)
            probed.graph.initializer.append(numpy_helper.from_array(weights[node.name], weight))

            # Its mean over the spatial axes, (P, C).
            spatial = np.arange(2, weights[node.name].ndim)
            probed.graph.initializer.append(numpy_helper.from_array(spatial, axes))
            reduction = helper.make_node("ReduceMean", [result, axes], [mean], keepdims=0)
            probed.graph.node.extend([conv, reduction])
            output = helper.make_tensor_value_info(mean, onnx.TensorProto.FLOAT, None)
            probed.graph.output.append(output)

        # The mean over at most `CORRECTION_IMAGES` images.
        images = self.images[evenly_spread(len(self.images), CORRECTION_IMAGES)]
        outputs = file_outputs(open_session(probed), images, 1)
        return {
            name.removesuffix(":mean"): values.mean(axis=0, dtype=np.float64)
            for name, values in outputs.items()
        }


def _shortcuts(model: onnx.ModelProto, chosen: set[str]) -> list[str]:
    """List the outputs of *chosen* convolutions in shortcuts, which the caller quantizes for TensorRT.

    If the outputs of two chosen convolutions are added, the one in the shortcut is the one that
    shares its input with other nodes.
    """
    input_of = {
        node.output[0]: node.input[0] for node in model.graph.node if node.name in chosen
    }
    num_readers = Counter(name for node in model.graph.node for name in node.input)

    # The operands of every addition of the outputs of two chosen convolutions.
    added: list[str] = []
    for node in model.graph.node:
        if node.op_type == "Add" and all(name in input_of for name in node.input):
            added += node.input

    return [name for name in added if num_readers[input_of[name]] > 1]
