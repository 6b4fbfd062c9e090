"""A teacher that is trained jointly: it learns, is resumed, is not exported, and is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sopdeploy.base import plugins
from sopdeploy.errors import ConfigError
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from tests.sopdeploy.training.distributed.cases import build_recipe, learn
from tests.sopdeploy.training.distributed.processes import run_in_processes
from tests.sopdeploy.training.runs import interrupt, one_process_run, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

TEACHER = 'teacher={model={name="dsop-resnet8", config={base_width=4, aux_widths=[4, 4, 4]}}, temperature=2}'
RECIPE = ["model.name=resnet8", "epochs=2", "precision='bf16'", "ema={decay=0.5}", TEACHER]


@pytest.fixture(scope="module")
def finished(few_digits: None, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("whole") / "run"
    train_recipe(short_recipe(*RECIPE), out)
    return out


def test_a_run_resumes_bit_by_bit(finished: Path, tmp_path: Path) -> None:
    interrupt(short_recipe(*RECIPE), tmp_path / "run", "step", 1, 3)
    train_recipe(short_recipe(*RECIPE), tmp_path / "run", resume=True)
    assert same_run(finished, tmp_path / "run")

    state: Any = read_checkpoint(finished / "last.pt").resume
    assert state["teacher"].keys() >= {"conv1.weight", "fc.weight"}


def test_a_joint_teacher_learns_and_is_not_exported(finished: Path) -> None:
    assert read_checkpoint(finished / "best.pt").model == "resnet8"

    state: Any = read_checkpoint(finished / "last.pt").resume
    first, second = (row["losses"] for row in state["position"]["history"])
    assert second["teacher_loss"] < first["teacher_loss"]
    expected = 0.5 * first["main"] + 0.5 * first["teacher"] + first["teacher_loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


def test_it_begins_in_train_mode() -> None:
    """The check that it can compute training images changes it."""
    run, _ = one_process_run(short_recipe(TEACHER))

    assert run.teacher is not None
    assert run.teacher.model.training


@pytest.mark.parametrize("network", ["alexnet", "gmsop-16-8-resnet18"])
def test_a_network_that_cannot_be_trained_jointly_is_refused(
    network: str, tmp_path: Path
) -> None:
    recipe = read_recipe("digits-plain", [f"teacher.model={{name='{network}'}}"])

    with pytest.raises(ConfigError, match="teacher"):
        train_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting", [TEACHER, "optimizer.kind=adahessian", "model={name='psdr-resnet50'}"]
)
def test_without_the_package_its_names_say_in_one_line_what_to_install(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "register_own_packages", lambda: None)
    for registry in (plugins.MODELS, plugins.OPTIMIZERS, plugins.TEACHERS):
        monkeypatch.setattr(registry, "registered", {})

    with pytest.raises(ConfigError, match=r"\./plugins/papers") as error:
        train_recipe(read_recipe("digits-plain", [setting]), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_names_that_an_error_explains_are_registered() -> None:
    plugins.register_own_packages()
    registries = (plugins.MODELS, plugins.OPTIMIZERS, plugins.TEACHERS)
    registered = {name for registry in registries for name in registry.registered}

    assert registered >= plugins.OF_PAPERS


def three_steps(_folder: Path | None = None) -> dict[str, Tensor]:
    teacher = "teacher.model={name='resnet8', config={base_width=4}}"
    return learn(build_recipe("dsop", "sgd", teacher), 3)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path: Path) -> None:
    alone = three_steps()
    first, second = run_in_processes(f"{__name__}:three_steps", tmp_path, world=2)

    for name, tensor in alone.items():
        assert float((tensor - first[name]).abs().max()) <= 1e-10, name
        assert torch.equal(first[name], second[name]), name
