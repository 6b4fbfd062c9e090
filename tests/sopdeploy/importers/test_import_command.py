"""`sopdeploy import`, and from there on through eval, export and predict."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.importers.import_weights import ImportOptions, import_weights
from sopdeploy.layers.normalize import Normalize
from tests.export.once import proving_once
from tests.sopdeploy.importers.released_torch import CifarResNet, prefixed, settled

SHARED = Path(os.environ.get("SOPDEPLOY_SHARED", Path(__file__).parents[4] / "shared"))
WEIGHTS = SHARED / "weights" / "cifar10-resnet"
TEST_SET = SHARED / "data" / "cifar10-jpeg" / "test.tar.xz"
PUBLISHED = {"resnet20": ("resnet20-12fca82f.th", 0.810), "resnet56": ("resnet56-4bfd9763.th", 0.832)}
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the published CIFAR-10 ResNets are not here")
needs_images = pytest.mark.skipif(not TEST_SET.is_file(), reason="CIFAR-10's test images are not here")


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def small(folder: Path) -> Path:
    torch.manual_seed(0)
    state = settled(CifarResNet(1)).state_dict()
    torch.save({"state_dict": prefixed(state), "best_prec1": 90.0}, folder / "small.th")
    return folder / "small.th"


def test_the_command_reports_what_it_found_mapped_and_ignored(tmp_path: Path) -> None:
    arguments = ["import", str(small(tmp_path)), "--as", "resnet8", "--out", str(tmp_path / "c.pt")]
    output = run(*arguments, "--keys").stdout
    for text in (
        "found    ResNet-8 for CIFAR of pytorch_resnet_cifar10",
        "mapped   44 tensors as resnet8, 0 counters set to 0",
        "ignored  best_prec1",
        "resize 32, crop 32",
        "classes  10: CIFAR-10",
        "fc.weight (10, 64) <- linear.weight: unchanged",
    ):
        assert text in output
    report = json.loads(run(*arguments, "--json").stdout)
    stored = read_checkpoint(tmp_path / "c.pt")
    assert {row["name"] for row in report["rows"]} == stored.weights.keys()
    assert report["model"] == stored.model == "resnet8"
    assert report["sha256"] == stored.training["imported_sha256"]
    assert report["beside"] == ["best_prec1"]
    for change, message in {
        ("--out", arguments[1]): "is the file to import",
        ("--as", "resnet7"): "model 'resnet7' is not in the catalog",
    }.items():
        result = CliRunner().invoke(app, [*arguments, *change])
        assert result.exit_code == 2
        assert message in result.output


@pytest.mark.parametrize(
    "model", ["resnet8", pytest.param("resnet20", marks=[pytest.mark.slow, needs_weights])]
)
def test_an_imported_network_is_exported_and_predicts_the_same(tmp_path: Path, model: str) -> None:
    source = small(tmp_path) if model == "resnet8" else WEIGHTS / PUBLISHED[model][0]
    checkpoint, file = tmp_path / "ckpt.pt", tmp_path / "image.png"
    image = Image.new("RGB", (40, 40))
    image.putdata([(6 * x, 6 * y, 3 * (x + y)) for y in range(40) for x in range(40)])
    image.save(file)
    run("import", str(source), "--as", model, "--out", str(checkpoint))
    options = ["--out", str(tmp_path / "bundles"), "--max-batch", "1", "--json"]
    with proving_once():
        bundle = json.loads(run("export", str(checkpoint), *options).stdout)["bundle"]
    prediction = json.loads(run("predict", bundle, str(file), "--json").stdout)[0]
    stored = read_checkpoint(checkpoint)
    pixels = torch.from_numpy(preprocess_image(image, stored.preprocess).copy())[None]
    with torch.no_grad():
        logits = build_classifier(stored, checkpoint)(Normalize(stored.preprocess)(pixels))
    expected = dict(zip(stored.labels, logits.softmax(dim=1)[0].tolist(), strict=True))
    probabilities = {entry["label"]: entry["probability"] for entry in prediction["classes"]}
    assert probabilities == pytest.approx({label: expected[label] for label in probabilities}, abs=1e-4)
    assert max(probabilities, key=probabilities.__getitem__) == max(expected, key=expected.__getitem__)


@pytest.mark.slow
@needs_weights
@needs_images
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_reach_their_accuracy(tmp_path: Path, name: str) -> None:
    """81.0 % and 83.2 %: the images are JPEGs of the training images."""
    with tarfile.open(TEST_SET) as packed:
        packed.extractall(tmp_path, filter="data")
    file, accuracy = PUBLISHED[name]
    import_weights(WEIGHTS / file, name, tmp_path / "ckpt.pt", ImportOptions())
    arguments = ["eval", str(tmp_path / "ckpt.pt"), "--data", str(tmp_path / "test"), "--json"]
    figures = json.loads(run(*arguments).stdout)
    assert figures["count"] == 10_000
    assert figures["top1"] == pytest.approx(accuracy, abs=0.001)
