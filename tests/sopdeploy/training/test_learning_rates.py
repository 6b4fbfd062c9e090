"""Learning rate schedules compared with PyTorch's, `--dry-run` and the forms of `--resume`."""

import json
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.cli.training.train import OTHER_PROCEDURE
from sopdeploy.data.sources import open_data
from sopdeploy.models.describe import describe
from sopdeploy.training.dry_run import dry_run
from sopdeploy.training.loop import epoch_data
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.schedule import Cosine, Milestones, OneCycle
from tests.sopdeploy.training.runs import SHORT, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture
def command(tmp_path) -> list[str]:
    settings = [word for override in SHORT for word in ("--set", override)]
    return ["train", "--recipe", "digits-dsop", "--out", str(tmp_path / "run"), *settings]


def test_a_dry_run_resolves_the_recipe() -> None:
    recipe = short_recipe("ema={}", "accumulate=2")
    dry = dry_run(recipe)
    assert dry.recipe["model"]["config"] == recipe.model.full_config()
    assert dry.recipe["ema"]["decay"] == 0.999
    assert (dry.train_count, dry.held_out_count, dry.num_classes, dry.num_steps) == (205, 52, 10, 6)
    assert dry.shipped.parameters < dry.training.parameters


def test_training_crops_can_have_another_size_than_evaluation() -> None:
    recipe = short_recipe('augment={kind="random-side", sides=[12, 16], crop=12}')
    dataset, _ = epoch_data(recipe, open_data(recipe.data).train, 0)
    assert dataset[0][0].shape == (12, 12, 3)
    dry = dry_run(recipe)
    model = recipe.model
    counts = {side: describe(model.name, image_size=side, num_classes=10, **model.config) for side in (8, 12)}
    assert (dry.training, dry.shipped) == (counts[12].training, counts[8].shipped)
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_a_dry_run_prints_and_writes_nothing(tmp_path, command) -> None:
    result = CliRunner().invoke(app, [*command, "--dry-run"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert all(line in text for line in ("optimizer.kind = sgd", "205 training images", "one step on cpu"))
    assert OTHER_PROCEDURE.format("few_shot") not in text
    assert json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json"]).stdout)["num_steps"] == 6
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_another_procedure_names_it(command) -> None:
    few = CliRunner().invoke(app, [*command, "--dry-run", "--set", "procedure.kind=few_shot"])
    assert OTHER_PROCEDURE.format("few_shot") in " ".join(few.stdout.split())


def test_resume_takes_an_optional_value(command) -> None:
    command += ["--set", "epochs=1"]
    refused = CliRunner().invoke(app, [*command, "--resume", "--json"])
    assert refused.exit_code == 2
    assert "holds no run; start one first" in refused.stderr
    for words in (["--resume", "auto", "--json"], ["--resume=auto", "--json"], ["--json", "--resume"]):
        assert json.loads(CliRunner().invoke(app, [*command, *words]).stdout)["num_epochs"] == 1


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
