"""Runs without --out: their numbers, the link to the newest one, and options without effect."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.errors import ConfigError
from sopdeploy.training.loop import train as run
from sopdeploy.training.recipe import read_recipe

SMALL = ["model.name=resnet8", "model.config={base_width=4}", "preprocess.resize=16", "preprocess.crop=16"]
LOOP = ["epochs=1", "few_shot.procedure=loop"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write twelve images of two classes and change to the folder that contains `photos`."""
    random = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(6):
            level = random.integers(0, 80, (20, 20, 3)) + 150 * (label == "light")
            Image.fromarray(level.astype(np.uint8)).save(tmp_path / "photos" / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def train(*options: str, settings: list[str]) -> Path:
    """Run `sopdeploy train --data photos` and return the folder of the run."""
    chosen = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    arguments = ["train", "--data", "photos", "--weights", "none", *options, *chosen, "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return Path(json.loads(done.stdout)["out"])


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


def test_resume_continues_the_newest_run_of_the_recipe(photos: Path) -> None:
    assert train("--resume", "auto", settings=LOOP) == Path("runs/photos-1")
    for number in (2, 10):
        Path(f"runs/photos-{number}").mkdir()
        os.link("runs/photos-1/last.pt", f"runs/photos-{number}/last.pt")
    assert train("--resume", settings=LOOP) == Path("runs/photos-10")
    assert train(settings=LOOP) == Path("runs/photos-11")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["epochs=50", "optimizer.lr=5"],
            r"epochs, optimizer\.lr: without effect, because the few-shot",
        ),
        (
            ["few_shot.procedure=few-shot", 'schedule={kind="one-cycle"}'],
            "schedule: without effect, .* few_shot.procedure=loop",
        ),
        ([*LOOP, "few_shot.folds=3"], r"few_shot\.folds: without effect, because the training loop runs"),
    ],
    ids=["options of the loop", "a table of the loop", "options of the few-shot procedure"],
)
def test_an_option_that_the_procedure_does_not_read_is_an_error(
    photos: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sopdeploy.train(photos, weights="none", assignments=[*SMALL, *settings])
    assert not Path("runs").exists()


def test_the_options_of_the_loop_change_nothing_in_the_few_shot_procedure(photos: Path) -> None:
    values = {"alone": [f"data.path={photos}", "start.weights=none", "few_shot.folds=3", *SMALL]}
    values["with-options"] = [
        *(
            *values["alone"],
            "epochs=3",
            "batch_size=4",
            "accumulate=2",
            "batch_norm=frozen",
            "rand_augment.ops=1",
        ),
        *("sampler=balanced", "mix.mixup=0.2", 'augment={kind="pad-crop"}', "optimizer.lr=5"),
        *("schedule.rise=0.5", "loss.label_smoothing=0.5", "start.head_factor=3", "save.every_minutes=1"),
        *("color.brightness=0.4", "compile=true"),
    ]
    found = [
        read_checkpoint(run(read_recipe("photos", settings), photos.with_name(f"run-{name}")).best).weights
        for name, settings in values.items()
    ]
    assert all((found[0][name] == found[1][name]).all() for name in found[0])
