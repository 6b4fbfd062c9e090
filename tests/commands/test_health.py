"""`sopdeploy health` asks the server that `serve` runs with the same settings."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sopdeploy_commands.health  # noqa: F401 (the module, which its function hides)
from sopdeploy_commands.app import app

health_command = sys.modules["sopdeploy_commands.health"]


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"PORT": "8123"}, "http://127.0.0.1:8123"),
        ({"HOST": "0.0.0.0", "PORT": "8123"}, "http://127.0.0.1:8123"),  # noqa: S104
        ({"HOST": "::"}, "http://[::1]:8000"),
        ({"HOST": "10.1.2.3"}, "http://10.1.2.3:8000"),
        ({"CONFIG": 'host = "::1"\nport = 9000\n'}, "http://[::1]:9000"),
    ],
)
def test_health_asks_the_server_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str], asked: str
) -> None:
    for name, value in settings.items():
        if name == "CONFIG":
            (tmp_path / "settings.toml").write_text(value)
        given = str(tmp_path / "settings.toml") if name == "CONFIG" else value
        monkeypatch.setenv(f"SOPDEPLOY_{name}", given)
    requests: list[str] = []

    def ask(url: str, *, is_this_machine: bool) -> None:
        assert is_this_machine
        requests.append(url)

    monkeypatch.setattr(health_command, "_find_problem", ask)

    assert CliRunner().invoke(app, ["health"]).exit_code == 0
    assert requests == [asked]
