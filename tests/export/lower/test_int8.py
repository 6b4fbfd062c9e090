"""int8: the two quantized forms, what they cost, and trained second-order networks that classify digits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.errors import ConfigError, DataError, LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.accuracy import (
    AccuracyCheck,
    calibration_images,
    compare_top_classes,
    logit_deviation,
)
from sopdeploy_export.lower.float16 import float32_parts
from sopdeploy_export.lower.int8 import Int8Quantizer
from sopdeploy_export.lower.precision import weight_types
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_export.runs import file_outputs, open_session
from tests.export.conftest import GMSOP, export_once, trained
from tests.export.once import ALONE, graph_of
from tests.support.gpu_graphs import accepted, with_a_runtime
from tests.support.slow import mostly_slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of images with four images per class."""
    return painted(tmp_path_factory.mktemp("images"), 40)


def painted(folder: Path, count: int, *, distinct: int = 40, seed: int = 0) -> Path:
    """Write *count* images of ten classes into *folder*, of which *distinct* differ."""
    random = np.random.default_rng(seed)
    colors = random.integers(0, 256, (distinct, 4, 4, 3), dtype=np.uint8)
    for number in range(count):
        image = Image.fromarray(colors[number % distinct]).resize(
            (16, 16), Image.Resampling.BICUBIC
        )
        (folder / "abcdefghij"[number % 10]).mkdir(exist_ok=True)
        image.save(folder / "abcdefghij"[number % 10] / f"{number:02}.png")
    return folder


def test_network_without_convolutions_to_quantize_is_rejected(preprocess: Preprocess) -> None:
    with pytest.raises(LoweringError, match="no convolution"):
        Int8Quantizer(
            graph_of("resnet8", preprocess).model,
            generated_images(16),
            ("layer1", "layer2", "layer3"),
        )


def run(folder: Path, pooling: str = "gap", **options: object) -> Exported:
    return export_once(
        trained("resnet8", pooling=pooling),
        "resnet8",
        folder,
        precision="int8",
        max_batch=1,
        **options,
    )


def test_int8_bundle_records_its_accuracy(tmp_path: Path, images: Path) -> None:
    (tmp_path / "others").mkdir()
    others = painted(tmp_path / "others", 20, seed=1)
    found = run(tmp_path, "isqrt", calibrate=images, evaluate=others, max_drop=100.0)
    assert "too few to show a loss of one point, which needs 381" in found.facts()["accuracy"]
    report = found.precision
    assert report.accuracy.num_images == 20
    assert report.accuracy.drop == pytest.approx(
        100 * (report.accuracy.before - report.accuracy.after)
    )
    assert report.quantisation.num_layers == 6
    assert found.manifest.int8_for == report.quantisation.runtime == "cpu"
    assert found.parity.passed


