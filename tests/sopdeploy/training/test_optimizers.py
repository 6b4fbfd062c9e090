"""The optimizers of a recipe; AdaHessian against finite differences and its own formulas."""

import pytest
import torch
from torch import nn

from sopdeploy import create_model
from sopdeploy.errors import ConfigError
from sopdeploy.training.loop import train
from sopdeploy.training.losses import training_loss
from sopdeploy.training.optimizers import AdaHessian, signs
from tests.sopdeploy.training.runs import short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

KINDS = {
    "sgd": (torch.optim.SGD, "lr=0.05"),
    "adamw": (torch.optim.AdamW, "lr=0.01"),
    "radam": (torch.optim.RAdam, "lr=0.01"),
    "rmsprop": (torch.optim.RMSprop, "lr=0.003"),
    "adahessian": (AdaHessian, "lr=0.05"),
}
NETWORKS = {
    "dsop": ("dsop-resnet8", {"base_width": 4}),
    "dsop-frobenius": ("dsop-resnet8", {"base_width": 4, "prenorm": "frobenius"}),
    "isqrt": ("isqrt-resnet8", {"base_width": 4, "pooling": {"kind": "isqrt", "width": 8}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_its_optimizer_and_brings_the_loss_down(tmp_path, kind) -> None:
    made, rest = KINDS[kind]
    recipe = short_recipe(f"optimizer={{kind='{kind}', {rest}}}", "model.config.aux_dropout=0.0")
    assert type(recipe.optimizer.make([nn.Parameter(torch.zeros(1))])) is made
    result = train(recipe, tmp_path / "run")
    losses = [float(line.split(",")[2]) for line in result.history.read_text().splitlines()[1:]]
    assert losses[-1] < losses[0]


def test_an_optimizer_without_kind_is_sgd_as_in_the_first_recipes() -> None:
    recipe = short_recipe("optimizer={lr=0.2, momentum=0.5}")
    assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.optimizer.momentum) == ("sgd", 0.2, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer={kind='adam', lr=1}", "optimizer.kind: 'adam' is none of 'sgd', 'adamw', 'radam'"),
        ("optimizer={kind='adamw', lr=1, momentum=0.9}", "optimizer.momentum: unknown key"),
        ("optimizer={kind='adamw'}", "optimizer.lr: missing"),
        ("optimizer=3", "optimizer"),
    ],
)
def test_a_wrong_optimizer_is_named(override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        short_recipe(override)


@pytest.mark.parametrize("switch", ["compile=true", "precision='fp16'"])
def test_adahessian_refuses_what_cannot_be_differentiated_twice(switch) -> None:
    with pytest.raises(ConfigError, match="adahessian: needs compile=false and precision fp32 or bf16"):
        short_recipe("optimizer={kind='adahessian', lr=0.1}", switch)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hessian_vector_product_is_that_of_finite_differences(name) -> None:
    torch.manual_seed(0)
    network, config = NETWORKS[name]
    model = create_model(network, num_classes=3, **config).double().train()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    optimizer = AdaHessian(model.parameters(), lr=0.1)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return training_loss(model(images), labels, model.loss_weights()).total

    def gradients_at(distance: float) -> list[torch.Tensor]:
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.add_(signs(7, number, parameter), alpha=distance)
        found = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.sub_(signs(7, number, parameter), alpha=distance)
        return list(found)

    parameters = optimizer.parameters()
    optimizer.differentiate(loss(), seed=7)
    step = 1e-6
    there, back = gradients_at(step), gradients_at(-step)
    for parameter, plus, minus in zip(parameters, there, back, strict=True):
        expected = (plus - minus) / (2 * step)
        scale = float(expected.abs().max()) + 1e-3
        assert float((optimizer.curvatures[parameter] - expected).abs().max()) < 1e-3 * scale


def test_the_pieces_of_a_batch_add_up_to_the_whole() -> None:
    weights = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    inputs = torch.randn(8, 5, dtype=torch.float64)
    whole, pieces = AdaHessian([weights], lr=0.1), AdaHessian([weights], lr=0.1)
    whole.differentiate((inputs @ weights).pow(4).mean(), seed=3)
    gradient = weights.grad
    assert gradient is not None
    weights.grad = None
    for part in inputs.split([3, 5]):
        pieces.differentiate((part @ weights).pow(4).mean() * len(part) / 8, seed=3)
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, gradient)
    torch.testing.assert_close(pieces.curvatures[weights], whole.curvatures[weights])


def test_on_a_bowl_the_first_step_is_the_papers() -> None:
    start, curvature = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 4.0, 0.5])
    weights = nn.Parameter(start.clone())
    optimizer = AdaHessian([weights], lr=0.1, eps=1e-4, weight_decay=0.5)
    optimizer.differentiate((0.5 * curvature * weights**2).sum(), seed=0)
    optimizer.step()
    expected = start * (1 - 0.1 * 0.5) - 0.1 * curvature * start / (curvature + 1e-4)
    torch.testing.assert_close(weights.detach(), expected)


def test_the_curvature_of_a_convolution_is_averaged_over_its_kernel() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(2, 3, 3, 3))
    optimizer = AdaHessian([kernel], lr=0.1)
    optimizer.differentiate(nn.functional.conv2d(torch.randn(4, 3, 6, 6), kernel).pow(2).mean(), seed=0)
    optimizer.step()
    curvature = optimizer.state[kernel]["curvature"]
    assert torch.equal(curvature, curvature[:, :, :1, :1].expand_as(curvature))


def test_a_parameter_without_part_in_the_loss_or_without_curvature_is_no_error() -> None:
    used, linear, idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = AdaHessian([used, linear, idle], lr=0.1)
    optimizer.differentiate((used**2).sum() + linear.sum(), seed=0)
    optimizer.step()
    assert torch.equal(idle, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))
    assert not torch.equal(linear, torch.ones(2))
