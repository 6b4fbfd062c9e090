"""AdaHessian against its formulas, resumed runs, two processes, and settings that it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sopdeploy import create_model
from sopdeploy.errors import ConfigError
from sopdeploy.training.loop.losses import training_loss
from sopdeploy.training.loop.optimizer import create_optimizer
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from sopdeploy_papers.adahessian import AdaHessian, AdaHessianConfig, random_signs
from tests.sopdeploy.training.distributed.cases import build_recipe, learn
from tests.sopdeploy.training.distributed.processes import run_in_processes
from tests.sopdeploy.training.runs import interrupt, same_run, short_recipe

ADAHESSIAN = "optimizer={kind='adahessian', lr=0.01}"
PLAIN = ["model.name=resnet8", "model.config={base_width=4}", "epochs=2"]


def test_a_step_lowers_the_loss_and_the_recipe_is_read_back() -> None:
    recipe = short_recipe(*PLAIN, ADAHESSIAN)
    assert recipe.optimizer == AdaHessianConfig(kind="adahessian", lr=0.01)
    assert type(recipe).model_validate(recipe.model_dump()) == recipe

    weight = nn.Parameter(torch.ones(3))
    optimizer = create_optimizer(recipe.optimizer, [weight])
    assert isinstance(optimizer, AdaHessian)
    optimizer.backward((weight**2).sum(), seed=0)
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("setting", ["precision=fp16", "compile=true", "grad_accum_steps=2"])
def test_settings_without_second_derivatives_of_a_whole_step_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        short_recipe(*PLAIN, ADAHESSIAN, setting)


@pytest.mark.parametrize("uses_first", [False, True])
def test_the_signs_of_a_parameter_do_not_depend_on_the_process(uses_first: bool) -> None:
    """A component of a gated network may receive no image in one process, and some in another."""
    first = nn.Parameter(torch.ones(3))
    second = nn.Parameter(torch.ones(8))
    optimizer = AdaHessian([first, second], lr=0.1)
    used = [second, first] if uses_first else [second]
    optimizer.backward(sum((parameter**2 / 2).sum() for parameter in used), seed=3)

    assert torch.equal(optimizer.curvatures[second], random_signs(3, 1, second))


def test_hessian_vector_products_match_finite_differences() -> None:
    torch.manual_seed(0)
    config = {"base_width": 4, "prenorm": "frobenius"}
    model = create_model("dsop-resnet8", num_classes=3, **config).double().train()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    labels = torch.arange(6) % 3
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
    after = gradients_at(step)
    before = gradients_at(-2 * step)
    for parameter, plus, minus in zip(parameters, after, before, strict=True):
        expected = (plus - minus) / (2 * step)
        scale = float(expected.abs().max()) + 1e-3
        assert float((optimizer.curvatures[parameter] - expected).abs().max()) < 1e-3 * scale


def test_a_step_on_a_quadratic_function_is_exact_and_averages_over_kernels() -> None:
    start = torch.tensor([1.0, -2.0, 3.0])
    curvature = torch.tensor([1.0, 4.0, 0.5])
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


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("step", [(1, 2), (2, 3)])
def test_a_run_of_two_phases_resumes_to_the_same_bits(
    step: tuple[int, int], tmp_path: Path
) -> None:
    plain = train_recipe(short_recipe(*PLAIN), tmp_path / "plain").best
    phases = [f"start.weights={plain}", "start.classifier_epochs=2", "start.classifier_lr=0.02"]
    recipe = short_recipe(*PLAIN[:2], *phases, "start.head_factor=3", "epochs=4", ADAHESSIAN)
    train_recipe(recipe, tmp_path / "whole")
    interrupt(recipe, tmp_path / "stopped", "step", *step)
    train_recipe(recipe, tmp_path / "stopped", resume=True)

    assert same_run(tmp_path / "whole", tmp_path / "stopped")


def two_steps(_folder: Path | None = None) -> dict[str, Tensor]:
    recipe = build_recipe("dsop", "sgd", "optimizer={kind='adahessian', lr=1e-2}")
    return learn(recipe, 2)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path: Path) -> None:
    alone = two_steps()
    first, second = run_in_processes(f"{__name__}:two_steps", tmp_path, world=2)

    for name, tensor in alone.items():
        assert float((tensor - first[name]).abs().max()) <= 1e-10, name
        assert torch.equal(first[name], second[name]), name


def test_weight_decay_of_recipes_is_the_source_s_divided_by_the_rate() -> None:
    for name, decay in (("cifar10-dsop-resnet20", 5e-4), ("imagenet-dsop-resnet18", 1e-4)):
        adahessian = read_recipe(f"{name}-adahessian").optimizer
        assert adahessian.lr * adahessian.weight_decay == pytest.approx(decay, rel=1e-4)


def test_the_recipe_of_efficientnet_has_the_optimizer_of_its_code() -> None:
    assert read_recipe("imagenet-dsop-efficientnet-b0").optimizer.tensorflow
