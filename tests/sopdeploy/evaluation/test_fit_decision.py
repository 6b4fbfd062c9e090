"""`eval --fit-decision` fits the decision of a checkpoint and changes nothing else."""

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
    plain = sopdeploy.evaluate(home / "ckpt.pt", home / "photos")
    found = sopdeploy.evaluate(home / "ckpt.pt", home / "photos", fit_decision=home / "fitted.pt")
    assert (found.metrics, found.scores, plain.decision) == (plain.metrics, plain.scores, None)
    assert found.decision is not None
    assert found.decision.calibration is not None
    assert found.decision.rejection is not None
    assert found.decision.calibration.num_images == 80
    assert found.decision.calibration.temperature > 1.5
    assert found.decision.calibration.error_after < found.decision.calibration.error_before
    assert (home / "ckpt.pt").read_bytes() == source
    before, after = read_checkpoint(home / "ckpt.pt"), read_checkpoint(home / "fitted.pt")
    assert (before.decision, after.decision) == (None, found.decision)
    pairs = zip(*(build_classifier(one, home).state_dict().values() for one in (before, after)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    fitted = sopdeploy.evaluate(home / "fitted.pt", home / "photos").metrics
    assert fitted.calibration.error == pytest.approx(found.decision.calibration.error_after)


def test_the_command_writes_the_same_and_prints_it(home: Path) -> None:
    options = ["eval", str(home / "ckpt.pt"), "--data", str(home / "photos"), "--accepts", "0.8"]
    ours = sopdeploy.evaluate(home / "ckpt.pt", home / "photos", accepts=0.8, fit_decision=home / "ours.pt")
    done = CliRunner().invoke(app, [*options, "--fit-decision", str(home / "theirs.pt"), "--json"])
    assert Decision.model_validate(json.loads(done.stdout)["decision"]) == ours.decision
    assert read_checkpoint(home / "theirs.pt").decision == ours.decision
    lines = CliRunner().invoke(app, [*options, "--fit-decision", str(home / "theirs.pt")]).stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[-2:]] == ["temperature", "unknown images"]


def test_several_classes_per_image_get_a_threshold_each(home: Path) -> None:
    decision = Decision(activation="sigmoid", thresholds=(0.5, 0.5))
    write_checkpoint(home / "several.pt", replace(read_checkpoint(home / "ckpt.pt"), decision=decision))
    rows = [
        f"{path.relative_to(home / 'photos')},{path.parent.name}" for path in (home / "photos").rglob("*.png")
    ]
    table = home / "photos" / "labels.csv"
    table.write_text("\n".join(["file,classes", *sorted(rows)]))
    fitted = sopdeploy.evaluate(
        home / "several.pt", home / "photos", fit_decision=home / "fitted-several.pt"
    ).decision
    table.unlink()
    assert fitted is not None
    assert fitted.thresholds is not None
    assert (len(fitted.thresholds), fitted.calibration, fitted.rejection) == (2, None, None)
    assert fitted.thresholds != decision.thresholds


PROBLEMS: dict[str, tuple[dict[str, object], str]] = {
    "the checkpoint itself": ({"fit_decision": "ckpt.pt"}, "is the evaluated checkpoint; give another file"),
    "no images to accept": ({"accepts": 0.0}, "accepts: Input should be greater than 0"),
    "few images": ({"data": "few"}, "fit_decision: there are 2 images; give at least 50"),
    "no checkpoint": ({"source": "x.pt"}, "x.pt: no such file"),
    "a bundle": ({"source": "bundle"}, "fit_decision: only for a checkpoint, this is a bundle; omit it"),
}


@pytest.mark.parametrize(("changes", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_an_error_is_one_line_and_writes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(home)
    for label in LABELS:
        (home / "few" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(home / "few" / label / "0.png")
    (home / "bundle").mkdir(exist_ok=True)
    (home / "bundle" / "manifest.json").touch()
    files = {path.name: path.stat().st_mtime_ns for path in home.glob("*.pt")}
    arguments = {"source": "ckpt.pt", "data": "photos", "fit_decision": "new.pt", **changes}
    with pytest.raises(SopdeployError, match=message) as caught:
        sopdeploy.evaluate(**arguments)
    assert "\n" not in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in home.glob("*.pt")} == files
