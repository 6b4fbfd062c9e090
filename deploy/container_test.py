"""`make container-test`: build the image of the server, run it as it will be run, and look at it.

Ends with 0 only where all of it was really done; says why where it cannot be.
"""

import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from builders import WORK, builder_for_test
from commands import run, timed
from images import ROOT, Builder
from PIL import Image

USER = 10_001
MOST_ADDED_BYTES = 350_000_000
READY_SECONDS = 120
ENTRYPOINT = ["sopdeploy"]
COMMAND = ["serve", "/models", "--host", "0.0.0.0"]  # noqa: S104 - a container's port is published, or not
NO_TORCH = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'timm') if u.find_spec(n)])"


def check(said: str, *, holds: bool) -> None:
    """Print what was *said*; end where it does not hold."""
    sys.stdout.write(f"{'ok  ' if holds else 'FAIL'} {said}\n")
    sys.stdout.flush()
    if not holds:
        sys.exit(1)


def sopdeploy(*arguments: str) -> str:
    """Return what `sopdeploy` prints for *arguments*, on this machine."""
    return run(sys.executable, "-m", "sopdeploy", *arguments, cwd=ROOT)


def make_bundle() -> Path:
    """Train on digits for one epoch and export: a folder with one bundle, made once."""
    bundles = WORK / "bundles"
    if not bundles.is_dir():
        folder = WORK / "training"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short
        sopdeploy("train", "--recipe", "digits-dsop", "--set", "epochs=1", "--out", str(folder))
        sopdeploy("export", str(folder / "best.pt"), "--detach", "--out", str(bundles))
    return bundles


def photograph() -> Path:
    """Return a picture as a camera might make it: JPEG, large, noisy, with a bright stroke."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (480, 640, 3), dtype=np.uint8)
    pixels[60:420, 300:350] += 180
    path = WORK / "photo.jpg"
    Image.fromarray(pixels).save(path, quality=90)
    return path


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(builder: Builder) -> None:
    """Ask the image's own health check until it says yes."""
    until = time.monotonic() + READY_SECONDS
    while True:
        code, said = builder.inside("sopdeploy", "health")
        if code == 0 or time.monotonic() > until:
            sys.stdout.write("" if code == 0 else builder.said())
            check(f"the health check says ready {said.strip()}", holds=code == 0)
            return
        time.sleep(0.5)


def look_at_image(builder: Builder) -> None:
    """Check what the image says of itself, and its size."""
    config = builder.config()
    check(f"entrypoint {config['Entrypoint']}, in exec form", holds=config["Entrypoint"] == ENTRYPOINT)
    check(f"command {config['Cmd']}", holds=config["Cmd"] == COMMAND)
    check(f"user {config['User']}", holds=config["User"] == f"{USER}:{USER}")
    stop = config.get("StopSignal", "SIGTERM")  # the default may be left out
    check(f"stop signal {stop}", holds=stop in {"SIGTERM", "15"})
    health = config["Healthcheck"]["Test"]
    check(f"health check {health}", holds=health == ["CMD", "sopdeploy", "health"])
    size = builder.added_bytes()
    check(f"{size / 1e6:.0f} MB more than its base, at most 350", holds=size <= MOST_ADDED_BYTES)


def look_at_server(builder: Builder, bundles: Path, port: int) -> None:
    """Start the image's command, ask it, look at its process, and stop it."""
    builder.start(bundles, port)
    with timed("ready"):
        wait_until_ready(builder)
    photo = photograph()
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/classify", content=photo.read_bytes(), timeout=30)
    first = answer.json()["classes"][0]
    bundle = next(path for path in bundles.iterdir() if path.is_dir())
    here = sopdeploy("predict", str(bundle), str(photo))
    same = f"{first['label']} {first['probability']:.4f}"
    check(f"a photograph is {same}, here and there", holds=f": {same}," in here)
    check(f"the server's user is {USER}", holds=builder.server_user() == USER)
    code, found = builder.inside("/opt/sopdeploy/bin/python", "-c", NO_TORCH)
    check(f"there is no torch: {found.strip()}", holds=code == 0 and found.strip().endswith("[]"))
    for path in ("/models/x", "/opt/sopdeploy/x", "/x"):
        check(f"the user cannot write {path}", holds=builder.inside("touch", path)[0] != 0)
    check("the user can write to the engine cache", holds=builder.inside("mkdir", "-p", cache())[0] == 0)
    with timed("stopped"):
        code = builder.stop()
    check(f"SIGTERM ends it with {code}", holds=code == 0)


def cache() -> str:
    """Return the folder of engines in the image."""
    return "/var/cache/sopdeploy/engines"


def main() -> None:
    """Build, run, look."""
    started = time.monotonic()
    builder = builder_for_test()
    sys.stdout.write(f"     with {type(builder).__name__.lower()}\n")
    with timed("a bundle and the image made, side by side"), ThreadPoolExecutor() as pool:
        bundle = pool.submit(make_bundle)
        builder.build(ROOT)
        bundles = bundle.result()
    builder.clean()
    try:
        look_at_image(builder)
        look_at_server(builder, bundles, free_port())
    finally:
        builder.clean()
    sys.stdout.write(f"container-test passed in {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
