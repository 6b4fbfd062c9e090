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
from sopdeploy_export.graph.probe_images import calibration_images, generated_images
from sopdeploy_export.pipeline import Exported, ExportOptions, export
from sopdeploy_export.precision.accuracy_gate import accuracy
from sopdeploy_export.precision.casts import Calibration, float32_parts
from sopdeploy_export.precision.convert import PrecisionOptions
from sopdeploy_export.precision.int8 import quantize
from sopdeploy_export.precision.report import weight_types
from sopdeploy_export.precision.sensitivity import input_grids
from tests.export.once import graph_of, proving_once

Make = Callable[..., Classifier]
SMALL = BatchRange(optimum=2, maximum=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures by class, two of each."""
    folder = tmp_path_factory.mktemp("pictures")
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
def test_convolutions_become_int8_and_second_order_parts_do_not(
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


def test_weights_are_quantised_per_channel(preprocess: Preprocess) -> None:
    model = quantize(graph("resnet8", preprocess), generated_images(16))
    scales = {t.name: t.dims for t in model.graph.initializer if t.name.startswith("conv1.weight_scale")}
    assert list(scales.values()) == [[16]]


def test_the_same_pictures_give_the_same_bytes(preprocess: Preprocess) -> None:
    model = graph("resnet8", preprocess)
    first, second = (
        quantize(model, generated_images(16)).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_a_network_without_convolutions_to_quantise_is_refused(preprocess: Preprocess) -> None:
    with pytest.raises(LoweringError, match="no convolution to quantise"):
        quantize(graph("resnet8", preprocess), generated_images(16), ("conv1", "layer1", "layer2", "layer3"))


def run(
    network: Classifier,
    name: str,
    folder: Path,
    preprocess: Preprocess,
    batch: BatchRange = SMALL,
    **options: object,
) -> Exported:
    from tests.export.test_pipeline import save

    wish = PrecisionOptions.model_validate({"precision": "int8", **options})
    checkpoint = save(network, name, folder / "c.pt", preprocess)
    with proving_once():
        return export(checkpoint, folder / "out", ExportOptions(batch=batch, precision=wish))


def test_a_bundle_in_int8_says_what_it_lost_and_which_layers_cost_most(
    make: Make, preprocess: Preprocess, tmp_path: Path, pictures: Path
) -> None:
    found = run(
        make("isqrt-resnet8"),
        "isqrt-resnet8",
        tmp_path,
        preprocess,
        calibrate=pictures,
        evaluate=pictures,
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
    assert "Where it grows, int8 costs." in page
    assert "part-costs-title" in page
    assert found.parity.passed


def test_more_than_the_allowed_drop_writes_nothing_and_names_the_dearest_layers(
    make: Make, preprocess: Preprocess, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sopdeploy_export.precision import accuracy_gate as precision_toll

    worse = accuracy(np.zeros(50, dtype=np.int64), np.repeat([0, 1], 25), before=1.0, after=0.5)
    monkeypatch.setattr(precision_toll, "without_labels", lambda *_: worse)
    part = r"the part that costs most: (conv1|layer\d) "
    layers = r"cost most: \w.* --keep-float \w[\w.]+, or try --calibration minmax or entropy"
    advice = f"{part}.*{layers}"
    with pytest.raises(ParityError, match=rf"loses 50\.00 points of top-1 on 50 pictures.*{advice}"):
        run(make("resnet8"), "resnet8", tmp_path, preprocess, calibrate=pictures)
    assert not any((tmp_path / "out").iterdir())


def test_a_part_that_is_asked_to_stay_keeps_float32_in_a_bundle_for_single_images_too(
    make: Make, preprocess: Preprocess, tmp_path: Path, pictures: Path
) -> None:
    options = {"calibrate": pictures, "max_drop": 100.0, "keep_float": ("layer3", "conv1")}
    alone = BatchRange(optimum=1, maximum=1)
    found = run(make("resnet8"), "resnet8", tmp_path, preprocess, alone, **options)
    assert found.parity.passed
    assert open_bundle(found.path).manifest.batch == alone
    types = {part.part: part.weights for part in found.precision.parts if part.weights}
    assert {name for name, kind in types.items() if kind == "int8"} == {
        *("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
    }
    assert found.precision.quantisation.kept == ("layer3", "conv1")


def test_a_part_that_does_not_exist_cannot_stay(
    make: Make, preprocess: Preprocess, tmp_path: Path, pictures: Path
) -> None:
    message = r"no convolution belongs to 'layer3\.0\.conv'; there are conv1, layer1\.0\.conv1"
    with pytest.raises(ConfigError, match=message):
        run(
            make("resnet8"),
            "resnet8",
            tmp_path,
            preprocess,
            calibrate=pictures,
            keep_float=("layer3.0.conv",),
        )


def test_int8_without_pictures_is_refused(make: Make, preprocess: Preprocess, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add --calibrate DIR"):
        run(make("resnet8"), "resnet8", tmp_path, preprocess)


def test_calibration_takes_pictures_from_all_over_the_folder(preprocess: Preprocess, pictures: Path) -> None:
    assert len(calibration_images(pictures, preprocess)) == 20
    with pytest.raises(DataError, match="--calibrate a folder"):
        calibration_images(pictures / "nowhere", preprocess)
