"""Every command in installations that lack packages: it runs, or says in one line which extra to install."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sopdeploy

ROOT = Path(sopdeploy.__file__).parents[1]
PROGRAM = ROOT / "deploy" / "every_command.py"
# Commands, and functions of the Python API, that need the extra `train`.
COMMANDS = {"export", "import", "inspect", "models", "reproduce", "train"}
NAMES = "describe dsop export_network isqrt register_model register_pooling unused_modules"
IMPORTERS = {"sopdeploy.Importer", "sopdeploy.register_importer"}
FUNCTIONS = {f"sopdeploy.{name}" for name in NAMES.split()} | IMPORTERS
# Hides packages as if they were not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
"""


def installation(*extras: str) -> set[str]:
    """Names of the distributions of `pip install ".[EXTRAS]"`, as far as they are installed."""
    found = set()
    waiting = [("sopdeploy", extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        found.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = [
                    (canonicalize_name(requirement.name), part)
                    for part in ("", *requirement.extras)
                ]
                waiting += [pair for pair in needed if pair not in found]

    return {name for name, _ in found}


def without_others(present: set[str], folder: Path) -> str:
    """Return the PYTHONPATH of a process that finds only the distributions *present*; write to *folder*."""
    owners = metadata.packages_distributions().items()
    hidden = {
        module for module, names in owners if present.isdisjoint(map(canonicalize_name, names))
    }
    (folder / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "cpu", pytest.param("train", marks=pytest.mark.nightly)])
def test_every_command_runs_or_names_the_extra_that_it_needs(
    extra: str, bundle_path: Path, tmp_path: Path
) -> None:
    variables = {"PYTHONPATH": without_others(installation(extra), tmp_path)}
    command = [sys.executable, PROGRAM, bundle_path]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    missing = re.findall(r'^(\S+): 2 .*pip install "\.\[train\]"', done.stdout, re.MULTILINE)

    assert set(missing) == (set() if extra == "train" else COMMANDS | FUNCTIONS)


@pytest.mark.slow
def test_the_tests_on_a_gpu_import_only_what_their_extra_installs(tmp_path: Path) -> None:
    present = installation("gpu-check") | {"onnxruntime"}  # like onnxruntime-gpu
    variables = {
        "PYTHONPATH": without_others(present, tmp_path),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "pytest_timeout",
            "--collect-only",
            ROOT / "tests" / "gpu",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | variables,
    )

    assert done.returncode == 0, done.stdout
