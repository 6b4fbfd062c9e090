"""The README: commands parse (`tests/docs/test_typed.py` types them), Python runs, what it names exists."""

import re
import shlex
import subprocess
import sys
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
    """Return every command line of the README: of its shell blocks, and after a `$` elsewhere."""
    typed = [line for block in blocks("sh") for line in block.splitlines()]
    shown = re.findall(r"^\$ (.*)$", README, re.MULTILINE)
    return [line for line in (*typed, *shown) if line.strip() and not line.startswith("#")]


def of_program(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in shown_commands()]
    return [words[1:] for words in lines if words[0] == program]


def test_the_readme_shows_every_program_that_these_tests_know() -> None:
    programs = {shlex.split(line)[0] for line in shown_commands()}
    assert programs == {"sopdeploy", "make", "pip", "curl"}


@pytest.mark.parametrize("words", of_program("sopdeploy"), ids=" ".join)
def test_a_command_names_a_verb_and_options_that_exist(words: list[str]) -> None:
    verb, *arguments = words
    context = COMMANDS.commands[verb].make_context(verb, list(arguments))
    assert context.args == []


def test_the_verbs_that_the_text_names_exist() -> None:
    named = set(re.findall(r"`sopdeploy ([a-z]+)", README))
    table = {
        word
        for row in re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
        for word in re.findall(r"`([^`]*)`", row)
    }
    verbs = {words.removeprefix("sopdeploy ").split()[0] for words in table}
    assert named | verbs <= set(COMMANDS.commands)
    assert set(COMMANDS.commands) - {"demo"} <= named | verbs, "a verb that the README does not name"


@pytest.mark.parametrize("words", of_program("make"), ids=" ".join)
def test_a_make_target_exists(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in words)


def test_every_extra_that_is_installed_exists() -> None:
    installed = [
        extra for block in re.findall(r"sopdeploy\[([\w,-]+)\]", README) for extra in block.split(",")
    ]
    assert installed
    assert set(installed) <= set(PROJECT["optional-dependencies"])


def test_the_versions_of_python_are_those_of_the_package() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "Python 3.11 to 3.13" in README


def test_the_address_that_curl_asks_is_served() -> None:
    routes = (ROOT / "service" / "sopdeploy_service" / "routes.py").read_text(encoding="utf-8")
    addresses = {re.sub(r"https?://[^/]+", "", word) for words in of_program("curl") for word in words[2:]}
    assert addresses == {"/v1/classify"}
    assert '"/v1/classify"' in routes


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_runs_and_prints_what_it_says(block: str, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    expected = re.findall(r"print\(.*\)\s+# (.*)$", block, re.MULTILINE)
    assert expected
    assert found.stdout.splitlines() == expected


def test_the_line_under_the_name_is_the_one_of_the_package() -> None:
    assert PROJECT["description"].rstrip(".") in README.replace("*", "")
