"""Optimizers, AdaHessian against its formulas, moving averages, and learning rate schedules."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from sopdeploy import create_model
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.data.augment import Augmentations
from sopdeploy.data.sources import open_data
from sopdeploy.training.loop.average import ExponentialMovingAverage
from sopdeploy.training.loop.losses import training_loss
from sopdeploy.training.loop.optimizer import AdaHessian, create_optimizer, random_signs
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.schedules import Cosine, Milestones, OneCycle
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.training.runs import same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.mark.parametrize("uses_first", [False, True])
def test_the_signs_of_a_parameter_do_not_depend_on_what_else_a_process_uses(
    uses_first: bool,
) -> None:
    """A component of a gated network may receive no image in one process, and some in another."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(8))
    optimizer = AdaHessian([first, second], lr=0.1)
    used = [second, first] if uses_first else [second]
    optimizer.backward(sum((parameter**2 / 2).sum() for parameter in used), seed=3)
    assert torch.equal(optimizer.curvatures[second], random_signs(3, 1, second))


def test_hessian_vector_products_match_finite_differences() -> None:
    torch.manual_seed(0)
    config = {"base_width": 4, "prenorm": "frobenius"}
    model = create_model("dsop-resnet8", num_classes=3, **config).double().train()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    optimizer = AdaHessian(model.parameters(), lr=0.1)
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return training_loss(model(images), labels, model.loss_weights()).total

    def gradients_at(distance: float) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.add_(random_signs(7, number, parameter), alpha=distance)
        return torch.autograd.grad(loss(), parameters)

    optimizer.backward(loss(), seed=7)
    step = 1e-6
    after, before = gradients_at(step), gradients_at(-2 * step)
    for parameter, plus, minus in zip(parameters, after, before, strict=True):
        expected = (plus - minus) / (2 * step)
        scale = float(expected.abs().max()) + 1e-3
        assert float((optimizer.curvatures[parameter] - expected).abs().max()) < 1e-3 * scale


def test_a_step_on_a_quadratic_function_is_exact_and_averages_over_kernels() -> None:
    start, curvature = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 4.0, 0.5])
    weights = nn.Parameter(start.clone())
    optimizer = AdaHessian([weights], lr=0.1, eps=1e-4, weight_decay=0.5)
    optimizer.backward((0.5 * curvature * weights**2).sum(), seed=0)
    optimizer.step()
    expected = start * (1 - 0.1 * 0.5) - 0.1 * curvature * start / (curvature + 1e-4)
    torch.testing.assert_close(weights.detach(), expected)
    # The curvature of a convolution is averaged over its kernel.
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(2, 3, 3, 3))
    optimizer = AdaHessian([kernel], lr=0.1)
    optimizer.backward(
        nn.functional.conv2d(torch.randn(4, 3, 6, 6), kernel).pow(2).mean(), seed=0
    )
    optimizer.step()
    curvature = optimizer.state[kernel]["curvature"]
    assert torch.equal(curvature, curvature[:, :, :1, :1].expand_as(curvature))


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


def test_recipes_have_the_forms_of_the_optimizers_that_their_sources_have() -> None:
    assert read_recipe("imagenet-dsop-efficientnet-b0").optimizer.tensorflow
    for name, decay in (("cifar10-dsop-resnet20", 5e-4), ("imagenet-dsop-resnet18", 1e-4)):
        adahessian = read_recipe(f"{name}-adahessian").optimizer
        assert adahessian.lr * adahessian.weight_decay == pytest.approx(decay, rel=1e-4)


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
    assert Recipe.model_validate(recipe.model_dump()) == recipe


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
