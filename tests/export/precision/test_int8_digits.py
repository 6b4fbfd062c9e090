"""Trained second-order networks classify digits in int8 as in float32."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.data.datasets.small import open_digits
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe
from sopdeploy_export.pipeline import ExportOptions, export
from sopdeploy_export.precision.convert import PrecisionOptions

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
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Train a checkpoint of each family on digits for half a minute."""
    overrides = {"gsop": GSOP, "gmsop": GMSOP}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    assert train(read_recipe("digits-plain", overrides), folder).best_top1 >= 0.95
    return request.param, folder / "best.pt"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_int8_agrees_on_99_percent_of_digits_and_keeps_second_order_parts(
    trained: tuple[str, Path], digits: tuple[Path, Path], tmp_path: Path, runtime: Int8For
) -> None:
    family, checkpoint = trained
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
