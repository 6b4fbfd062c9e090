"""The README's first command without photographs."""

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from typer.testing import CliRunner

from sopdeploy.cli import demo
from sopdeploy.cli.app import app
from tests import quick_torch
from tests.export.once import proving_once


def run_here(command: list[str], *, check: bool) -> CompletedProcess[str]:
    """Run a command of `sopdeploy` in this process, as a process of its own would import torch again."""
    assert (command[:3], check) == ([sys.executable, "-m", "sopdeploy"], False)
    with quick_torch.one_thread(), proving_once():
        done = CliRunner().invoke(app, command[3:])
    assert done.exit_code == 0, done.output
    return CompletedProcess(command, done.exit_code)


def test_the_demo_trains_exports_verifies_serves_and_classifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.subprocess, "run", run_here)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "held-out digits classified correctly over HTTP" in done.stdout
    assert "Next: use your own photos" in done.stdout
