"""The whole workflow of a user: photos, train, evaluate, export, verify, predict, classify over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import SopdeployError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy_commands import demo
from sopdeploy_commands.app import app
from tests.export.once import proving_once
from tests.support import quick_torch
from tests.support.children import serving
from tests.support.service import write_bundle
from tests.support.slow import mostly_slow

ROOT = Path(__file__).parents[1]
COLOURS = {"blue": (40, 60, 210), "green": (30, 190, 60), "red": (215, 40, 50)}
PHOTOS = 12
SMALL = [
    "epochs=2",
    "threads=1",
    "model.name=dsop-resnet8",
    "preprocess.resize=18",
    "preprocess.crop=16",
]
pytestmark = pytest.mark.timeout(900)


def take_photos(folder: Path) -> None:
    """Write noisy photographs of three colors and several sizes into *folder*."""
    random = np.random.default_rng(5)
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(PHOTOS):
            noise = random.normal(0, 25, (40, 40 + number, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number:02}.jpg")


def answer(*arguments: str, home: Path) -> Any:
    """Run a command in *home*, without a process of its own, which would import torch again."""
    with chdir(home):
        done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somebody")
    take_photos(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def trained(home: Path) -> dict[str, Any]:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return answer("train", "--recipe", "photos-dsop", "--data", "photos", *settings, home=home)


@pytest.fixture(scope="module")
def exported(home: Path, trained: dict[str, Any]) -> dict[str, Any]:
    with proving_once():  # `test_user_network` proves without a cache
        found: dict[str, Any] = answer("export", trained["best"], "--detach", home=home)
    return found


def test_training_writes_a_run_with_a_report_and_says_where(
    home: Path, trained: dict[str, Any]
) -> None:
    assert (home / trained["best"]).is_file()
    assert Path(trained["best"]).parent == Path("runs/photos-1")
    assert trained["num_epochs"] == 2
    assert 0 <= trained["best_top1"] <= 1
    assert "validation images" in (home / trained["report"]).read_text(encoding="utf-8")
    assert trained["held_out_count"] == pytest.approx(len(COLOURS) * PHOTOS / 5, abs=3)


def test_the_export_detaches_with_proof_and_says_nothing_of_its_machine(
    home: Path, exported: Any
) -> None:
    bundle = home / exported["bundle"]
    assert bundle.name == f"photos-{exported['id']}"

    manifest = open_bundle(bundle).manifest
    origin = manifest.origin.model_dump(include={"run", "data", "num_images", "num_classes"})
    assert origin == {
        "run": "photos-1",
        "data": "photos",
        "num_images": 36,
        "num_classes": len(COLOURS),
    }
    assert (manifest.project, manifest.model) == ("photos", "dsop-resnet8")
    assert exported["detached"] == ["branches"]
    assert exported["num_tensors_removed"] > 0
    assert not exported["parity"]["drift_allowed"]
    assert {path.name for path in bundle.parent.iterdir()} == {
        bundle.name,
        f"{bundle.name}.html",
        "latest",
    }
    assert json.loads((bundle / "labels.json").read_bytes()) == sorted(COLOURS)

    told = {
        str(home),
        home.name,
        str(Path.home()) + "/",
        "photos/",
        "runs/",
        os.getcwd(),  # noqa: PTH109
        sys.prefix,
    }
    for path in bundle.iterdir():
        assert [secret for secret in told if secret.encode() in path.read_bytes()] == [], (
            path.name
        )


def test_a_service_gives_the_numbers_of_the_bundle_and_ends_cleanly(
    home: Path, trained: dict[str, Any], exported: dict[str, Any]
) -> None:
    verified = answer("verify", exported["bundle"], home=home)
    assert (verified["id"], verified["num_files"]) == (exported["id"], 16)

    measured = answer("eval", trained["best"], "--data", "photos", home=home)
    found = answer("eval", exported["bundle"], "--data", "photos", home=home)
    photos = [f"photos/{label}/0{number}.jpg" for label in COLOURS for number in (0, 7)]
    predicted = answer("predict", exported["bundle"], *photos, home=home)
    with serving(str(home / exported["bundle"])) as client:
        for photo, prediction in zip(photos, predicted, strict=True):
            reply = client.post("/v1/classify", content=(home / photo).read_bytes())
            classes = {row["label"]: row["probability"] for row in reply.json()["classes"]}
            expected = {row["label"]: row["probability"] for row in prediction["classes"]}
            assert classes == pytest.approx(expected, abs=1e-6)

        client.child.send_signal(signal.SIGTERM)
        _, errors = client.child.communicate(timeout=60)
        assert errors == ""
        assert client.child.returncode == 0

    assert measured["count"] == len(COLOURS) * PHOTOS
    assert measured["top1"]["share"] >= 1 / len(COLOURS)
    assert measured["log_loss"] == pytest.approx(found["log_loss"], abs=1e-5)


def run_here(
    command: list[str], *, cwd: Path, check: bool, stdout: int, stderr: int, text: bool
) -> CompletedProcess[str]:
    """Run a command of `sopdeploy` in this process, as a process of its own would import torch again."""
    assert command[:3] == [sys.executable, "-m", "sopdeploy"]
    assert check is False
    assert stdout == subprocess.PIPE
    assert stderr == subprocess.STDOUT
    assert text is True
    with chdir(cwd), quick_torch.one_thread(), proving_once():
        done = CliRunner().invoke(app, command[3:])
    assert done.exit_code == 0, done.output
    return CompletedProcess(command, done.exit_code, done.output)


@pytest.mark.slow
def test_the_demo_detaches_branches_serves_and_classifies_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": run_here})
    )
    monkeypatch.setattr(demo, "classify_photographs", lambda out: None)  # the next test
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])

    assert done.exit_code == 0, done.output
    assert re.search(
        r"35\d of 359 right: the validation digits, .* \(95 % interval 9\d to ", done.stdout
    )
    # The table of what was detached: before, after and removed.
    for what in ("tensors", "parameters", "multiply-adds per image"):
        row = re.search(rf"^{what} +([\d,]+) +([\d,]+) +([\d,]+)", done.stdout, re.MULTILINE)
        assert row is not None
        before, after, removed = (int(text.replace(",", "")) for text in row.groups())
        assert before - after == removed > 0
    assert "Next: " in done.stdout


@pytest.mark.nightly
def test_the_demo_classifies_photographs_without_a_network(tmp_path: Path) -> None:
    unreachable = dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
    )
    environment = (
        os.environ | unreachable | {"HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
    )
    command = [sys.executable, "-m", "sopdeploy", "demo"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr

    rates = re.findall(
        r"^(\d+) of (\d+) right: .* \(95 % interval \d+ to \d+ %\)$", done.stdout, re.MULTILINE
    )
    assert [int(count) for _, count in rates] == [50, 10, 10, 359]
    evidence = re.findall("^(proved|measured) +✓ ", done.stdout, re.MULTILINE)
    assert evidence.count("proved") >= 2
    assert evidence.count("measured") >= 3


def test_the_demo_fails_if_fewer_answers_are_right_than_it_expects(
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo.expect("the photos", Rate.of(8, 10), 0.8)

    printed = capsys.readouterr().out
    for value in ("8 of 10", "80.0 %", "49 to 94 %"):
        assert value in printed
    with pytest.raises(SopdeployError, match=r"70\.0 % .* 80 %"):
        demo.expect("the photos", Rate.of(7, 10), 0.8)


def test_the_photographs_of_the_demo_are_those_of_its_table() -> None:
    photos = list(demo.PHOTOS.rglob("*.jpg"))
    counts = {
        name: len(list((demo.PHOTOS / name).rglob("*.jpg")))
        for name in ("clothing", "new", "others")
    }

    assert counts == {"clothing": 50, "new": 10, "others": 10}
    assert sum(path.stat().st_size for path in photos) < 2_500_000

    of_tests = {path.name for path in (ROOT / "tests").rglob("*.jpg")}
    contents = {path.read_bytes() for path in photos}
    assert len(contents) == len(photos)
    assert {path.name for path in photos} & of_tests == set()


SESSION = "onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx', providers=['CPUExecutionProvider'])"


@pytest.mark.parametrize(
    "module",
    mostly_slow(
        ["sopdeploy_service.runtime.onnxruntime", "sopdeploy_export"],
        "sopdeploy_service.runtime.onnxruntime",
    ),
)
def test_running_a_network_writes_nothing_to_the_home_folder(
    module: str, tmp_path: Path
) -> None:
    code = f"import sys, {module}, onnxruntime; {SESSION}"
    bundle = write_bundle(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    # With CI or without a home folder, onnxruntime keeps no telemetry anyway.
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "ORT_DISABLE_TELEMETRY")
    }
    environment = kept | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, str(bundle)], env=environment, check=True)

    assert list(home.rglob("*")) == []
