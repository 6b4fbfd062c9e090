"""Runs without --out: their numbers, the link to the newest one, and options without effect."""

import html
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.bundle.decision import Calibration, Decision
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.errors import ConfigError, amount
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.training.records import run_folder
from sopdeploy.training.records.results import (
    LIST_WRONG_LABELS,
    ClassScore,
    LoopResult,
    insert_folders,
)
from sopdeploy.training.records.summary import training_rows
from sopdeploy.training.train import describe_problem
from sopdeploy.weights.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy_commands.app import app
from sopdeploy_commands.runs_page import MAX_BEFORE, list_runs, write_runs_page
from sopdeploy_commands.train import print_result
from tests.support.forged import write_hollow

SMALL = [
    "model.name=resnet8",
    "model.config={base_width=4}",
    "preprocess.resize=16",
    "preprocess.crop=16",
]
LOOP = ["epochs=1", "procedure.kind=loop"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write twelve images of two classes and change to the folder that contains `photos`."""
    random = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(6):
            level = random.integers(0, 80, (20, 20, 3)) + 150 * (label == "light")
            Image.fromarray(level.astype(np.uint8)).save(
                tmp_path / "photos" / label / f"{number}.png"
            )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def train(*options: str, settings: list[str]) -> Path:
    """Run `sopdeploy train --data photos` and return the folder of the run."""
    chosen = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    arguments = ["train", "--data", "photos", "--weights", "none", *options, *chosen, "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return Path(json.loads(done.stdout)["out"])


@pytest.mark.slow
def test_runs_are_numbered_and_latest_leads_to_the_newest_one(photos: Path) -> None:
    latest = Path("runs/latest")
    assert train(settings=LOOP) == Path("runs/photos-1")
    assert latest.readlink() == Path("photos-1")
    assert train(settings=[]) == Path("runs/photos-2")
    assert latest.readlink() == Path("photos-2")
    assert train("--out", "runs/mine", settings=LOOP) == Path("runs/mine")
    assert latest.readlink() == Path("mine")
    assert train("--out", "elsewhere/mine", settings=LOOP) == Path("elsewhere/mine")
    assert [path.name for path in Path("elsewhere").iterdir()] == ["mine"]
    assert (latest / "best.pt").read_bytes() == Path("runs/mine/best.pt").read_bytes()


def test_a_training_that_starts_at_once_takes_the_next_number(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file = run_folder.lock_file

    def lock_unless_first(path: Path, **options: Any) -> Any:
        if path.parent.name == "photos-1":  # another process has created and locked it just now
            path.touch()
            raise BlockingIOError
        return lock_file(path, **options)

    monkeypatch.setattr(run_folder, "lock_file", lock_unless_first)
    assert train(settings=LOOP) == Path("runs/photos-2")
    assert (Path("runs/latest")).readlink() == Path("photos-2")


def test_a_resumed_run_that_another_process_trains_is_an_error(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings=LOOP)
    one_attempt = Mock(side_effect=[BlockingIOError()])
    monkeypatch.setattr(run_folder, "lock_file", one_attempt)
    done = CliRunner().invoke(app, ["train", "--data", "photos", "--resume", "always"])

    assert done.exit_code == 2
    assert "another process" in done.stderr


def test_runs_and_bundles_are_listed_with_what_a_server_serves(photos: Path) -> None:
    assert list_runs() == []

    outs = [train(settings=LOOP), train("--name", "lights", settings=LOOP)]
    assert outs == [Path("runs/photos-1"), Path("runs/lights-1")]

    checkpoints = [read_checkpoint(out / "best.pt") for out in outs]
    assert [checkpoint.project for checkpoint in checkpoints] == ["photos", "lights"]

    first = checkpoints[0].origin
    assert first is not None
    assert first.formats == ("png",)
    assert (first.data, first.num_images, first.num_classes, len(first.sample)) == (
        "photos",
        12,
        2,
        10,
    )

    days = [f"2026-01-0{day}T10:00:00.000000Z" for day in (1, 2, 3)]
    old, new, pulled = (
        write_hollow(
            Path("bundles"), project=project, exported_at=day, origin=origin, opset=opset
        )
        for project, day, origin, opset in zip(
            ("photos", "photos", "hats"), days, (first, first, None), (16, 17, 18), strict=True
        )
    )
    shutil.copytree(new, "bundles/broken")
    Path("bundles/broken/model.onnx").unlink()
    for name in ("broken", "older"):
        Path("runs", name).mkdir()
    Path("runs/broken/best.pt").write_bytes(b"half")
    write_checkpoint(
        Path("runs/older/best.pt"), replace(checkpoints[0], training={"procedure": {}})
    )
    rows = {(row.run, row.bundle): row for row in list_runs()}

    assert [key for key, row in rows.items() if row.newest] == [
        ("", pulled.name),
        ("photos-1", new.name),
    ]
    assert rows.keys() == {
        ("photos-1", old.name), ("photos-1", new.name), ("photos-1", "broken"), ("lights-1", ""),
        ("", pulled.name), ("broken", ""), ("older", ""),
    }  # fmt: skip

    of_old = rows["photos-1", old.name]
    assert (of_old.num_images, of_old.num_classes, of_old.date) == (12, 2, days[0])
    assert of_old.estimate.startswith("top-1 ")
    assert "exported earlier" in of_old.problem
    assert rows["photos-1", "broken"].problem == f"a copy of {new.name}"
    assert "damaged" in rows["broken", ""].problem
    assert "no valid result" in rows["older", ""].problem

    write_runs_page()
    page = Path("runs/index.html").read_text(encoding="utf-8")
    for text in ("photos-1", "lights-1", new.name, "newest", "2026-01-02 10:00"):
        assert text in page
    pages = re.findall('<a href="([^"]+)">', page)
    assert pages
    assert all((Path("runs") / link).is_file() for link in pages)


@pytest.mark.slow
def test_resume_continues_the_newest_run_of_the_project(photos: Path) -> None:
    assert train("--resume", "auto", settings=LOOP) == Path("runs/photos-1")

    before = read_checkpoint(Path("runs/photos-1/last.pt")).origin
    assert train("--resume", "always", settings=LOOP) == Path("runs/photos-1")
    assert read_checkpoint(Path("runs/photos-1/last.pt")).origin == before
    with pytest.raises(ConfigError, match=r"project = photos.* lights"):
        sopdeploy.train(
            photos,
            out="runs/photos-1",
            resume="always",
            name="lights",
            weights="none",
            set=[*SMALL, *LOOP],
        )

    for number in (2, 10):
        Path(f"runs/photos-{number}").mkdir()
        os.link("runs/photos-1/last.pt", f"runs/photos-{number}/last.pt")

    assert train("--resume", "always", settings=LOOP) == Path("runs/photos-10")
    assert train(settings=LOOP) == Path("runs/photos-11")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["procedure.kind=few_shot", "epochs=50", "optimizer.lr=5"], "epochs: "),
        (["procedure.kind=few_shot", 'schedule={kind="one-cycle"}'], "schedule: "),
        ([*LOOP, "procedure.folds=3"], r"procedure\.folds: "),
    ],
    ids=["options of the loop", "a table of the loop", "options of the few-shot procedure"],
)
def test_an_option_that_the_procedure_does_not_read_is_an_error(
    photos: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sopdeploy.train(photos, weights="none", set=[*SMALL, *settings])
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_starts_from_another_one_and_is_compared_with_it(
    photos: Path,
) -> None:
    first = train("--name", "lights", settings=[*LOOP, "batch_size=3"])
    origin = read_checkpoint(first / "best.pt").origin
    bundle = write_hollow(
        Path("bundles"), project="lights", exported_at=origin.started, origin=origin, opset=17
    )
    (photos / "dark").rename(photos / "black")
    for number, path in enumerate(sorted((photos / "black").iterdir())):
        pixels = np.random.default_rng(number).integers(0, 30, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(path)

    for source, folder, added in (
        (first, "lights-1", "+0 photos, new: black, no longer a class: dark"),
        (Path("runs/latest"), "lights-2", "+0 photos"),
        (bundle, "lights-1", "+0 photos, new: black, no longer a class: dark"),
    ):
        arguments = ["train", "--data", "photos", "--from", str(source), "--set", "epochs=2"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("before, "))
        assert re.fullmatch(
            rf"before, {folder}: top-1 .*; since then {re.escape(added)}", line
        ), line
        recipe = read_checkpoint(Path("runs/latest/best.pt")).training["recipe"]
        assert (recipe["batch_size"], recipe["epochs"], recipe["project"]) == (3, 2, "lights")
    assert Path("runs/latest").readlink() == Path("lights-4")


def test_the_page_of_a_run_lists_those_of_its_project_before_it(photos: Path) -> None:
    before = train(settings=LOOP)
    # Newer runs of another project do not replace that of this one.
    of_lights = replace(read_checkpoint(before / "best.pt"), project="lights")
    for number in range(MAX_BEFORE):
        write_checkpoint(Path(f"runs/lights-{number}/best.pt"), of_lights)
    figures = dict(training_rows(read_checkpoint(before / "best.pt").training))["accuracy"]
    page = (train(settings=LOOP) / "report.html").read_text(encoding="utf-8")
    section = page.partition("<h2>Runs before</h2>")[2].partition("<h2>")[0]

    assert section.count("<tr>") == 2  # the heading and one run
    for cell in ("photos-1", "12", "2", html.escape(figures)):
        assert f"<bdi>{cell}</bdi>" in section
    assert "Runs before" not in (before / "report.html").read_text(encoding="utf-8")


def test_the_command_that_lists_wrong_labels_has_the_folders_of_the_run() -> None:
    line = f"2 labels of 36 probably wrong; list them: {LIST_WRONG_LABELS}"
    assert insert_folders(line, Path("my photos"), Path("runs/photos-1")).endswith(
        "list them: sopdeploy train --data 'my photos' --dry-run --wrong-labels runs/photos-1"
    )
    assert insert_folders("page: x", None, Path("runs/photos-1")) == "page: x"


AMOUNTS = [
    (1, "+1 photo"),
    (-1, "-1 photo"),
    (0, "+0 photos"),
    (1200, "+1,200 photos"),
]


@pytest.mark.parametrize(("number", "text"), AMOUNTS)
def test_a_noun_is_plural_unless_there_is_one(number: int, text: str) -> None:
    assert amount(number, "photo", "+") == text


# Of ten images, always predicting the largest class is right for seven
@pytest.mark.parametrize(("right", "is_useless"), [(8, False), (7, True), (2, True)])
def test_a_loop_has_a_problem_if_its_accuracy_is_at_chance(
    right: int, is_useless: bool
) -> None:
    images = ArrayImages(
        ("cat", "dog"), np.zeros((10, 4, 4, 3), np.uint8), np.repeat([0, 1], [3, 7])
    )
    result = LoopResult(
        epoch=1, num_epochs=1, top1=Rate.of(right, 10), count=10, selected_by="nothing"
    )

    setup: Any = SimpleNamespace(data=SimpleNamespace(held_out=images))
    fit: Any = SimpleNamespace(result=result)
    assert bool(describe_problem(setup, fit)) == is_useless


@pytest.mark.parametrize(("problem", "last"), [("", "next"), ("chance", "problem")])
def test_a_finished_run_prints_results_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str, last: str
) -> None:
    calibration = Calibration(
        temperature=2.0, loss_before=0.5, loss_after=0.4, num_images=9, estimated_on="held-out"
    )
    print_result(
        SimpleNamespace(
            classes=(ClassScore(label="cat", images=4, precision=None, recall=0.5),),
            procedure=LoopResult(
                epoch=1, num_epochs=1, top1=Rate.of(7, 9), count=9, selected_by="nothing"
            ),
            decision=Decision(calibration=calibration),
            previous="",
            problem=problem,
            report="report.html",
            best=tmp_path / "best.pt",
            data=None,
            out=tmp_path,
        )
    )
    printed = capsys.readouterr().out

    assert ("sopdeploy export" in printed) == (not problem)

    begins = [line.partition(":")[0] for line in printed.splitlines()]
    assert [line.split() for line in begins[:2]] == [
        ["class", "images", "precision", "recall"],
        ["cat", "4", "-", "50", "%"],
    ]
    assert begins[2:] == ["epoch 1 of 1", "calibration", "report", last]
