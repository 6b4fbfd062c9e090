"""`make dist`: build sdist and wheel reproducibly.

File times are the time of the commit (`SOURCE_DATE_EPOCH`), the build tools are locked in
deploy/lock/build.txt, and the wheel is built from the sdist.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from commands import run
from install import install

ROOT = Path(__file__).parents[1]


def run_isolated(*command: str | Path, **environment: str) -> str:
    """Run *command* in an empty folder without access to this checkout, and return its output."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    with tempfile.TemporaryDirectory() as folder:
        return run(*command, cwd=folder, env=settings)


def empty_environment(folder: Path, *requirements: str) -> Path:
    """Create a virtual environment with *requirements* only, without pip; return its `bin` folder."""
    run_isolated(sys.executable, "-m", "venv", "--without-pip", folder)
    install(folder / "bin" / "python", *requirements)
    return folder / "bin"


def build_tools(folder: Path) -> Path:
    """Create a virtual environment with the locked build tools; return its `bin` folder."""
    return empty_environment(folder, "--require-hashes", "--requirement", str(ROOT / "deploy/lock/build.txt"))


def build(source: Path, folder: Path, tools: Path) -> tuple[Path, Path]:
    """Build *source* into *folder* with the programs in *tools*; return sdist and wheel.

    Without git, the build tools choose the file times.
    """
    command = ["git", "-C", str(source), "log", "-1", "--format=%ct"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    times = {"SOURCE_DATE_EPOCH": commit.stdout.strip()} if commit.returncode == 0 else {}
    run_isolated(tools / "python", "-m", "build", "--no-isolation", "--outdir", folder, source, **times)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def main() -> None:
    """Build this checkout into dist/."""
    with tempfile.TemporaryDirectory(prefix="sopdeploy-tools-") as tools:
        for path in build(ROOT, ROOT / "dist", build_tools(Path(tools))):
            sys.stdout.write(f"{path.relative_to(ROOT)}, {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
