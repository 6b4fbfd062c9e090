"""The wheel, in a folder that serves as an index, resolves with every extra, Python version and platform."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sopdeploy

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")
LINUX, ARM, MACOS = "x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin"
PLATFORMS = {"cpu": (LINUX, ARM, MACOS), "train": (LINUX, ARM, MACOS), "dev": (LINUX, ARM, MACOS)}
UV = Path(sys.executable).with_name("uv")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel into a folder; skip without uv or a package index."""
    out = tmp_path_factory.mktemp("index")
    if not UV.is_file():
        pytest.skip("uv is not installed")
    command = [UV, "build", "--quiet", "--wheel", "--out-dir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if re.search(r"error sending request|dns error|no longer available offline", done.stderr):
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_resolves(extra: str, python: str, folder: Path) -> None:
    for platform in PLATFORMS.get(extra, (LINUX,)):
        command = [UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--find-links", folder]
        command += ["--python-version", python, "--python-platform", platform, "-"]
        wanted = f"sopdeploy[{extra}]=={sopdeploy.__version__}"
        done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{platform}: {done.stderr}"
        resolved = {re.split(r"[=@ ;]", line)[0].lower() for line in done.stdout.splitlines()}
        direct = {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in PROJECT["dependencies"]}
        assert direct | {"sopdeploy"} <= resolved
