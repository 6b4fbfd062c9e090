"""Optimizers, moving averages, and learning rate schedules."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from sopdeploy.data.augment import Augmentations
from sopdeploy.data.sources import open_data
from sopdeploy.training.loop.average import ExponentialMovingAverage
from sopdeploy.training.loop.optimizer import create_optimizer
from sopdeploy.training.settings.recipe import LoopRecipe
from sopdeploy.training.settings.schedules import Cosine, Milestones, OneCycle
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from tests.sopdeploy.training.runs import same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ("alpha=0", 0.5),  # 1e-3 / (1e-3 + 1e-3)
        ("alpha=0, tensorflow=true", 1e-3 / (1e-6 + 1e-3) ** 0.5),
        ("alpha=0.9, tensorflow=true", 1e-3 / (0.9 + 1e-7 + 1e-3) ** 0.5),
    ],
)
def test_rmsprop_adds_eps_after_the_root_and_as_tensorflow_inside_of_it(settings, step) -> None:
    config = short_recipe(
        f"optimizer={{kind='rmsprop', lr=1.0, eps=1e-3, {settings}}}"
    ).optimizer
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.full_like(weight, 1e-3)
    create_optimizer(config, [weight]).step()

    assert -float(weight.detach()) == pytest.approx(step)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def change(model: nn.Module) -> None:
    """Change all weights and buffers, including the integer one."""
    model.train()
    model(torch.randn(5, 3) + 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def test_floating_point_tensors_are_averaged_and_integers_copied(model) -> None:
    before = copy.deepcopy(model.state_dict())
    ema = ExponentialMovingAverage(0.9, model)
    ema.count = 99
    change(model)
    ema.update(model)
    after = model.state_dict()

    for name, mean in ema.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert int(mean) == int(after[name]) == 1
        else:
            torch.testing.assert_close(mean, 0.9 * before[name] + 0.1 * after[name])
    assert ema.count == 100
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


@pytest.mark.parametrize(("updates", "decay"), [(1, 2 / 11), (9, 10 / 19), (1000, 0.99)])
def test_the_decay_grows_with_the_number_of_updates(updates, decay) -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = ExponentialMovingAverage(0.99, model)
    ema.count = updates - 1
    with torch.no_grad():
        ema.model.weight.zero_()
        model.weight.fill_(1.0)
    ema.update(model)

    assert float(ema.model.weight) == pytest.approx(1 - decay)


def test_a_run_evaluates_and_exports_the_average(tmp_path) -> None:
    result = train_recipe(short_recipe("ema={decay=0.8}"), tmp_path / "run")
    best, last = read_checkpoint(result.best), read_checkpoint(result.last)
    assert last.resume is not None
    assert best.training["weights"] == last.training["weights"] == "average"

    raw, average = last.resume["weights"], last.resume["average"]["weights"]
    assert not same_bits(raw, average)
    assert same_bits(last.weights, average)
    assert last.training["metrics"] == last.resume["position"]["history"][-1]["metrics"]


def test_training_crops_can_have_another_size_than_evaluation() -> None:
    recipe = short_recipe('augment={kind="random-side", sides=[12, 16], crop=12}')
    dataset = recipe.part(Augmentations).training_images(
        open_data(recipe.data).train, recipe.preprocess, recipe.seed, 0
    )

    assert dataset.pixels([0]).shape == (1, 12, 12, 3)
    assert LoopRecipe.model_validate(recipe.model_dump()) == recipe


def test_milestones_multiply_after_a_linear_warm_up() -> None:
    schedule = Milestones(kind="milestones", milestones=(10, 20), gamma=0.1, warmup_epochs=2)
    factors = {0: 0.0, 1: 0.5, 2: 1.0, 9.9: 1.0, 10: 0.1, 19.99: 0.1, 20: 0.01, 99: 0.01}
    assert {time: schedule.factor(time, 100) for time in factors} == pytest.approx(factors)
    assert {Milestones(kind="milestones").factor(time, 9) for time in (0, 0.5, 8.99)} == {1.0}


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (
            OneCycle(kind="one-cycle"),
            partial(lr_scheduler.OneCycleLR, max_lr=0.4, total_steps=101),
        ),
        (Cosine(kind="cosine"), partial(lr_scheduler.CosineAnnealingLR, T_max=20)),
        (
            Cosine(kind="cosine", floor=0.1),
            partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.04),
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
        assert 0.4 * schedule.factor(step / steps, epochs) == pytest.approx(
            expected, abs=tolerance
        )
        optimizer.step()
        theirs.step()
