"""`make dist` packs a commit, with a stand-in for the program that builds it."""

import os
import re
import subprocess
from pathlib import Path

from tests.support.rooms import ROOT

COMMITTED = {
    "Makefile",
    "pyproject.toml",
    "plugins/papers/pyproject.toml",
    ".gitignore",
    "deploy/lock/dev.txt",
}
# Variables of a `make` around the tests.
OUTER = re.compile(r"UV_|PIP_|MAKE|MFLAGS|NEWEST|LOWEST|VERSION$|WHEELS$|OPTIONS$")


def git(folder: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    subprocess.run(command, cwd=folder, check=True)


def test_a_distribution_has_the_files_of_the_commit_and_no_others(tmp_path: Path) -> None:
    for name in COMMITTED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message=x")
    (tmp_path / "release.key").write_text("secret")
    (tmp_path / "README.md").write_text("not committed")

    # Its last argument is the folder that it builds.
    uv = tmp_path / ".venv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text('#!/bin/sh\necho "$*" >> calls\n')
    uv.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    outer = {name: value for name, value in os.environ.items() if not OUTER.match(name)}
    subprocess.run(["make", "--silent", "dist"], cwd=tmp_path, env=outer, check=True)

    calls = (tmp_path / "calls").read_text().splitlines()
    built, of_papers = (tmp_path / call.split()[-1] for call in calls)
    packed = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert packed == COMMITTED
    assert of_papers == built / "plugins" / "papers"
