"""Learning rate schedules compared with PyTorch's, `--dry-run`, `--find-lr` and the forms of `--resume`."""

import json
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.cli.training.dry_run import FEW_SHOT
from sopdeploy.data.sources import open_data
from sopdeploy.errors import TrainingError
from sopdeploy.models.describe import describe
from sopdeploy.training.dry_run import dry_run
from sopdeploy.training.loop import epoch_data
from sopdeploy.training.lr_finder import MAX_RATE, MIN_RATE, find_learning_rate, steepest_descent
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.schedule import Cosine, Milestones, OneCycle, Polynomial
from tests.sopdeploy.training.runs import SHORT, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture
def command(tmp_path) -> list[str]:
    settings = [word for override in SHORT for word in ("--set", override)]
    return ["train", "--recipe", "digits-dsop", "--out", str(tmp_path / "run"), *settings]


def test_a_dry_run_resolves_the_recipe_and_measures_memory() -> None:
    recipe = short_recipe("ema={}", "accumulate=2")
    dry = dry_run(recipe)
    assert dry.recipe["model"]["config"] == recipe.model.full_config()
    rates = dict(dry.rates)
    assert [rates[0.0], rates[3.0]] == pytest.approx([0.004, 4e-7])
    assert len(rates) == 9
    assert dry.recipe["ema"] == {"decay": 0.999, "warmup": True, "export": "average"}
    assert (dry.train_count, dry.held_out_count, dry.classes, dry.steps) == (205, 52, 10, 6)
    assert dry.shipped.parameters < dry.training.parameters
    memory, parameters = dry.memory, 4 * dry.training.parameters / 2**20
    assert memory.gradients == pytest.approx(parameters)
    assert memory.optimizer == pytest.approx(parameters)  # one momentum buffer
    assert memory.weights == memory.average > parameters  # and the buffers of batch norm
    assert memory.activations > 0
    assert memory.total == pytest.approx(sum(memory.model_dump().values()))
    whole, split = (dry_run(short_recipe(f"accumulate={k}")).memory.activations for k in (1, 4))
    assert 0.2 * whole < split < 0.35 * whole


def test_training_crops_can_have_another_size_than_evaluation() -> None:
    recipe = short_recipe('augment={kind="random-side", sides=[12, 16], crop=12}')
    dataset, _ = epoch_data(recipe, open_data(recipe.data).train, 0)
    assert dataset[0][0].shape == (12, 12, 3)
    dry = dry_run(recipe)
    model = recipe.model
    counts = {side: describe(model.name, image_size=side, num_classes=10, **model.config) for side in (8, 12)}
    assert (dry.training, dry.shipped) == (counts[12].training, counts[8].shipped)
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_the_commands_print_and_write_nothing(tmp_path, monkeypatch, command) -> None:
    result = CliRunner().invoke(app, [*command, "--dry-run"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    lines = ("optimizer.kind = sgd", "learning rate: 0.004 at epoch 0", "memory: about", "one step on cpu")
    assert all(line in text for line in lines)
    assert json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json"]).stdout)["steps"] == 6
    steps = partial(find_learning_rate, steps=40)
    monkeypatch.setattr("sopdeploy.training.lr_finder.find_learning_rate", steps)
    found = json.loads(CliRunner().invoke(app, [*command, "--find-lr", "--json"]).stdout)
    assert found["rates"][0] == pytest.approx(MIN_RATE)
    assert found["rates"] == sorted(found["rates"])
    assert max(found["rates"]) < MAX_RATE
    assert found["suggestion"] in found["rates"]
    assert "the loss falls fastest at" in CliRunner().invoke(app, [*command, "--find-lr"]).stdout
    assert not (tmp_path / "run").exists()
    assert FEW_SHOT not in text
    for option in ("--dry-run", "--find-lr"):
        few = CliRunner().invoke(app, [*command, option, "--set", "few_shot={}"])
        assert FEW_SHOT in " ".join(few.stdout.split())


def test_the_suggestion_is_the_steepest_descent_before_the_minimum() -> None:
    cases = [([3, 2.9, 2, 1.9, 5], 30), ([3, 1], 20), ([3, 2.5, 9, 1, 9], 40), ([2, 1, 9], 20)]
    for losses, rate in cases:
        assert steepest_descent([10, 20, 30, 40, 50][: len(losses)], losses) == rate
    for losses in ([], [1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(TrainingError, match="does not decrease at any learning rate"):
            steepest_descent([1.0] * len(losses), losses)
    # With 60 photos, the mean of the first two batches fell faster than all later losses.
    losses = [4.26, 4.20, 4.19, *[4.19 + 0.001 * (step % 3) for step in range(57)]]
    losses += [losses[-1] - 0.012 * step for step in range(20)] + [5.0 + step for step in range(10)]
    rates = [MIN_RATE * (MAX_RATE / MIN_RATE) ** (step / len(losses)) for step in range(len(losses))]
    assert 1e-2 < steepest_descent(rates, losses) < 2


def test_resume_takes_an_optional_value(command) -> None:
    command += ["--set", "epochs=1"]
    refused = CliRunner().invoke(app, [*command, "--resume", "--json"])
    assert refused.exit_code == 2
    assert "holds no run; start one first" in refused.stderr
    for words in (["--resume", "auto", "--json"], ["--resume=auto", "--json"], ["--json", "--resume"]):
        assert json.loads(CliRunner().invoke(app, [*command, *words]).stdout)["epochs"] == 1


def test_milestones_multiply_after_a_linear_warm_up() -> None:
    schedule = Milestones(kind="milestones", milestones=(10, 20), gamma=0.1, warmup_epochs=2)
    factors = {0: 0.0, 1: 0.5, 2: 1.0, 9.9: 1.0, 10: 0.1, 19.99: 0.1, 20: 0.01, 99: 0.01}
    assert {time: schedule.factor(time, 100) for time in factors} == pytest.approx(factors)
    assert {Milestones(kind="milestones").factor(time, 9) for time in (0, 0.5, 8.99)} == {1.0}


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (OneCycle(kind="one-cycle"), partial(lr_scheduler.OneCycleLR, max_lr=0.4, total_steps=101)),
        (Cosine(kind="cosine"), partial(lr_scheduler.CosineAnnealingLR, T_max=20)),
        (Cosine(kind="cosine", floor=0.1), partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.04)),
        (
            Polynomial(kind="polynomial", power=2.0),
            partial(lr_scheduler.PolynomialLR, total_iters=20, power=2.0),
        ),
    ],
)
def test_schedules_equal_those_of_pytorch(schedule, reference) -> None:
    epochs, steps, tolerance = 20, 1, 1e-9
    if schedule.kind == "one-cycle":  # PyTorch's peak is one step before 30 % of the run
        epochs, steps, tolerance = 5, 20, 0.4 * 0.06
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = reference(optimizer)
    for step in range(epochs * steps):
        expected = optimizer.param_groups[0]["lr"]
        assert 0.4 * schedule.factor(step / steps, epochs) == pytest.approx(expected, abs=tolerance)
        optimizer.step()
        theirs.step()
