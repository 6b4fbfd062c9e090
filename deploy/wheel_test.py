"""`make wheel-test`: build sdist and wheel, install the wheel into empty environments, and use it there.

An environment with `[train]` trains and exports a bundle; another one with `[cpu]`, without torch, verifies
and serves it. Neither can access this checkout or the packages of this Python.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from commands import timed
from distributions import ROOT, build, build_tools, empty_environment, run_isolated
from no_torch import UNWANTED

READY_SECONDS = 120
SMALL = ["--recipe", "digits-dsop", "--set", "epochs=1"]


def build_twice(folder: Path) -> Path:
    """Build here and in a copy with other file times and modes; exit unless the files are identical."""
    tools = build_tools(folder / "tools")
    first = build(ROOT, folder / "dist", tools)
    copy = folder / "copy"
    shutil.unpack_archive(first[0], copy, filter="data")
    (source,) = copy.iterdir()
    for path in source.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    second = build(source, folder / "again", tools)
    for one, other in zip(first, second, strict=True):
        if one.read_bytes() != other.read_bytes():
            sys.exit(f"two builds of the same source differ: {one.name}")
    return first[1]


def make_bundle(programs: Path, folder: Path) -> Path:
    """Train on digits for one epoch and export with the `sopdeploy` in *programs*; return the bundle."""
    run_isolated(programs / "sopdeploy", "train", *SMALL, "--out", folder / "run")
    options = ("--detach", "--max-batch", "1", "--out", folder / "bundles")  # captured once instead of twice
    run_isolated(programs / "sopdeploy", "export", folder / "run" / "best.pt", *options)
    return next((folder / "bundles").iterdir())


def check_without_torch(programs: Path) -> None:
    """Exit if the environment of *programs* contains packages that only training needs."""
    script = f"import importlib.util as u; print([n for n in {UNWANTED} if u.find_spec(n)])"
    found = run_isolated(programs / "python", "-c", script).strip()
    if found != "[]":
        sys.exit(f"[cpu] installs packages that only training needs: {found}")


def serve(programs: Path, bundle: Path) -> None:
    """Serve *bundle*, request its information, and stop the server."""
    server = subprocess.Popen(
        [programs / "sopdeploy", "serve", bundle, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=bundle,
    )
    try:
        line = server.stdout.readline() if server.stdout else ""
        if not line.startswith("ready: "):
            sys.exit(f"the server did not start: {line}")
        url = line.split()[1]
        run_isolated(programs / "sopdeploy", "health", "--url", url)
        with urllib.request.urlopen(f"{url}/info") as response:  # noqa: S310 - our own server
            if json.load(response)["models"][0]["bundle"] != bundle.name:
                sys.exit("the server serves another bundle")
        server.terminate()
        if server.wait(READY_SECONDS) != 0:
            sys.exit(f"the server exited with {server.returncode} after SIGTERM")
    finally:
        server.kill()


def main() -> None:
    """Build, install, train and serve in build/, on the same disk as .venv."""
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="wheel-test-", dir=ROOT / "build"))
    try:
        with timed("wheel: built twice, identical bytes"):
            wheel = build_twice(folder)
        with timed(f"wheel: {wheel.name}, {wheel.stat().st_size:,} bytes, installed with [train]"):
            trainer = empty_environment(folder / "train", f"{wheel}[train,cpu]")
        with timed("wheel: trained and exported"):
            bundle = make_bundle(trainer, folder)
        with timed("wheel: installed with [cpu], without torch"):
            programs = empty_environment(folder / "cpu", f"{wheel}[cpu]")
            check_without_torch(programs)
        with timed("wheel: verified, served, stopped"):
            run_isolated(programs / "sopdeploy", "verify", bundle)
            serve(programs, bundle)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
