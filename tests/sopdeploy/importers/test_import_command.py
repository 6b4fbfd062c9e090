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
from sopdeploy.importers.import_weights import SOURCES, ImportOptions, import_weights
from sopdeploy.layers.normalize import Normalize
from tests.sopdeploy.importers.released_torch import CifarResNet, prefixed, settled

SHARED = Path(os.environ.get("SOPDEPLOY_SHARED", Path(__file__).parents[4] / "shared"))
WEIGHTS = SHARED / "weights" / "cifar10-resnet"
TEST_SET = SHARED / "data" / "cifar10-jpeg" / "test.tar.xz"
PUBLISHED = {"resnet20": ("resnet20-12fca82f.th", 0.810), "resnet56": ("resnet56-4bfd9763.th", 0.832)}
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the published CIFAR-10 ResNets are not here")
needs_pictures = pytest.mark.skipif(not TEST_SET.is_file(), reason="CIFAR-10's test images are not here")


def run(*arguments: str) -> Any:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == 0, found.output
    return found


def small(folder: Path) -> Path:
    torch.manual_seed(0)
    state = settled(CifarResNet(1)).state_dict()
    torch.save({"state_dict": prefixed(state), "best_prec1": 90.0}, folder / "small.th")
    return folder / "small.th"


def test_the_command_reports_what_it_found_mapped_and_ignored(tmp_path: Path) -> None:
    shown = run("import", str(small(tmp_path)), "--as", "resnet8", "--out", str(tmp_path / "c.pt")).stdout
    assert "found    ResNet-8 for CIFAR of pytorch_resnet_cifar10" in shown
    assert "mapped   44 tensors as resnet8, 0 counters set to 0" in shown
    assert "ignored  best_prec1" in shown
    assert "resize 32, crop 32" in shown
    assert "classes  10: CIFAR-10" in shown


def test_keys_are_shown_one_per_line(tmp_path: Path) -> None:
    shown = run(
        "import", str(small(tmp_path)), "--as", "resnet8", "--out", str(tmp_path / "c.pt"), "--keys"
    ).stdout
    assert "fc.weight (10, 64) <- linear.weight: unchanged" in shown


def test_json_names_every_tensor(tmp_path: Path) -> None:
    arguments = ["import", str(small(tmp_path)), "--as", "resnet8", "--out", str(tmp_path / "c.pt"), "--json"]
    report = json.loads(run(*arguments).stdout)
    stored = read_checkpoint(tmp_path / "c.pt")
    assert {row["name"] for row in report["rows"]} == stored.weights.keys()
    assert report["model"] == stored.model == "resnet8"
    assert report["sha256"] == stored.training["imported_sha256"]
    assert report["beside"] == ["best_prec1"]


def test_the_source_file_is_not_overwritten(tmp_path: Path) -> None:
    file = small(tmp_path)
    found = CliRunner().invoke(app, ["import", str(file), "--as", "resnet8", "--out", str(file)])
    assert found.exit_code == 2
    assert "is the file to import" in found.output


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["import", str(small(tmp_path)), "--as", "resnet7"])
    assert found.exit_code == 2
    assert "model 'resnet7' is not in the catalog" in found.output


def test_every_source_has_a_project() -> None:
    assert len({type(source) for source in SOURCES}) == len(SOURCES) == 7
    assert all(source.project for source in SOURCES)


def test_an_imported_network_is_exported_and_predicts_the_same(tmp_path: Path) -> None:
    answers_agree(small(tmp_path), "resnet8", tmp_path, example_image(tmp_path))


@pytest.mark.slow
@needs_weights
def test_a_published_network_is_exported_and_predicts_the_same(tmp_path: Path) -> None:
    answers_agree(WEIGHTS / PUBLISHED["resnet20"][0], "resnet20", tmp_path, example_image(tmp_path))


def example_image(folder: Path) -> Path:
    side = range(40)
    image = Image.new("RGB", (40, 40))
    image.putdata([(6 * x, 6 * y, 3 * (x + y)) for y in side for x in side])
    image.save(folder / "image.png")
    return folder / "image.png"


def answers_agree(file: Path, name: str, folder: Path, shown: Path) -> None:
    ckpt = folder / "ckpt.pt"
    run("import", str(file), "--as", name, "--out", str(ckpt))
    where = ["--out", str(folder / "bundles"), "--max-batch", "1"]
    exported = json.loads(run("export", str(ckpt), *where, "--json").stdout)
    answer = json.loads(run("predict", exported["bundle"], str(shown), "--json").stdout)
    stored = read_checkpoint(ckpt)
    with Image.open(shown) as opened:
        images = torch.from_numpy(stored.preprocess(opened).copy())[None]
    with torch.no_grad():
        expected = build_classifier(stored, ckpt)(Normalize(stored.preprocess)(images)).softmax(dim=1)[0]
    found = {one["label"]: one["probability"] for one in answer[0]["classes"]}
    for label, probability in found.items():
        assert probability == pytest.approx(float(expected[stored.labels.index(label)]), abs=1e-4)
    assert max(found, key=lambda label: found[label]) == stored.labels[int(expected.argmax())]


@pytest.mark.slow
@needs_weights
@needs_pictures
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
