"""Runs that start from weights, learn branches alone, or have a teacher."""

from pathlib import Path

import pytest
import torch

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.training.loop import train
from sopdeploy.training.signals import TrainingStoppedError
from tests.sopdeploy.training.runs import RecordingCallback, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

PLAIN = ["model.name=resnet8", "model.config={base_width=4}", "epochs=1"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Return the checkpoint of a plain network on digits."""
    return train(short_recipe(*PLAIN), tmp_path_factory.mktemp("plain") / "run").best


def test_only_the_branches_learn_in_the_second_phase(plain, tmp_path) -> None:
    recipe = short_recipe(f"start.weights={plain}", "start.learn=branches", "epochs=2")
    with pytest.raises(TrainingStoppedError):
        train(recipe, tmp_path / "parts", callback=RecordingCallback(stop_at=("step", 1, 2)))
    train(recipe, tmp_path / "parts", resume=True)
    result = train(recipe, tmp_path / "whole")
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    before, after = read_checkpoint(plain).weights, read_checkpoint(result.last).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(name.startswith("branches.") for name in after)
    history = read_checkpoint(result.last).resume["position"]["history"]
    assert history[1]["losses"]["layer1_0"] < history[0]["losses"]["layer1_0"]
    assert history[0]["figures"] == history[1]["figures"]


def test_a_start_takes_every_weight_and_the_head_learns_faster(plain, tmp_path) -> None:
    run = train(short_recipe(*PLAIN, f"start.weights={plain}", "start.head_factor=5"), tmp_path / "run")
    groups = read_checkpoint(run.last).resume["optimizer"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(5 * groups[0]["lr"])
    first = [
        read_checkpoint(last).resume["position"]["history"][0]["losses"]["main"]
        for last in (plain.parent / "last.pt", run.last)
    ]
    assert first[1] < first[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["start.head_factor=2"], r"start\.weights: not set; give the checkpoint to start from"),
        (["teacher.share=0.5"], r"teacher\.weights: not set; give the checkpoint of the teacher"),
        (["start.weights={plain}", "model.config.base_width=6"], "of the model's shape; give a checkpoint"),
        (["start.weights={plain}", "start.learn=branches", *PLAIN[:2]], "this network has no branches"),
        (
            ["teacher.weights={plain}", "preprocess.mean=[0.1,0.1,0.1]"],
            "normalizes colors differently; set preprocess",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(plain, tmp_path, settings, message) -> None:
    settings = [setting.replace("{plain}", str(plain)) for setting in settings]
    with pytest.raises(ConfigError, match=message) as problem:
        train(short_recipe(*settings), tmp_path / "run")
    assert "\n" not in str(problem.value)


def test_a_teacher_is_part_of_the_loss_and_learns_nothing(plain, tmp_path) -> None:
    settings = [*PLAIN, f"teacher.weights={plain}", "teacher.temperature=2", "epochs=2"]
    result = train(short_recipe(*settings), tmp_path / "run")
    losses = [row["losses"] for row in read_checkpoint(result.last).resume["position"]["history"]]
    assert losses[1]["teacher"] < losses[0]["teacher"]
    assert losses[0]["loss"] == pytest.approx(0.5 * (losses[0]["main"] + losses[0]["teacher"]), rel=1e-5)
