"""int8: the two quantized forms, what they cost, and trained second-order networks that classify digits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import Int8For
from sopdeploy.data.datasets.small import open_digits
from sopdeploy.errors import ConfigError, DataError, LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe
from sopdeploy_export.graph import CALIBRATE, Deployed, generated_images, load_images
from sopdeploy_export.pipeline import Exported, ExportOptions, export
from sopdeploy_export.precision import accuracy_gate
from sopdeploy_export.precision.accuracy_gate import accuracy
from sopdeploy_export.precision.casts import Calibration, float32_parts
from sopdeploy_export.precision.convert import PrecisionOptions, weight_types
from sopdeploy_export.precision.int8 import Grid, input_grids, measure_sensitivity, quantize
from sopdeploy_export.tensorrt.lint import lint
from sopdeploy_export.tensorrt.rewrites import graph_precision
from tests.export.conftest import save, trained
from tests.export.once import ALONE, graph_of, proving_once
from tests.gpu_graphs import Record, accepted, without_kernel


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of images with two images per class."""
    folder = tmp_path_factory.mktemp("images")
    for label, image in zip(
        "aabbccddeeffgghhiijj", np.resize(generated_images(16), (20, 16, 16, 3)), strict=True
    ):
        (folder / label).mkdir(exist_ok=True)
        name = f"{len(list((folder / label).iterdir()))}.png"
        Image.fromarray(image).save(folder / label / name)
    return folder


def graph(name: str, preprocess: Preprocess) -> onnx.ModelProto:
    return graph_of(name, preprocess).model


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_convolutions_become_int8_but_not_second_order_parts(
    preprocess: Preprocess, method: Calibration
) -> None:
    network, _, plain = graph_of("isqrt-resnet8", preprocess)
    model = quantize(plain, generated_images(16), float32_parts(network), method)
    types = weight_types(model)
    assert {types[part] for part in types if part.startswith(("conv1", "layer"))} == {"int8"}
    assert types["fc"] == "float32"
    grids = input_grids(model)
    assert len(grids) == 7
    assert {(grid.lowest, grid.highest) for grid in grids.values()} == {(0, 255)}
    assert [opset.version for opset in model.opset_import] == [18]
    fed = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    assert not [name for name in fed if "Dequantize" in name]


def test_weights_are_quantized_per_channel(preprocess: Preprocess) -> None:
    model = quantize(graph("resnet8", preprocess), generated_images(16))
    scales = {t.name: t.dims for t in model.graph.initializer if t.name.startswith("conv1.weight_scale")}
    assert list(scales.values()) == [[16]]


