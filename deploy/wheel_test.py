"""`make wheel-test`: build sdist and wheel, install the wheel into an empty environment, and use it there.

`cpu` serves a bundle in an environment without torch; `train` (minutes, gigabytes) makes the bundle first, in
an environment with the extra `train` only. Neither sees this checkout or the packages of this Python.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from no_torch import UNWANTED

ROOT = Path(__file__).parents[1]
READY_SECONDS = 120
SMALL = ["--recipe", "digits-dsop", "--set", "epochs=1"]


def run(*command: str | Path, **environment: str) -> str:
    """Run *command* in an empty folder and return its output; where it fails, print that and end."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env=settings,
        )
    if found.returncode:
        sys.exit(f"{found.stdout}{found.stderr}failed ({found.returncode}): {' '.join(map(str, command))}")
    return found.stdout


def say(what: str, started: float) -> None:
    """Print *what* was done since *started*."""
    sys.stdout.write(f"ok   {what} ({time.monotonic() - started:.0f} s)\n")
    sys.stdout.flush()


def build(folder: Path) -> Path:
    """Build sdist and, from the sdist, the wheel into *folder*; return the wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


def environment(folder: Path, wheel: Path, extra: str) -> Path:
    """Make an empty environment at *folder* with *wheel* and its *extra*; return its `bin`."""
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]")
    return folder / "bin"


def make_bundle(programs: Path, folder: Path) -> Path:
    """Train on digits for an epoch and export, with the `sopdeploy` in *programs*; return the bundle."""
    run(programs / "sopdeploy", "train", *SMALL, "--out", folder / "run")
    run(programs / "sopdeploy", "export", folder / "run" / "best.pt", "--detach", "--out", folder / "bundles")
    return next((folder / "bundles").iterdir())


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
        run(programs / "sopdeploy", "health", "--url", url)
        with urllib.request.urlopen(f"{url}/info") as answer:  # noqa: S310 - our own server
            if json.load(answer)["models"][0]["bundle"] != bundle.name:
                sys.exit("the server serves another bundle")
        server.terminate()
        if server.wait(READY_SECONDS) != 0:
            sys.exit(f"SIGTERM ended the server with {server.returncode}")
    finally:
        server.kill()


def main() -> None:
    """Do it all for the extras on the command line: `cpu`, `train` or both."""
    wanted = sys.argv[1:] or ["cpu"]
    folder = Path(tempfile.mkdtemp(prefix="sopdeploy-wheel-"))
    try:
        started = time.monotonic()
        wheel = build(folder / "dist")
        say(f"built {wheel.name}, {wheel.stat().st_size:,} bytes", started)
        trainer = Path(sys.executable).parent
        if "train" in wanted:
            started = time.monotonic()
            trainer = environment(folder / "train", wheel, "train,cpu")
            say("installed with [train]", started)
        started = time.monotonic()
        bundle = make_bundle(trainer, folder)
        say(f"trained and exported with {'the wheel' if 'train' in wanted else 'this checkout'}", started)
        started = time.monotonic()
        programs = environment(folder / "cpu", wheel, "cpu")
        heavy = f"import importlib.util as u; print([n for n in {UNWANTED} if u.find_spec(n)])"
        if run(programs / "python", "-c", heavy).strip() != "[]":
            sys.exit("the base install and [cpu] bring what only training needs")
        say("installed with [cpu], without torch", started)
        started = time.monotonic()
        run(programs / "sopdeploy", "verify", bundle)
        serve(programs, bundle)
        say("verified, served, stopped", started)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
