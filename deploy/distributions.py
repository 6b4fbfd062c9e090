"""`make dist`: build sdist and wheel, the same bytes for the same commit, with the tools that are locked.

The times in both are that of the commit (`SOURCE_DATE_EPOCH`), the tools those of deploy/lock/build.txt, and
the wheel is built from the sdist.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from commands import run
from install import install

ROOT = Path(__file__).parents[1]


def apart(*command: str | Path, **environment: str) -> str:
    """Run *command* in an empty folder, where it finds nothing of this checkout, and return its output."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    with tempfile.TemporaryDirectory() as folder:
        return run(*command, cwd=folder, env=settings)


def empty_environment(folder: Path, *what: str) -> Path:
    """Make an environment at *folder* that holds *what* and nothing else, not even pip; return its `bin`."""
    apart(sys.executable, "-m", "venv", "--without-pip", folder)
    install(folder / "bin" / "python", *what)
    return folder / "bin"


def build_tools(folder: Path) -> Path:
    """Make an environment at *folder* with the locked tools that build; return its `bin`."""
    return empty_environment(folder, "--require-hashes", "--requirement", str(ROOT / "deploy/lock/build.txt"))


def commit_time(source: Path) -> dict[str, str]:
    """Return the setting with the time of the commit at *source*; none where there is no git."""
    command = ["git", "-C", str(source), "log", "-1", "--format=%ct"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"SOURCE_DATE_EPOCH": found.stdout.strip()} if found.returncode == 0 else {}


def build(source: Path, folder: Path, tools: Path) -> tuple[Path, Path]:
    """Build *source* into *folder* with the programs in *tools*; return sdist and wheel."""
    apart(
        tools / "python", "-m", "build", "--no-isolation", "--outdir", folder, source, **commit_time(source)
    )
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def main() -> None:
    """Build this checkout into dist/."""
    with tempfile.TemporaryDirectory(prefix="sopdeploy-tools-") as tools:
        for path in build(ROOT, ROOT / "dist", build_tools(Path(tools))):
            sys.stdout.write(f"{path.relative_to(ROOT)}, {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
