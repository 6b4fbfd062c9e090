"""What is known of a run before it begins."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.errors import ConfigError, TrainingError
from sopdeploy.training.dry_run import dry_run
from sopdeploy.training.lr_finder import MAX_RATE, MIN_RATE, find_learning_rate, steepest_descent
from tests.sopdeploy.training.runs import SHORT, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

SETTINGS = [word for override in SHORT for word in ("--set", override)]


@pytest.fixture(scope="module")
def dry():
    return dry_run(short_recipe("ema={}", "accumulate=2"))


def test_a_dry_run_resolves_every_value_the_switches_of_the_network_included(dry) -> None:
    recipe = short_recipe("ema={}", "accumulate=2")
    assert dry.recipe["model"]["config"] == recipe.model.full_config()
    assert dry.recipe["ema"] == {"decay": 0.999, "warmup": True, "export": "average"}
    assert (dry.train_count, dry.held_out_count, dry.classes, dry.steps) == (359, 91, 10, 6)
    assert dry.shipped.parameters < dry.training.parameters


def test_memory_is_that_of_the_tensors(dry) -> None:
    memory = dry.memory
    parameters = 4 * dry.training.parameters / 2**20
    assert memory.gradients == pytest.approx(parameters)
    assert memory.optimizer == pytest.approx(parameters)  # one momentum
    assert memory.weights == memory.average > parameters  # and batch norm's buffers
    assert memory.activations > 0
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.average, memory.activations)
    assert memory.total == pytest.approx(sum(parts))


def test_pieces_keep_less_for_their_backward() -> None:
    whole, pieces = (dry_run(short_recipe(f"accumulate={k}")).memory.activations for k in (1, 4))
    assert 0.2 * whole < pieces < 0.35 * whole


SCHEDULES = {
    "{kind='milestones', milestones=[1, 2], warmup_epochs=0.5}": [(0, 0), (0.5, 0.1), (1, 0.01), (2, 0.001)],
    "{kind='cosine', warmup_epochs=1}": [(0, 0), (1, 0.1), (2, 0.05), (3, 0)],
    "{kind='polynomial', power=2}": [(0, 0.1), (1.5, 0.025), (3, 0)],
    "{kind='one-cycle', rise=0.5}": [(0, 0.004), (1.5, 0.1), (3, 4e-7)],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_is_told_where_the_schedule_turns(schedule) -> None:
    rates = dry_run(short_recipe(f"schedule={schedule}")).rates
    assert [pytest.approx(pair, abs=1e-12) for pair in SCHEDULES[schedule]] == list(rates)


def test_the_command_prints_it_and_writes_nothing(tmp_path) -> None:
    command = ["train", "--recipe", "digits-dsop", "--out", str(tmp_path / "run"), *SETTINGS, "--dry-run"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0
    for part in (
        "optimizer.kind = sgd",
        "learning rate: 0.004 at epoch 0",
        "memory: about",
        "one step on cpu",
    ):
        assert part in " ".join(told.stdout.split())
    as_json = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert as_json["steps"] == 6
    assert not (tmp_path / "run").exists()


def test_a_rate_is_found_between_the_ends_of_the_sweep(tmp_path) -> None:
    command = ["train", "--recipe", "digits-dsop", "--out", str(tmp_path / "run"), *SETTINGS, "--find-lr"]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["rates"][0] == pytest.approx(MIN_RATE)
    assert found["rates"] == sorted(found["rates"])
    assert max(found["rates"]) < MAX_RATE
    assert found["suggestion"] in found["rates"]
    told = CliRunner().invoke(app, command)
    assert "the loss falls fastest at" in told.stdout
    assert not (tmp_path / "run").exists()


def test_the_sweep_is_a_function_of_the_recipe_and_ends_where_the_loss_is_not_finite() -> None:
    recipe = short_recipe("optimizer.clip_norm=0.0", "model.config.aux_pooling='gap'")
    assert find_learning_rate(recipe, steps=8) == find_learning_rate(recipe, steps=8)


def test_a_sweep_computes_with_as_many_threads_as_the_recipe_says(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    find_learning_rate(short_recipe("threads=1"), steps=8)
    assert asked == [1]


@pytest.mark.parametrize(
    ("losses", "rate"), [([3, 2.9, 2, 1.9, 5], 30), ([3, 1], 20), ([3, 2.5, 9, 1, 9], 40), ([2, 1, 9], 20)]
)
def test_the_steepest_fall_on_the_way_to_the_lowest_loss_is_the_suggestion(losses, rate) -> None:
    assert steepest_descent([10, 20, 30, 40, 50][: len(losses)], losses) == rate


def test_the_noise_of_the_first_steps_is_no_fall() -> None:
    """As 60 photos gave it: the mean of two batches fell fastest of all, at a rate that learns nothing."""
    losses = [4.26, 4.20, 4.19, *[4.19 + 0.001 * (step % 3) for step in range(57)]]
    losses += [losses[-1] - 0.012 * step for step in range(20)] + [5.0 + step for step in range(10)]
    rates = [MIN_RATE * (MAX_RATE / MIN_RATE) ** (step / len(losses)) for step in range(len(losses))]
    assert 1e-2 < steepest_descent(rates, losses) < 2


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_loss_that_falls_nowhere_is_said(losses) -> None:
    with pytest.raises(TrainingError, match="decreased at no learning rate"):
        steepest_descent([1.0] * len(losses), losses)


def test_a_network_without_branches_has_none_to_remove() -> None:
    with pytest.raises(ConfigError, match="remove_branches_at: resnet8 has no branches"):
        short_recipe("model={name='resnet8', remove_branches_at=1}")
    with pytest.raises(ConfigError, match=r"remove_branches_at: the run has only 3 epochs"):
        short_recipe("model.remove_branches_at=3")


def test_resume_stands_alone_or_before_auto(tmp_path) -> None:
    command = [
        "train",
        "--recipe",
        "digits-dsop",
        "--out",
        str(tmp_path / "run"),
        *SETTINGS,
        "--set",
        "epochs=1",
    ]
    refused = CliRunner().invoke(app, [*command, "--resume", "--json"])
    assert refused.exit_code == 2
    assert "holds no run to resume" in refused.stderr
    for words in (["--resume", "auto", "--json"], ["--resume=auto", "--json"], ["--json", "--resume"]):
        assert json.loads(CliRunner().invoke(app, [*command, *words]).stdout)["epochs"] == 1
