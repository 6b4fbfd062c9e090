"""Targets of the Makefile do what they promise, with stand-ins for the programs that they call."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.test_lock import OUTER, ROOT
from tests.deploy.test_workflow_steps import git

COMMITTED = {"Makefile", "pyproject.toml", ".gitignore", "deploy/lock/dev.txt"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A commit of the Makefile, with environments whose programs record their arguments."""
    (tmp_path / "deploy" / "lock").mkdir(parents=True)
    for name in COMMITTED:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message=x")
    for program in (".venv/bin/uv", ".venv/bin/pytest", ".venv-gpu/bin/python"):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\necho "$*" >> calls\n')
        path.chmod(0o755)
        (path.parents[1] / ".installed").touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> list[str]:
    """Run make in *folder*; return the recorded calls."""
    outer = {name: value for name, value in os.environ.items() if not OUTER.match(name)}
    outer = {
        name: value
        for name, value in outer.items()
        if name not in {"VERSION", "WHEELS", "OPTIONS"}
    }
    command = ["make", "--silent", *arguments]
    subprocess.run(command, cwd=folder, env=outer, capture_output=True, text=True, check=True)
    calls = folder / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_the_tests_that_quick_runs_exist(checkout: Path) -> None:
    (call,) = make(checkout, "unit")
    paths = [word for word in call.split() if word.startswith("tests/")]
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_a_distribution_has_the_files_of_the_commit_and_no_others(checkout: Path) -> None:
    (checkout / "release.key").write_text("secret")
    (checkout / "README.md").write_text("not committed")
    (call,) = make(checkout, "dist")
    assert call.split()[-3:-1] == ["--out-dir", "dist"]
    built = checkout / call.split()[-1]
    found = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert found == COMMITTED


@pytest.mark.parametrize(
    ("written", "missing"),
    [((), True), (("resnet50-fp16",), True), (("images", "load.py"), False)],
)
def test_the_check_of_a_gpu_completes_bundles_whose_export_was_cut_off(
    written: tuple[str, ...], missing: bool, checkout: Path
) -> None:
    for name in written:
        (checkout / "carry" / name).parent.mkdir(exist_ok=True)
        (checkout / "carry" / name).touch()
    first, *_ = make(checkout, "gpu-check", "CARRY=carry")
    assert (first == "benchmarks/gpu_bundles.py carry") == missing


def test_clean_removes_every_environment_that_a_target_creates(checkout: Path) -> None:
    for name in ("newest", "lowest", "3.12"):  # the last one is of `make elsewhere`
        (checkout / f".venv-{name}").mkdir()
    make(checkout, "clean")
    assert list(checkout.glob(".venv*")) == []


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("release", "OPTIONS=--dry-run"), "release: add VERSION"),
        (("gpu-wheels",), "gpu-wheels: add WHEELS"),
    ],
)
def test_a_target_names_the_variable_that_it_needs(
    arguments: tuple[str, ...], missing: str, checkout: Path
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make(checkout, *arguments)
    assert missing in failed.value.stderr
    assert not (checkout / "calls").exists()
