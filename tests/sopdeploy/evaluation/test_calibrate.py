"""`sopdeploy calibrate` fits the decision of a checkpoint without one and changes nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.decision import Decision
from sopdeploy.errors import SopdeployError
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize

LABELS = ("cat", "ant")  # not sorted, as in files of other projects
RULES = Preprocess(resize=8, crop=8, interpolation="bilinear")
CONFIG = {"depth": 8, "base_width": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `ckpt.pt` with logits that are four times too large, and 80 images, of which it misses 20."""
    home, random = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    pixels = random.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    torch.manual_seed(0)
    network = sopdeploy.create_model("resnet8", num_classes=2, **CONFIG).eval()
    images = torch.from_numpy(np.stack([preprocess_image(Image.fromarray(one), RULES) for one in pixels]))
    with torch.no_grad():
        gaps = network(Normalize(RULES)(images)) @ torch.tensor([1.0, -1.0])
        layer = network.logits_layer()
        layer.bias[0] -= gaps.median()
        gaps = gaps - gaps.median()
        for parameter in layer.parameters():
            parameter.mul_(4 / float(gaps.abs().mean()))
    record = {"model": "resnet8", "config": CONFIG, "preprocess": RULES, "training": {}}
    checkpoint = Checkpoint(**record, weights=network.state_dict(), labels=LABELS)
    write_checkpoint(home / "ckpt.pt", checkpoint)
    for number, gap in enumerate(gaps.tolist()):
        label = LABELS[(gap < 0) ^ (number % 4 == 0)]
        (home / "photos" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(home / "photos" / label / f"{number}.png")
    return home


def test_the_new_checkpoint_has_a_decision_and_the_same_network(home: Path) -> None:
    source = (home / "ckpt.pt").read_bytes()
    found = sopdeploy.calibrate(home / "ckpt.pt", home / "photos")
    assert (found.path, found.num_images, found.labels) == (home / "ckpt-calibrated.pt", 80, LABELS)
    assert found.decision.calibration is not None
    assert found.decision.rejection is not None
    assert found.decision.calibration.temperature > 1.5
    assert found.decision.calibration.error_after < found.decision.calibration.error_before
    assert (home / "ckpt.pt").read_bytes() == source
    before, after = read_checkpoint(home / "ckpt.pt"), read_checkpoint(found.path)
    assert (before.decision, after.decision) == (None, found.decision)
    pairs = zip(*(build_classifier(one, home).state_dict().values() for one in (before, after)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_the_command_writes_the_same_and_prints_the_next_step(home: Path) -> None:
    options = [str(home / "ckpt.pt"), "--data", str(home / "photos"), "--accepts", "0.8"]
    ours = sopdeploy.calibrate(home / "ckpt.pt", home / "photos", home / "ours.pt", accepts=0.8)
    done = CliRunner().invoke(app, ["calibrate", *options, "--out-file", str(home / "theirs.pt"), "--json"])
    printed = json.loads(done.stdout)
    assert (printed["num_images"], printed["checkpoint"]) == (80, str(home / "theirs.pt"))
    assert Decision.model_validate(printed["decision"]) == ours.decision
    assert read_checkpoint(home / "theirs.pt").decision == ours.decision
    lines = CliRunner().invoke(app, ["calibrate", *options]).stdout.splitlines()
    names = ["temperature", "unknown images", "next"]
    assert [line.partition(":")[0] for line in lines] == names
    assert lines[-1] == f"next: sopdeploy export {home / 'ckpt-calibrated.pt'}"


def test_several_classes_per_image_get_a_threshold_each(home: Path) -> None:
    decision = Decision(activation="sigmoid", thresholds=(0.5, 0.5))
    write_checkpoint(home / "several.pt", replace(read_checkpoint(home / "ckpt.pt"), decision=decision))
    rows = [
        f"{path.relative_to(home / 'photos')},{path.parent.name}" for path in (home / "photos").rglob("*.png")
    ]
    table = home / "photos" / "labels.csv"
    table.write_text("\n".join(["file,classes", *sorted(rows)]))
    fitted = sopdeploy.calibrate(home / "several.pt", home / "photos").decision
    table.unlink()
    assert fitted.thresholds is not None
    assert (len(fitted.thresholds), fitted.calibration, fitted.rejection) == (2, None, None)
    assert fitted.thresholds != decision.thresholds


PROBLEMS = {
    "the checkpoint itself": ({"out_file": "ckpt.pt"}, "is the checkpoint to calibrate; give another name"),
    "no images to accept": ({"accepts": 0.0}, "accepts: Input should be greater than 0"),
    "few images": ({"data": "few"}, "few: has 2 images; give at least 50 to fit to"),
    "no checkpoint": ({"checkpoint": "x.pt"}, "x.pt: no such file"),
}


@pytest.mark.parametrize(("changes", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_an_error_is_one_line_and_writes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(home)
    for label in LABELS:
        (home / "few" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(home / "few" / label / "0.png")
    files = {path.name: path.stat().st_mtime_ns for path in home.glob("*.pt")}
    arguments = {"checkpoint": "ckpt.pt", "data": "photos", "out_file": "new.pt", **changes}
    with pytest.raises(SopdeployError, match=message) as caught:
        sopdeploy.calibrate(**arguments)
    assert "\n" not in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in home.glob("*.pt")} == files
