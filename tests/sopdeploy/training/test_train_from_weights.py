"""Runs that start from weights, train only branches, or have a teacher."""

from pathlib import Path

import pytest
import torch

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.training.loop import train
from tests.sopdeploy.training.runs import interrupt, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

PLAIN = ["model.name=resnet8", "model.config={base_width=4}", "epochs=1"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Return the checkpoint of a plain network."""
    return train(short_recipe(*PLAIN), tmp_path_factory.mktemp("plain") / "run").best


def test_the_second_phase_trains_only_the_branches(plain, tmp_path) -> None:
    recipe = short_recipe(f"start.weights={plain}", "start.learn=branches", "epochs=2")
    interrupt(recipe, tmp_path / "stopped", "step", 1, 2)
    train(recipe, tmp_path / "stopped", resume=True)
    result = train(recipe, tmp_path / "whole")
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    before, after = read_checkpoint(plain).weights, read_checkpoint(result.last).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(name.startswith("branches.") for name in after)
    first, second = read_checkpoint(result.last).resume["position"]["history"]
    assert second["losses"]["layer1_0"] < first["losses"]["layer1_0"]
    assert first["figures"] == second["figures"]


def test_a_fine_tuned_run_starts_better_and_its_classifier_learns_faster(plain, tmp_path) -> None:
    run = train(short_recipe(*PLAIN, f"start.weights={plain}", "start.head_factor=5"), tmp_path / "run")
    groups = read_checkpoint(run.last).resume["optimizer"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(5 * groups[0]["lr"])
    before, after = (
        read_checkpoint(last).resume["position"]["history"][0]["losses"]["main"]
        for last in (plain.parent / "last.pt", run.last)
    )
    assert after < before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["start.head_factor=2"], r"start\.weights: not set; give the checkpoint to start from"),
        (["teacher.share=0.5"], r"teacher\.weights: not set; give the checkpoint of the teacher"),
        (["start.weights={plain}", "model.config.base_width=6"], "of the model's shape; give a checkpoint"),
        (["start.weights={plain}", "start.learn=branches", *PLAIN[:2]], "this network has no branches"),
        (["teacher.weights={plain}", "preprocess.mean=[0.1,0.1,0.1]"], "normalizes colors differently; set"),
    ],
)
def test_unsuitable_weights_are_refused_with_one_line(plain, tmp_path, settings, message) -> None:
    settings = [setting.replace("{plain}", str(plain)) for setting in settings]
    with pytest.raises(ConfigError, match=message) as error:
        train(short_recipe(*settings), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_the_divergence_from_the_teacher_is_part_of_the_loss(plain, tmp_path) -> None:
    settings = [*PLAIN, f"teacher.weights={plain}", "teacher.temperature=2", "epochs=2"]
    result = train(short_recipe(*settings), tmp_path / "run")
    first, second = (row["losses"] for row in read_checkpoint(result.last).resume["position"]["history"])
    assert second["teacher"] < first["teacher"]
    assert first["loss"] == pytest.approx(0.5 * (first["main"] + first["teacher"]), rel=1e-5)
