"""`make wheel-test`: build sdist and wheel, install the wheel into empty environments, and use it there.

The wheel's `[train]` trains and exports a bundle, its `[cpu]` serves that in an environment without torch.
Neither sees this checkout or the packages of this Python.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from commands import timed
from distributions import ROOT, apart, build, build_tools, empty_environment
from no_torch import UNWANTED

READY_SECONDS = 120
SMALL = ["--recipe", "digits-dsop", "--set", "epochs=1"]


def build_twice(folder: Path) -> Path:
    """Build here, and in a copy with files of another time and mode; end unless all bytes are the same."""
    tools = build_tools(folder / "tools")
    found = build(ROOT, folder / "dist", tools)
    copy = folder / "copy"
    shutil.unpack_archive(found[0], copy, filter="data")
    (source,) = copy.iterdir()
    for path in source.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    again = build(source, folder / "again", tools)
    for first, second in zip(found, again, strict=True):
        if first.read_bytes() != second.read_bytes():
            sys.exit(f"two builds of one source gave two files {first.name}")
    return found[1]


def make_bundle(programs: Path, folder: Path) -> Path:
    """Train on digits for an epoch and export, with the `sopdeploy` in *programs*; return the bundle."""
    apart(programs / "sopdeploy", "train", *SMALL, "--out", folder / "run")
    apart(
        programs / "sopdeploy", "export", folder / "run" / "best.pt", "--detach", "--out", folder / "bundles"
    )
    return next((folder / "bundles").iterdir())


def without_torch(programs: Path) -> None:
    """End where the environment of *programs* holds what only training needs."""
    heavy = f"import importlib.util as u; print([n for n in {UNWANTED} if u.find_spec(n)])"
    found = apart(programs / "python", "-c", heavy).strip()
    if found != "[]":
        sys.exit(f"the base install and [cpu] bring what only training needs: {found}")


def serve(programs: Path, bundle: Path) -> None:
    """Serve *bundle*, ask for its facts, and stop the server."""
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
        apart(programs / "sopdeploy", "health", "--url", url)
        with urllib.request.urlopen(f"{url}/info") as answer:  # noqa: S310 - our own server
            if json.load(answer)["models"][0]["bundle"] != bundle.name:
                sys.exit("the server serves another bundle")
        server.terminate()
        if server.wait(READY_SECONDS) != 0:
            sys.exit(f"SIGTERM ended the server with {server.returncode}")
    finally:
        server.kill()


def main() -> None:
    """Build, install, train, serve; in build/, which is on the disk of the other environment."""
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="wheel-test-", dir=ROOT / "build"))
    try:
        with timed("wheel: built twice, byte for byte the same"):
            wheel = build_twice(folder)
        with timed(f"wheel: {wheel.name}, {wheel.stat().st_size:,} bytes, installed with [train]"):
            trainer = empty_environment(folder / "train", f"{wheel}[train,cpu]")
        with timed("wheel: trained and exported"):
            bundle = make_bundle(trainer, folder)
        with timed("wheel: installed with [cpu], without torch"):
            programs = empty_environment(folder / "cpu", f"{wheel}[cpu]")
            without_torch(programs)
        with timed("wheel: verified, served, stopped"):
            apart(programs / "sopdeploy", "verify", bundle)
            serve(programs, bundle)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
