"""The README: programs, extras and targets exist, Python code runs; `tests/docs` checks the commands."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from sopdeploy.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS: Any = get_command(app)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shown_commands() -> list[str]:
    """List all commands of the README: lines of shell blocks, and lines after `$`."""
    typed = [line for block in blocks("sh") for line in block.splitlines()]
    shown = re.findall(r"^\$ (.*)$", README, re.MULTILINE)
    return [line for line in (*typed, *shown) if line.strip() and not line.startswith("#")]


def of_program(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in shown_commands()]
    return [words[1:] for words in lines if words[0] == program]


def test_the_readme_uses_only_known_programs() -> None:
    programs = {shlex.split(line)[0] for line in shown_commands()}
    assert programs == {"sopdeploy", "make", "curl", "docker", "pip", "uv"}


def test_the_readme_names_every_command_and_no_other() -> None:
    named = set(re.findall(r"`sopdeploy ([a-z]+)", README))
    cells = " ".join(re.findall(r"^\| (`.*?) \|", README, re.MULTILINE))
    commands = {words.removeprefix("sopdeploy ").split()[0] for words in re.findall(r"`([^`]*)`", cells)}
    assert named | commands <= set(COMMANDS.commands)
    assert set(COMMANDS.commands) - {"demo"} <= named | commands, "a command that the README does not name"


@pytest.mark.parametrize("words", of_program("make"), ids=" ".join)
def test_a_make_target_exists(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in words)


def test_every_installed_extra_exists() -> None:
    installed = ",".join(re.findall(r"sopdeploy\[([\w,-]+)\]", README)).split(",")
    assert set(installed) <= set(PROJECT["optional-dependencies"])


def test_the_readme_states_the_description_and_the_supported_python_versions() -> None:
    assert PROJECT["description"].rstrip(".") in README.replace("*", "")
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "Python 3.11 to 3.13" in README


def test_the_url_in_the_curl_command_is_served() -> None:
    routes = (ROOT / "service" / "sopdeploy_service" / "api" / "v1.py").read_text(encoding="utf-8")
    addresses = {re.sub(r"https?://[^/]+", "", word) for words in of_program("curl") for word in words[2:]}
    assert addresses == {"/v1/classify"}
    assert '"/v1/classify"' in routes


def test_the_python_workflow_is_that_of_the_python_page_whose_code_is_run() -> None:
    (block,) = blocks("py")
    assert f"```python\n{block}" in (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_code_runs_and_prints_the_stated_values(
    block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(block, encoding="utf-8")
    runpy.run_path(str(script))
    expected = re.findall(r"print\(.*\)\s+# (.*)$", block, re.MULTILINE)
    assert expected
    assert capsys.readouterr().out.splitlines() == expected
