"""Entry points: a plug-in that cannot be used is one line, and the project's own parts are all registered."""

import logging
import tomllib
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy import plugins
from sopdeploy.cli.app import app, list_commands
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Entry
from sopdeploy.models.registry import entry
from sopdeploy.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]
Install = Callable[..., None]
MODULES = {
    "raises": "raise RuntimeError('first line\\nsecond line')",
    "exits": "raise SystemExit(3)",
    "empty": "",
    "wrong": "NETWORK = 1",
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(lines, name)` writes the metadata of a package with these entry points, and `MODULES`."""
    monkeypatch.setenv(plugins.VARIABLE, "on")
    monkeypatch.syspath_prepend(tmp_path)
    for module, text in MODULES.items():
        (tmp_path / f"{module}_plugin.py").write_text(text, encoding="utf-8")

    def write(lines: str, name: str = "acme") -> None:
        folder = tmp_path / f"{name}-2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n", "utf-8")
        (folder / "entry_points.txt").write_text(lines, encoding="utf-8")
        plugins._other_points.cache_clear()

    yield write
    plugins._other_points.cache_clear()
    plugins._warn.cache_clear()


PROBLEMS = {  # entry point of a network: what the error says
    "broken = missing_plugin:NETWORK": "ModuleNotFoundError: No module named 'missing_plugin'",
    "broken = raises_plugin:NETWORK": "RuntimeError: first line",
    "broken = exits_plugin:NETWORK": "SystemExit: 3",
    "broken = empty_plugin:NETWORK": "AttributeError: module 'empty_plugin' has no attribute 'NETWORK'",
    "broken = wrong_plugin:NETWORK": "is not sopdeploy.models.base.Entry; correct or uninstall it",
    "two words = wrong_plugin:NETWORK": "has a name with other characters than letters",
}


@pytest.mark.parametrize("line", PROBLEMS)
def test_a_plug_in_that_cannot_be_used_is_one_line(
    line: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(f"[sopdeploy.models]\n{line}\n")
    name = line.partition(" =")[0]
    with pytest.raises(ConfigError, match=f"plug-in {name} of acme 2.0 ") as caught:
        entry(name)
    assert PROBLEMS[line] in str(caught.value)
    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(app, ["models"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert [record.getMessage() for record in caplog.records] == [str(caught.value)]
    assert "\n" not in str(caught.value)
    assert "resnet18" in result.stdout


def test_a_name_that_two_packages_register_is_an_error_that_names_both(install: Install) -> None:
    for package in ("acme", "other"):
        install("[sopdeploy.models]\nsame = wrong_plugin:NETWORK\n", package)
    with pytest.raises(ConfigError, match=r"same: acme 2.0 and other 2.0 register it in sopdeploy.models"):
        entry("same")


def test_a_plug_in_does_not_replace_what_the_project_has(install: Install) -> None:
    install(
        "[sopdeploy.models]\nresnet18 = raises_plugin:X\n[sopdeploy.poolings]\nisqrt = raises_plugin:X\n"
        "[sopdeploy.data]\ndigits = raises_plugin:X\n"
    )
    assert isinstance(entry("resnet18"), Entry)
    recipe = read_recipe("digits-plain", ["model.config.pooling=isqrt"])
    assert (recipe.data.kind, recipe.model.config["pooling"]) == ("digits", "isqrt")


@pytest.mark.part("sopdeploy_service.runtime.tensorrt")
def test_a_plug_in_does_not_replace_a_part(install: Install) -> None:
    install("[sopdeploy.runtimes]\ntensorrt = raises_plugin:X\n")
    assert plugins.find("sopdeploy.runtimes", "tensorrt").__module__ == "sopdeploy_service.runtime.tensorrt"


GROUPS = {"model.config.pooling": "sopdeploy.poolings", "data.kind": "sopdeploy.data"}


@pytest.mark.parametrize("key", GROUPS)
def test_a_recipe_with_a_broken_plug_in_is_an_error_in_one_line(key: str, install: Install) -> None:
    install(f"[{GROUPS[key]}]\nbroken = raises_plugin:X\n")
    with pytest.raises(ConfigError, match=r"plug-in broken of acme 2\.0 cannot be imported") as caught:
        read_recipe("digits-plain", [f"{key}=broken"])
    assert "\n" not in str(caught.value)


def test_the_switch_has_two_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "none")
    with pytest.raises(ConfigError, match="SOPDEPLOY_PLUGINS=none: write on or off"):
        plugins.installed_plugins()


def test_the_projects_own_parts_are_those_of_pyproject_and_of_the_metadata() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    installed: dict[str, dict[str, str]] = {group: {} for group in declared}
    for point in distribution("sopdeploy").entry_points:
        if point.group in declared:
            installed[point.group][point.name] = point.value
    assert {group: dict(plugins.parts(group)) for group in declared} == declared == installed


def test_every_part_can_be_imported_and_every_command_has_a_summary() -> None:
    for group, lines in plugins._installed_parts().items():
        assert all(map(plugins.load_part, lines.values())), group
    assert [name for name, (_, _, summary) in list_commands().items() if len(summary) < 10] == []
