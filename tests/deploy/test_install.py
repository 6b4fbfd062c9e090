"""deploy/install.py chooses between uv and pip and reports failures."""

import sys
from pathlib import Path

import install
import pytest

PYTHON = Path("env/bin/python")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; all succeed."""
    commands: list[list[str]] = []
    monkeypatch.setattr(install, "succeeds", lambda command: commands.append(command) or True)
    monkeypatch.setattr(install, "has_custom_index", lambda: False)
    monkeypatch.setattr(install, "find_uv", lambda: Path("bin/uv"))
    return commands


UV = ["bin/uv", "pip", "install", "--quiet", "--python", "env/bin/python", "--editable", ".[dev]"]
PIP = [*install.PIP, "--python", "env/bin/python", "install", "--quiet", "--editable", ".[dev]"]


@pytest.mark.parametrize(
    ("function", "value", "command", "printed"),
    [
        ("has_custom_index", False, UV, ""),
        ("has_custom_index", True, PIP, "installing with pip, because its settings name an index\n"),
        ("find_uv", None, PIP, ""),
    ],
    ids=["the default", "a custom index", "no uv"],
)
def test_uv_installs_unless_pip_has_an_index_or_uv_is_missing(
    function: str,
    value: object,
    command: list[str],
    printed: str,
    ran: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(install, function, lambda: value)
    install.install(PYTHON, "--editable", ".[dev]")
    assert ran == [command]
    assert capsys.readouterr().out == printed


def test_pip_is_the_fallback_and_a_double_failure_is_one_line(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "succeeds", lambda command: ran.append(command) or False)
    with pytest.raises(SystemExit, match="cannot install x: see the errors above"):
        install.install(PYTHON, "x")
    assert [command[0] for command in ran] == ["bin/uv", sys.executable]
    assert capsys.readouterr().out == "uv failed; trying pip\n"