def test_an_export_that_loses_too_many_points_writes_nothing(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.zeros(50, dtype=np.int64)
    worse = compare_top_classes(truth, np.repeat([0, 1], 25), truth)
    monkeypatch.setattr(AccuracyCheck, "measure", lambda *_: worse)

    with pytest.raises(ParityError, match=r"loses 50\.00 points"):
        run(tmp_path, calibrate=images)
    assert not any((tmp_path / "out").glob("*"))


class Twice(nn.Module):
    """A network that applies one convolution to two inputs, the second of them *factor* times the first."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.fc = (
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.Linear(16, 3),
        )
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).relu()
        both = self.conv(features).relu() + self.conv(self.factor * features.flip(3)).relu()
        return self.fc(both.mean((2, 3)))


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
@pytest.mark.parametrize("factor", [pytest.param(1.0, marks=pytest.mark.slow), 1e-6])
def test_a_convolution_that_is_applied_twice_is_quantized_for_each_input(
    factor: float, runtime: Int8For, preprocess: Preprocess, images: Path
) -> None:
    network = Twice(factor).eval()
    model = lower(capture_any_batch(network, preprocess, ALONE), ("logits",))
    pixels = calibration_images(images, preprocess)
    quantizer = Int8Quantizer(model, pixels, runtime=runtime)

    assert len(quantizer.chosen) == 2

    before, after = (
        file_outputs(open_session(graph), pixels, 1)["logits"]
        for graph in (model, quantizer.quantize())
    )
    assert logit_deviation(before, after) < 0.1


def test_logits_that_are_far_off_are_refused_although_the_classes_agree(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.zeros(50, dtype=np.int64)
    far = compare_top_classes(truth, truth, truth).model_copy(update={"deviation": 2.07})
    monkeypatch.setattr(AccuracyCheck, "measure", lambda *_: far)
    message = r"2\.07 standard deviations"

    with pytest.raises(ParityError, match=message):
        run(tmp_path, calibrate=images)


def test_an_error_of_the_quantizer_is_one_line(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Int8Quantizer) -> None:
        raise ValueError("Attempt to replace\nthe existing tensor")

    monkeypatch.setattr(Int8Quantizer, "quantize", fail)
    with pytest.raises(LoweringError, match="ValueError: Attempt") as e:
        run(tmp_path, calibrate=images)
    assert str(e.value).isprintable()


def test_the_deviation_of_logits_is_in_standard_deviations_of_each_class() -> None:
    before = np.array([[0, 10], [2, 14]], np.float32)  # deviations of 1 and 2
    assert logit_deviation(before, before) == 0
    assert logit_deviation(before, before.mean(axis=0) + np.zeros_like(before)) == 1
    assert logit_deviation(before, before + 1) == pytest.approx((2 / 5) ** 0.5)
    assert logit_deviation(before * 0, before * 0) == 0


def convolution(values: NDArray[np.float32], *after: str) -> onnx.ModelProto:
    """Build a graph of one convolution of 6 channels, then the operators *after*, then the mean."""
    nodes, last = [helper.make_node("Cast", ["images"], ["pixels"], to=1)], "raw"
    nodes.append(helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]))
    nodes.append(helper.make_node("Concat", ["planes", "planes"], ["channels"], axis=1))
    nodes.append(
        helper.make_node(
            "Conv", ["channels", "conv.weight", "conv.bias"], ["raw"], pads=[1] * 4
        )
    )
    groups = 6 // values.shape[1]
    nodes[-1].attribute.append(helper.make_attribute("group", groups))
    tensors = {"conv.weight": values, "conv.bias": np.zeros(len(values), np.float32)}
    tensors |= {"low": np.float32(0), "high": np.float32(6), "axes": np.array([2, 3])}
    if "Conv" in after:
        tensors["second.weight"] = np.eye(len(values), dtype=np.float32)[:, :, None, None]
    for kind in after:
        bounds = {"Clip": ["low", "high"], "Conv": ["second.weight"]}.get(kind, [])
        nodes.append(helper.make_node(kind, [last, *bounds], [f"{last}_{kind}"]))
        last = f"{last}_{kind}"
    nodes.append(helper.make_node("ReduceMean", [last, "axes"], ["logits"], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 16, 16, 3])],
        [
            helper.make_tensor_value_info(
                "logits", onnx.TensorProto.FLOAT, ["batch", len(values)]
            )
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_part_in_float32_directly_behind_a_quantized_convolution_is_not_quantized() -> None:
    model = convolution(np.full((6, 6, 3, 3), 0.01, np.float32), "Conv")
    quantized = Int8Quantizer(model, generated_images(16), ("second",)).quantize()
    types = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}

    assert types["second.weight"] == onnx.TensorProto.FLOAT
    assert types["conv.weight_quantized"] == onnx.TensorProto.INT8


def test_a_convolution_whose_bias_is_computed_is_quantized() -> None:
    model = convolution(np.full((6, 6, 3, 3), 0.01, np.float32))
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    conv.input[2] = "bias"
    model.graph.node.insert(0, helper.make_node("Neg", ["conv.bias"], ["bias"]))
    quantized = Int8Quantizer(model, generated_images(16)).quantize()

    assert "conv.weight_quantized" in {tensor.name for tensor in quantized.graph.initializer}


@pytest.mark.parametrize("kind", ["Clip", "Relu"])
def test_a_convolution_and_its_activation_have_one_range(kind: str) -> None:
    weight = np.zeros((2, 6, 3, 3), np.float32)
    weight[0, :, 1, 1], weight[1, :, 1, 1] = 0.003, -9  # one channel is far below 0
    white = np.full((1, 16, 16, 3), 255, np.uint8)
    quantized = Int8Quantizer(convolution(weight, kind), white).quantize()
    scales = [
        float(numpy_helper.to_array(tensor))
        for tensor in quantized.graph.initializer
        if tensor.name.startswith("raw") and tensor.name.endswith("_scale")
    ]

    assert scales == [pytest.approx(6 * 0.003)]
    assert kind not in {node.op_type for node in quantized.graph.node}


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
@pytest.mark.parametrize("groups", [1, 3])
def test_biases_remove_the_mean_error_of_rounded_weights(runtime: Int8For, groups: int) -> None:
    # Less than half a step, so it becomes 0
    weight = np.full((6, 6 // groups, 3, 3), 0.0035, np.float32)
    weight[:, 0, 1, 1] = 1
    plain, images = convolution(weight), generated_images(16)
    quantized = Int8Quantizer(plain, images, (), runtime).quantize()
    exact, found = (
        open_session(model).run(None, {"images": images})[0].mean(axis=0)
        for model in (plain, quantized)
    )
    lost = 0.0035 * (weight[0].size - 1) * images.mean() * 0.8  # less at the borders

    assert np.abs(found - exact).max() < 0.2 * lost


def test_calibration_uses_the_whole_folder(preprocess: Preprocess, images: Path) -> None:
    assert len(calibration_images(images, preprocess)) == 40
    with pytest.raises(DataError, match=r"^calibrate: "):
        calibration_images(images / "nowhere", preprocess)


@pytest.mark.parametrize(("evaluates", "measured"), [(False, 20), (True, 0)])
def test_every_image_calibrates_or_measures_and_all_calibrate_beside_evaluate(
    tmp_path: Path, images: Path, preprocess: Preprocess, evaluates: bool, measured: int
) -> None:
    (tmp_path / "repeated").mkdir()
    repeated = painted(tmp_path / "repeated", 80)
    options = ExportOptions(
        precision="int8", calibrate=repeated, evaluate=images if evaluates else None
    )
    check = AccuracyCheck(options, preprocess, labels=tuple("abcdefghij"))

    assert len(check.calibration) == 80 - measured
    if not evaluates:
        measuring = {image.tobytes() for batch in check._batches() for image in batch}
        assert len(measuring) == 10
        assert not measuring & {image.tobytes() for image in check.calibration}


def test_the_folder_that_calibrates_does_not_evaluate(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate"):
        run(tmp_path, calibrate=images, evaluate=images)


@pytest.mark.parametrize("distinct", [1, 31])
def test_fewer_than_32_distinct_images_are_refused(tmp_path: Path, distinct: int) -> None:
    (tmp_path / "few").mkdir()
    few = painted(tmp_path / "few", 60, distinct=distinct)
    with pytest.raises(DataError, match=f"{distinct} distinct"):
        run(tmp_path, calibrate=few)


RUNTIMES: tuple[Int8For, ...] = ("cpu", "tensorrt")
Graph = tuple[dict[Int8For, onnx.ModelProto], list[str]]
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet8": {"pooling": "isqrt"},
    "gmsop-16-8-resnet18": GMSOP,
}
# Operators that may read a quantized value
BETWEEN = {
    "cpu": {
        "Conv",
        "Relu",
        "Add",
        "Slice",
        "Mul",
        "Reshape",
    },  # mixtures reshape the last feature map
    "tensorrt": {"Conv", "Add", "Slice", "Mul"},
}


@pytest.fixture(scope="module", params=mostly_slow(NETWORKS, "resnet8"))
def graphs(request: pytest.FixtureRequest, preprocess: Preprocess) -> Graph:
    """Quantize a network of each family in both forms; list the parts that stay in float32."""
    made = {
        runtime: graph_of(request.param, preprocess, **NETWORKS[request.param])
        for runtime in RUNTIMES
    }
    kept, few = float32_parts(made["cpu"].network), generated_images(16)[:4]
    return {
        runtime: Int8Quantizer(made[runtime].model, few, kept, runtime).quantize()
        for runtime in RUNTIMES
    }, kept


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_convolutions_and_operators_between_them_read_quantized_values(
    graphs: Graph, runtime: Int8For
) -> None:
    model = graphs[0][runtime]
    dequantized = {
        node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    readers = [node for node in model.graph.node if dequantized.keys() & set(node.input)]

    assert {node.op_type for node in readers} <= BETWEEN[runtime]

    weights = [
        dequantized[node.input[1]].input[0]
        for node in readers
        if node.input[1:] and node.input[1] in dequantized
    ]
    assert weights
    assert not [weight for weight in weights for part in graphs[1] if is_in(weight, part)]

    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    made = {node.op_type for node in model.graph.node if quantized & set(node.output)}
    assert made <= {"Conv", "Relu", "Add"}

    scales = [
        t.dims
        for t in model.graph.initializer
        if t.name.startswith("layer1.0.conv1.weight_scale")
    ]
    assert [len(shape) for shape in scales] == [1]  # one for each channel
    assert weight_types(model)["conv1"] == "float32"  # reads the image

    zeros = [tensor for tensor in model.graph.initializer if "zero_point" in tensor.name]
    if runtime == "tensorrt":  # whose parser reads uint8 as int8, and fails on a zero point
        assert {tensor.data_type for tensor in zeros} == {onnx.TensorProto.INT8}
        assert not any(numpy_helper.to_array(tensor).any() for tensor in zeros)
    else:
        assert {z.data_type for z in zeros if not z.dims} == {onnx.TensorProto.UINT8}


@with_a_runtime
def test_gpu_runtimes_accept_the_form_for_tensorrt(
    graphs: Graph, preprocess: Preprocess, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["graphs"]
    accepted(graph_of(name, preprocess, **NETWORKS[name]).model, "fp32")
    accepted(graphs[0]["tensorrt"], "int8")


@pytest.mark.slow
def test_tensorrt_form_quantizes_convolutions_in_shortcuts(preprocess: Preprocess) -> None:
    plain = graph_of("resnet8", preprocess, shortcut="projection").model
    model = Int8Quantizer(plain, generated_images(16)[:4], (), "tensorrt").quantize()
    made = {name: node for node in model.graph.node for name in node.output}
    quantized = [
        made[node.input[0]] for node in model.graph.node if node.op_type == "QuantizeLinear"
    ]
    dequantized = [made[node.input[1]].input[0] for node in quantized if node.op_type == "Conv"]

    assert dequantized == [
        "layer2.0.downsample.0.weight_quantized",
        "layer3.0.downsample.0.weight_quantized",
    ]
