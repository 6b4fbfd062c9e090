"""The optimizers of recipes; AdaHessian against finite differences and its formulas."""

import pytest
import torch
from torch import nn

from sopdeploy import create_model
from sopdeploy.errors import ConfigError
from sopdeploy.training.loop import train
from sopdeploy.training.losses import training_loss
from sopdeploy.training.optimizers import AdaHessian, _random_signs
from tests.sopdeploy.training.runs import short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.mark.parametrize(
    ("kind", "optimizer_class", "lr", "group"),
    [
        ("sgd", torch.optim.SGD, 0.05, {"momentum": 0.9, "weight_decay": 0.0}),
        ("adamw", torch.optim.AdamW, 0.01, {"betas": (0.9, 0.999), "weight_decay": 0.01}),
        ("radam", torch.optim.RAdam, 0.01, {"decoupled_weight_decay": True, "weight_decay": 0.0}),
        ("rmsprop", torch.optim.RMSprop, 0.003, {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9}),
        ("adahessian", AdaHessian, 0.05, {"eps": 1e-4, "power": 1.0}),
    ],
)
def test_each_optimizer_reduces_the_loss(tmp_path, kind, optimizer_class, lr, group) -> None:
    recipe = short_recipe(f"optimizer={{kind='{kind}', lr={lr}}}", "model.config.aux_dropout=0.0")
    optimizer = recipe.optimizer.create([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is optimizer_class
    assert {"lr": lr, **group}.items() <= optimizer.param_groups[0].items()
    result = train(recipe, tmp_path / "run")
    losses = [float(line.split(",")[2]) for line in result.history.read_text().splitlines()[1:]]
    assert losses[-1] < losses[0]


def test_an_optimizer_without_kind_is_sgd() -> None:
    recipe = short_recipe("optimizer={lr=0.2, momentum=0.5}")
    assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.optimizer.momentum) == ("sgd", 0.2, 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer={kind='adam', lr=1}"], "optimizer.kind: 'adam' is none of 'sgd', 'adamw', 'radam'"),
        (["optimizer={kind='adamw', lr=1, momentum=0.9}"], "optimizer.momentum: unknown key"),
        (["optimizer={kind='adamw'}"], "optimizer.lr: missing"),
        (["optimizer=3"], "optimizer"),
        (["optimizer={kind='adahessian', lr=0.1}", "compile=true"], "needs compile=false and precision"),
        (["optimizer={kind='adahessian', lr=0.1}", "precision='fp16'"], "adahessian: needs compile=false"),
    ],
)
def test_an_invalid_optimizer_is_named(overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        short_recipe(*overrides)


@pytest.mark.parametrize(
    ("network", "config"),
    [
        ("dsop-resnet8", {"base_width": 4}),
        ("dsop-resnet8", {"base_width": 4, "prenorm": "frobenius"}),
        ("isqrt-resnet8", {"base_width": 4, "pooling": {"kind": "isqrt", "width": 8}}),
    ],
)
def test_hessian_vector_products_match_finite_differences(network, config) -> None:
    torch.manual_seed(0)
    model = create_model(network, num_classes=3, **config).double().train()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    optimizer = AdaHessian(model.parameters(), lr=0.1)
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return training_loss(model(images), labels, model.loss_weights()).total

    def shift(distance: float) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.add_(_random_signs(7, number, parameter), alpha=distance)

    def gradients_at(distance: float) -> tuple[torch.Tensor, ...]:
        shift(distance)
        found = torch.autograd.grad(loss(), parameters)
        shift(-distance)
        return found

    optimizer.backward(loss(), seed=7)
    step = 1e-6
    after, before = gradients_at(step), gradients_at(-step)
    for parameter, plus, minus in zip(parameters, after, before, strict=True):
        expected = (plus - minus) / (2 * step)
        scale = float(expected.abs().max()) + 1e-3
        assert float((optimizer.curvatures[parameter] - expected).abs().max()) < 1e-3 * scale


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    weights = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    inputs = torch.randn(8, 5, dtype=torch.float64)
    whole, split = AdaHessian([weights], lr=0.1), AdaHessian([weights], lr=0.1)
    whole.backward((inputs @ weights).pow(4).mean(), seed=3)
    gradient = weights.grad
    assert gradient is not None
    weights.grad = None
    for part in inputs.split([3, 5]):
        split.backward((part @ weights).pow(4).mean() * len(part) / 8, seed=3)
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, gradient)
    torch.testing.assert_close(split.curvatures[weights], whole.curvatures[weights])


def test_the_first_step_on_a_quadratic_function_is_exact() -> None:
    start, curvature = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 4.0, 0.5])
    weights = nn.Parameter(start.clone())
    optimizer = AdaHessian([weights], lr=0.1, eps=1e-4, weight_decay=0.5)
    optimizer.backward((0.5 * curvature * weights**2).sum(), seed=0)
    optimizer.step()
    expected = start * (1 - 0.1 * 0.5) - 0.1 * curvature * start / (curvature + 1e-4)
    torch.testing.assert_close(weights.detach(), expected)


def test_the_curvature_of_a_convolution_is_averaged_over_its_kernel() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(2, 3, 3, 3))
    optimizer = AdaHessian([kernel], lr=0.1)
    optimizer.backward(nn.functional.conv2d(torch.randn(4, 3, 6, 6), kernel).pow(2).mean(), seed=0)
    optimizer.step()
    curvature = optimizer.state[kernel]["curvature"]
    assert torch.equal(curvature, curvature[:, :, :1, :1].expand_as(curvature))


def test_parameters_without_gradient_or_curvature_are_allowed() -> None:
    used, linear, idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = AdaHessian([used, linear, idle], lr=0.1)
    optimizer.backward((used**2).sum() + linear.sum(), seed=0)
    optimizer.step()
    assert torch.equal(idle, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))
    assert not torch.equal(linear, torch.ones(2))
