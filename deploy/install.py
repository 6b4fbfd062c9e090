"""Install packages with uv, which unpacks each package once for all environments, or with pip.

    python deploy/install.py --editable '.[dev]'

Without an NVIDIA GPU, uv takes PyTorch without its GPU libraries (4 GB) from PyTorch's own index,
if that can be reached. `UV_TORCH_BACKEND` chooses another one.

uv does not read pip's settings. Therefore pip installs if its settings name an index, and also
if uv fails. The Makefile exports constraints for both; pip has no counterpart of
`UV_RESOLUTION=lowest-direct`. This is the first program that runs in a new environment, so it
uses the standard library only.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUSTOM_INDEX = re.compile(r"^[\w:]+\.(?:index-url|no-index)=", re.MULTILINE)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def succeeds(command: list[str], **variables: str) -> bool:
    """Run *command* with environment *variables* and visible output; check that it exits with 0."""
    return subprocess.run(command, check=False, env={**os.environ, **variables}).returncode == 0


def uv_requirement() -> str:
    """Read the requirement of uv from the extra `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(
        line for line in project["optional-dependencies"]["dev"] if re.match(r"uv\b", line)
    )


def has_custom_index() -> bool:
    """Check whether pip's files or environment variables replace PyPI by another index."""
    settings = subprocess.run(
        [*PIP, "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    return CUSTOM_INDEX.search(settings) is not None


def find_uv() -> Path | None:
    """Find uv of this Python, or install it with pip; None if that fails."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file() and not succeeds([*PIP, "install", "--quiet", uv_requirement()]):
        return None
    return uv


def install_with_uv(uv: Path, python: Path, *arguments: str) -> bool:
    """Install *arguments* for *python*, first without PyTorch's GPU libraries if there is no GPU."""
    command = [str(uv), "pip", "install", "--quiet", "--python", str(python), *arguments]
    is_chosen = "UV_TORCH_BACKEND" in os.environ
    has_own_index = any(name.startswith("UV_") and "INDEX" in name for name in os.environ)

    # A backend makes uv ignore an index of the user.
    if not is_chosen and not has_own_index and not shutil.which("nvidia-smi"):
        if succeeds(command, UV_TORCH_BACKEND="cpu", UV_HTTP_RETRIES="1"):
            return True
        sys.stdout.write("uv failed; trying again with the PyTorch for GPUs\n")
    return succeeds(command)


def install(python: Path, *arguments: str) -> None:
    """Install *arguments*, those of `pip install`, for *python*; exit if neither uv nor pip succeeds.

    Only uv can resolve the versions that UV_RESOLUTION names.
    """
    # With uv, unless pip's settings name an index, which uv would not read.
    if has_custom_index():
        reason = "pip's settings name an index"
    elif (uv := find_uv()) and install_with_uv(uv, python, *arguments):
        return
    else:
        reason = "uv failed"

    # With pip.
    if resolution := os.environ.get("UV_RESOLUTION"):
        sys.exit(f"cannot resolve {resolution} versions: this needs uv, but {reason}")
    sys.stdout.write(f"installing with pip, because {reason}\n")
    if not succeeds([*PIP, "--python", str(python), "install", "--quiet", *arguments]):
        sys.exit(f"cannot install {' '.join(arguments)}: see the errors above")


if __name__ == "__main__":
    install(Path(sys.executable), *sys.argv[1:])
