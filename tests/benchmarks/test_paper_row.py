"""The plan of the paper's row: what a machine with a GPU would get, and how long it would take."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.small_data import write_classes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paper_row.py"


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Write the two archives of a small data set."""
    for part, count in (("train", 4), ("test", 2)):
        write_classes(tmp_path / part, ["cat", "dog"], count)
        with tarfile.open(tmp_path / f"{part}.tar.xz", "w:xz") as archive:
            archive.add(tmp_path / part, part)
    return tmp_path


def test_a_dry_run_names_what_is_copied_and_the_minutes_and_writes_nothing(archives, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ("--data", archives, "--out", tmp_path / "out", "--dry-run", "--json")
    done = run(*options, "--seeds", 2, "--step-ms", 4)
    assert (done.returncode, done.stderr) == (0, "")
    planned = json.loads(done.stdout)
    for part in ("train", "test"):
        archive = archives / f"{part}.tar.xz"
        assert planned["copied"][str(archive)] == archive.stat().st_size
    assert planned["copied_bytes"] == sum(planned["copied"].values()) <= 60 * 2**20
    assert (planned["trainings"], planned["steps_per_training"]) == (4, 160 * 196)
    steps_minutes = 160 * 196 * 4e-3 / 60
    assert steps_minutes < planned["minutes_per_training"] < 1.2 * steps_minutes + 1
    assert 4 * steps_minutes < planned["minutes"] < 4 * planned["minutes_per_training"] + 2
    assert sorted(tmp_path.rglob("*")) == before


def test_more_than_the_limit_ends_the_dry_run_with_1(archives) -> None:
    with (archives / "train.tar.xz").open("ab") as file:
        file.truncate(61 * 2**20)  # a sparse file
    assert run("--data", archives, "--dry-run").returncode == 1


def test_missing_archives_are_named_in_one_line(tmp_path) -> None:
    done = run("--data", tmp_path, "--dry-run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path}: holds neither train.tar.xz nor train\n"
