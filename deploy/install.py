"""Install into an environment: with uv, which unpacks a package once for all environments, or with pip.

    python deploy/install.py --editable '.[dev]'

uv reads none of pip's settings. So where pip is told of an index of its own, pip installs, and where uv
fails, pip tries. Needs nothing but Python: it is the first thing that runs in a new environment.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN_INDEX = re.compile(r"^[\w:]+\.(?:index-url|no-index)=", re.MULTILINE)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def succeeds(command: list[str]) -> bool:
    """Run *command*, its output shown; return whether it ended with 0."""
    return subprocess.run(command, check=False).returncode == 0


def uv_requirement() -> str:
    """Return the range of uv that the extra `dev` names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(line for line in extras["optional-dependencies"]["dev"] if re.match(r"uv\b", line))


def has_own_index() -> bool:
    """Return whether pip is told, by a file or by the environment, to ask another index than PyPI."""
    told = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=False).stdout
    return OWN_INDEX.search(told) is not None


def find_uv() -> Path | None:
    """Return the uv of this Python, which pip installs first where it is missing; None where pip cannot."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file() and not succeeds([*PIP, "install", "--quiet", uv_requirement()]):
        return None
    return uv


def install(python: Path, *what: str) -> None:
    """Install *what*, words as behind `pip install`, for *python*; ends where neither uv nor pip can."""
    if has_own_index():
        sys.stdout.write("pip installs, because it is told of an index of its own\n")
    elif uv := find_uv():
        if succeeds([str(uv), "pip", "install", "--quiet", "--python", str(python), *what]):
            return
        sys.stdout.write("uv could not; pip tries\n")
    if not succeeds([*PIP, "--python", str(python), "install", "--quiet", *what]):
        sys.exit(f"not installed: {' '.join(what)}; what failed stands above")


if __name__ == "__main__":
    install(Path(sys.executable), *sys.argv[1:])
