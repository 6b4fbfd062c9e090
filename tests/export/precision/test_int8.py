from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ConfigError, DataError, LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.graph import CALIBRATE, generated_images, load_images
from sopdeploy_export.pipeline import Exported, ExportOptions, export
from sopdeploy_export.precision import accuracy_gate
from sopdeploy_export.precision.accuracy_gate import accuracy
from sopdeploy_export.precision.casts import Calibration, float32_parts
from sopdeploy_export.precision.convert import PrecisionOptions, weight_types
from sopdeploy_export.precision.int8 import input_grids, quantize
from tests.export.conftest import save
from tests.export.once import graph_of, proving_once

Make = Callable[..., Classifier]
SMALL = BatchRange(optimum=2, maximum=4)


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
    return graph_of(name, preprocess, SMALL).model


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_convolutions_become_int8_but_not_second_order_parts(
    preprocess: Preprocess, method: Calibration
) -> None:
    network, _, plain = graph_of("isqrt-resnet8", preprocess, SMALL)
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


def run(
    network: Classifier,
    name: str,
    folder: Path,
    preprocess: Preprocess,
    batch: BatchRange = SMALL,
    **options: object,
) -> Exported:
    chosen = PrecisionOptions.model_validate({"precision": "int8", **options})
    checkpoint = save(network, name, folder / "c.pt", preprocess)
    with proving_once():
        return export(checkpoint, folder / "out", ExportOptions(batch=batch, precision=chosen))


@pytest.mark.vnni
def test_int8_bundle_records_its_accuracy_and_costs(
    make: Make, preprocess: Preprocess, tmp_path: Path, images: Path
) -> None:
    found = run(
        make("isqrt-resnet8"),
        "isqrt-resnet8",
        tmp_path,
        preprocess,
        calibrate=images,
        evaluate=images,
        max_drop=100.0,
    )
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


@pytest.mark.vnni
def test_too_large_a_drop_writes_nothing_and_names_the_costly_layers(
    make: Make, preprocess: Preprocess, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.zeros(50, dtype=np.int64)
    worse = accuracy(truth, np.repeat([0, 1], 25), truth)
    monkeypatch.setattr(accuracy_gate, "compare_predictions", lambda *_: worse)
    part = r"the part that costs most: (conv1|layer\d) "
    layers = r"cost most: \w.* --keep-float \w[\w.]+, or try --calibration minmax or entropy"
    advice = f"{part}.*{layers}"
    with pytest.raises(ParityError, match=rf"loses 50\.00 points of top-1 on 50 images.*{advice}"):
        run(make("resnet8"), "resnet8", tmp_path, preprocess, calibrate=images)
    assert not any((tmp_path / "out").iterdir())


def test_keep_float_keeps_parts_in_float32_for_single_images(
    make: Make, preprocess: Preprocess, tmp_path: Path, images: Path
) -> None:
    options = {"calibrate": images, "max_drop": 100.0, "keep_float": ("layer3", "conv1")}
    alone = BatchRange(optimum=1, maximum=1)
    found = run(make("resnet8"), "resnet8", tmp_path, preprocess, alone, **options)
    assert found.parity.passed
    assert open_bundle(found.path).manifest.batch == alone
    types = {part.part: part.weights for part in found.precision.parts if part.weights}
    assert {name for name, kind in types.items() if kind == "int8"} == {
        *("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
    }
    assert found.precision.quantisation.kept == ("layer3", "conv1")


def test_unknown_part_in_keep_float_is_rejected(
    make: Make, preprocess: Preprocess, tmp_path: Path, images: Path
) -> None:
    message = r"the network has no convolution in 'layer3\.0\.conv'; there are conv1, layer1\.0\.conv1"
    with pytest.raises(ConfigError, match=message):
        run(
            make("resnet8"),
            "resnet8",
            tmp_path,
            preprocess,
            calibrate=images,
            keep_float=("layer3.0.conv",),
        )


def test_int8_without_calibration_images_is_rejected(
    make: Make, preprocess: Preprocess, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="add --calibrate DIR"):
        run(make("resnet8"), "resnet8", tmp_path, preprocess)


def test_calibration_uses_the_whole_folder(preprocess: Preprocess, images: Path) -> None:
    assert len(load_images(images, preprocess, CALIBRATE)) == 20
    with pytest.raises(DataError, match="--calibrate needs a folder"):
        load_images(images / "nowhere", preprocess, CALIBRATE)