def test_same_images_give_the_same_bytes(preprocess: Preprocess) -> None:
    model = graph("resnet8", preprocess)
    first, second = (
        quantize(model, generated_images(16)).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_network_without_convolutions_to_quantize_is_rejected(preprocess: Preprocess) -> None:
    with pytest.raises(LoweringError, match="no convolution to quantize"):
        quantize(graph("resnet8", preprocess), generated_images(16), ("conv1", "layer1", "layer2", "layer3"))


def run(name: str, folder: Path, preprocess: Preprocess, **options: object) -> Exported:
    chosen = PrecisionOptions.model_validate({"precision": "int8", **options})
    checkpoint = save(trained(name), name, folder / "c.pt", preprocess)
    with proving_once():
        return export(checkpoint, folder / "out", ExportOptions(batch=ALONE, precision=chosen))


def test_int8_bundle_records_its_accuracy_and_costs(
    preprocess: Preprocess, tmp_path: Path, images: Path
) -> None:
    options = {"calibrate": images, "evaluate": images, "max_drop": 100.0}
    found = run("isqrt-resnet8", tmp_path, preprocess, **options)
    report = found.precision
    assert report.accuracy.images == 20
    assert report.accuracy.drop == pytest.approx(100 * (report.accuracy.before - report.accuracy.after))
    assert report.quantisation.layers == 7
    assert found.manifest.int8_for == report.quantisation.runtime == "cpu"
    shares = [cost.share for cost in report.quantisation.costs]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > 0
    parts = {cost.part: cost.share for cost in report.quantisation.parts}
    assert parts.keys() == {"conv1", "layer1", "layer2", "layer3"}
    drifts = {part.part: part.share for part in found.parity.parts}
    assert {"layer1.0", "layer3.0", "pooling.root: covariance", "fc"} <= drifts.keys()
    assert 0 < drifts["normalise"] < drifts["layer3.0"] < 0.2
    page = (found.path / "report.html").read_text(encoding="utf-8")
    assert "int8 loses accuracy where it grows." in page
    assert "module-costs-title" in page
    assert found.parity.passed


class OneLogit(nn.Module):
    """A convolution and one class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.conv(pixels).mean((2, 3))


def test_the_cost_of_one_class_on_one_image_is_a_number(preprocess: Preprocess) -> None:
    grids = {"conv": Grid(0.1, 0, -128, 127)}
    costs, _ = measure_sensitivity(Deployed(OneLogit(), preprocess), grids, generated_images(16)[-1:])
    assert [np.isfinite(cost.share) for cost in costs] == [True]


def test_too_large_a_drop_writes_nothing_and_names_the_costly_layers(
    preprocess: Preprocess, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.zeros(50, dtype=np.int64)
    worse = accuracy(truth, np.repeat([0, 1], 25), truth)
    monkeypatch.setattr(accuracy_gate, "compare_predictions", lambda *_: worse)
    part = r"the part that costs most: (conv1|layer\d) "
    layers = r"cost most: \w.* --keep-float \w[\w.]+, or try --calibration minmax or entropy"
    advice = f"{part}.*{layers}"
    with pytest.raises(ParityError, match=rf"loses 50\.00 points of top-1 on 50 images.*{advice}"):
        run("resnet8", tmp_path, preprocess, calibrate=images)
    assert not any((tmp_path / "out").iterdir())


def test_keep_float_keeps_parts_in_float32_for_single_images(
    preprocess: Preprocess, tmp_path: Path, images: Path
) -> None:
    options = {"calibrate": images, "max_drop": 100.0, "keep_float": ("layer3", "conv1")}
    found = run("resnet8", tmp_path, preprocess, **options)
    assert found.parity.passed
    assert open_bundle(found.path).manifest.batch == ALONE
    types = {part.part: part.weights for part in found.precision.parts if part.weights}
    assert {name for name, kind in types.items() if kind == "int8"} == {
        *("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
    }
    assert found.precision.quantisation.kept == ("layer3", "conv1")


def test_unknown_parts_and_missing_calibration_images_are_rejected(
    preprocess: Preprocess, tmp_path: Path, images: Path
) -> None:
    message = r"'layer3\.0\.conv' contains no convolution; choose for example one of conv1, layer1\.0\.conv1"
    with pytest.raises(ConfigError, match=message):
        run("resnet8", tmp_path, preprocess, calibrate=images, keep_float=("layer3.0.conv",))
    with pytest.raises(ConfigError, match="add --calibrate DIR"):
        run("resnet8", tmp_path, preprocess)


def test_calibration_uses_the_whole_folder(preprocess: Preprocess, images: Path) -> None:
    assert len(load_images(images, preprocess, CALIBRATE)) == 20
    with pytest.raises(DataError, match="--calibrate needs a folder"):
        load_images(images / "nowhere", preprocess, CALIBRATE)


RUNTIMES: tuple[Int8For, ...] = ("cpu", "tensorrt")
Graph = tuple[dict[Int8For, onnx.ModelProto], list[str]]
NETWORKS: dict[str, dict[str, Any]] = {
    "isqrt-resnet8": {},
    "gsop-net2-preact-resnet29": {"blocks": 2, "cov_width": 32, "final_width": 32, "iterations": 2},
    "gmsop-16-8-resnet18": {
        "blocks_per_stage": 1,
        "components": 4,
        "chosen": 2,
        "component_widths": (16, 8),
        "gate_widths": (8, 6),
        "iterations": 2,
    },
}
BETWEEN = {  # operators that may read a quantized value
    "cpu": {"Conv", "Relu", "Add", "Slice", "Mul"},
    "tensorrt": {"Conv", "Add", "Slice", "Mul"},
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * (name == "gsop-net2-preact-resnet29"))
        for name in NETWORKS
    ],
)
def graphs(request: pytest.FixtureRequest, preprocess: Preprocess) -> Graph:
    """Quantize a network of each family in both forms; list the parts that stay in float32."""
    made = {runtime: graph_of(request.param, preprocess, **NETWORKS[request.param]) for runtime in RUNTIMES}
    kept = float32_parts(made["cpu"].network)
    return {
        runtime: quantize(made[runtime].model, generated_images(16)[:4], kept, "minmax", runtime)
        for runtime in RUNTIMES
    }, kept


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_convolutions_and_operators_between_them_read_quantized_values(
    graphs: Graph, runtime: Int8For
) -> None:
    model = graphs[0][runtime]
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
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


@pytest.mark.gpu_graph(lambda graphs: [(graphs, "fp32"), (graphs, "int8")])
def test_gpu_runtimes_accept_the_form_for_tensorrt_and_the_lint_rejects_the_cpu_form_with_advice(
    graphs: Graph, preprocess: Preprocess, request: pytest.FixtureRequest, record_property: Record
) -> None:
    name = request.node.callspec.params["graphs"]
    accepted(record_property, name, "fp32", graph_of(name, preprocess, **NETWORKS[name]).model)
    accepted(record_property, name, "int8", graphs[0]["tensorrt"])
    assert "DequantizeLinear(int32)" in without_kernel(graphs[0]["cpu"])
    profiles = [Profile(minimum=1, optimum=2, maximum=4)]
    for version in ((8, 6), (10, 0), (10, 16), (11, 0)):
        safe, _ = lint(graphs[0]["tensorrt"], version, profiles)
        assert graph_precision(safe) == "int8"
        with pytest.raises(LoweringError, match=r"quantised-for-a-cpu.*--int8-for tensorrt"):
            lint(graphs[0]["cpu"], version, profiles)


def test_tensorrt_form_is_symmetric_int8_with_float_biases(graphs: Graph) -> None:
    model = graphs[0]["tensorrt"]
    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            assert fixed[node.input[2]].dtype == np.int8
            assert not fixed[node.input[2]].any()
    codes = {name: values for name, values in fixed.items() if name.endswith("_quantized")}
    assert {values.dtype for values in codes.values()} == {np.dtype(np.int8)}
    assert min(values.min() for values in codes.values()) >= -127
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    assert fixed[first.input[1]].dtype == np.float32  # it reads the image
    grids = input_grids(model).values()
    assert {(grid.zero, grid.lowest, grid.highest) for grid in grids} == {(0, -128, 127)}


def test_tensorrt_form_quantizes_convolutions_in_shortcuts(preprocess: Preprocess) -> None:
    plain = graph_of("resnet8", preprocess, shortcut="projection").model
    model = quantize(plain, generated_images(16)[:4], (), "minmax", "tensorrt")
    made = {name: node for node in model.graph.node for name in node.output}
    quantized = [made[node.input[0]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    dequantized = [made[node.input[1]].input[0] for node in quantized if node.op_type == "Conv"]
    assert dequantized == ["layer2.0.downsample.0.weight_quantized", "layer3.0.downsample.0.weight_quantized"]


GSOP = [
    "model.name=gsop-net2-preact-resnet29",
    "model.config.blocks=2",
    "model.config.cov_width=32",
    "model.config.final_width=32",
    "model.config.dropout=0.0",
    "optimizer.lr=0.05",
    "epochs=8",
]
GMSOP = [
    "model.name=gmsop-16-8-resnet18",
    "model.config.blocks_per_stage=1",
    "model.config.components=4",
    "model.config.chosen=2",
    "model.config.component_widths=[16,8]",
    "model.config.gate_widths=[8,6]",
    "model.config.iterations=3",
    "model.config.balance_weight=0.1",  # so that the gate is decided after few steps
    "model.config.dropout=0.0",
    "optimizer.lr=0.05",
    "epochs=6",
]
SECOND_ORDER = {
    "gsop": ("attention.channel.excitation", "pooling"),
    "gmsop": ("gate", "mixture", "head"),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write the digits for calibration and those held out as folders of images by class."""
    folder, split = tmp_path_factory.mktemp("digits"), open_digits()
    for name, part in (("train", split.train), ("held", split.held_out)):
        for index, (image, target) in enumerate(zip(part.images, part.targets, strict=True)):
            path = folder / name / part.labels[target] / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder / "train", folder / "held"


@pytest.fixture(scope="module", params=["gsop", "gmsop"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Train a checkpoint of each family on digits for half a minute."""
    overrides = {"gsop": GSOP, "gmsop": GMSOP}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    assert train(read_recipe("digits-plain", overrides), folder).best_top1 >= 0.95
    return request.param, folder / "best.pt"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_int8_agrees_on_99_percent_of_digits_and_keeps_second_order_parts(
    learned: tuple[str, Path], digits: tuple[Path, Path], tmp_path: Path, runtime: Int8For
) -> None:
    family, checkpoint = learned
    chosen: dict[str, Any] = {"precision": "int8", "int8_for": runtime}
    options = PrecisionOptions(calibrate=digits[0], evaluate=digits[1], **chosen)
    detach = family == "gmsop"
    found = export(checkpoint, tmp_path, ExportOptions(detach=detach, precision=options))
    accuracy = found.precision.accuracy
    assert accuracy is not None
    assert accuracy.agree / accuracy.images >= 0.99
    assert accuracy.drop <= 1
    types = {part.part: part.weights for part in found.precision.parts}
    assert "int8" in types.values()
    second = [name for name in types if any(piece in name for piece in SECOND_ORDER[family])]
    assert second
    assert {types[name] for name in second} <= {None, "float32"}
