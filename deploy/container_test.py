"""`make container-test [TARGET=gpu]`: build the server image, run it as in production, and inspect it.

For the target `gpu`, it also checks that the server names what is missing without a GPU, that
the image has every library that CUDA needs except the driver, and that it can be configured to
serve from the CPU. Exits with 0 only if every check was run and passed; otherwise prints the
reason.
"""

import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
from builders import ROOT, WORK, Builder, builder_for_test
from PIL import Image

from commands import run, timed

DEPLOYMENT = ROOT / "docs" / "deploy.md"
USER = 10_001
MAX_ADDED_BYTES = {"cpu": 550_000_000, "gpu": 4_000_000_000}
READY_SECONDS = 120
KEEP_SECONDS = 30
CACHE = "/var/cache/sopdeploy"
ENGINE_CACHE = f"{CACHE}/engines"
WRITABLE = (f"{CACHE}/", "/kept/", "/proc/", "/sys/", "/dev/")
ENTRYPOINT = ["sopdeploy"]
HEALTH = ["CMD", "python3", "-I", "-S", "/usr/local/lib/sopdeploy_health.py"]
COMMAND = ["serve", "/models", "--host", "*"]  # the container's port is published separately
NO_GPU = "no NVIDIA driver is usable here (libcuda.so.1 cannot be loaded); start a container with `--gpus all`"
ON_CPU = {"SOPDEPLOY_RUNTIME": "onnxruntime-cpu"}
# Loads the CUDA provider and prints the loader's message, which names the first missing
# library.
CUDA_LIBRARIES = """
import ctypes, pathlib, onnxruntime
onnxruntime.preload_dlls()
ctypes.CDLL("libcudnn.so.9")
folder = pathlib.Path(onnxruntime.__file__).parent / "capi"
ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
try:
    ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    print("all found")
except OSError as error:
    print(error)
"""
TENSORRT = "import importlib.util as u; print('TensorRT' if u.find_spec('tensorrt') else 'no TensorRT')"
# The reasons why `touch` may fail; any other one says nothing about permissions.
NOT_WRITABLE = ("Permission denied", "Read-only file system")
NO_TORCH = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'timm') if u.find_spec(n)])"


def check(statement: str, *, holds: bool) -> None:
    """Print *statement* with its result; exit with 1 if it does not hold."""
    sys.stdout.write(f"{'ok  ' if holds else 'FAIL'} {statement}\n")
    sys.stdout.flush()
    if not holds:
        sys.exit(1)


def sopdeploy(*arguments: str) -> str:
    """Run `sopdeploy` from this checkout and return its output."""
    return run(sys.executable, "-m", "sopdeploy", *arguments, cwd=ROOT)


def make_bundle() -> Path:
    """Train on digits for one epoch and export, unless done before; return the bundle's folder."""
    bundles = WORK / "bundles"
    if not (bundles / "latest").is_dir():  # an interrupted export leaves the folder
        folder = WORK / "training"
        shutil.rmtree(folder, ignore_errors=True)  # left over from an interrupted run
        sopdeploy("train", "--recipe", "digits-dsop", "--set", "epochs=1", "--out", str(folder))
        sopdeploy("export", str(folder / "best.pt"), "--detach", "--out", str(bundles))
    return bundles


def make_photo() -> Path:
    """Write a large, noisy JPEG with a bright bar."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (480, 640, 3), dtype=np.uint8)
    pixels[60:420, 300:350] += 180
    path = WORK / "photo.jpg"
    Image.fromarray(pixels).save(path, quality=90)
    return path


def documented_run() -> list[str]:
    """Read the options of the `docker run` with keys and kept photographs in docs/deploy.md."""
    text = DEPLOYMENT.read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^docker run (.*SOPDEPLOY_KEEP.*)$", text, re.MULTILINE)
    return shlex.split(command)[:-1]


def values(words: list[str], option: str) -> list[str]:
    """List the values of *option* in *words*."""
    return [
        word.removeprefix(f"--{option}=") for word in words if word.startswith(f"--{option}=")
    ]


def free_port() -> int:
    """Find a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(builder: Builder) -> None:
    """Run the image's health check until it succeeds; print the server's logs if it does not."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        code, output = builder.execute(*HEALTH[1:])
        if code == 0 or time.monotonic() > deadline:
            sys.stdout.write("" if code == 0 else builder.logs())
            check(f"the health check succeeds: {output.strip()}", holds=code == 0)
            return
        time.sleep(0.5)


def check_image(builder: Builder, target: str) -> None:
    """Check the image's configuration and size."""
    # What it runs, and as whom.
    config = builder.config()
    check(
        f"entrypoint {config['Entrypoint']}, in exec form",
        holds=config["Entrypoint"] == ENTRYPOINT,
    )
    check(f"command {config['Cmd']}", holds=config["Cmd"] == COMMAND)
    check(f"user {config['User']}", holds=config["User"] == f"{USER}:{USER}")
    stop = config.get("StopSignal", "SIGTERM")  # the default may be omitted
    check(f"stop signal {stop}", holds=stop in {"SIGTERM", "15"})
    health = config["Healthcheck"]["Test"]
    check(f"health check {health}", holds=health == HEALTH)

    # Its size.
    size = builder.added_bytes()
    limit = MAX_ADDED_BYTES[target]
    check(
        f"{size / 1e6:.0f} MB more than its base, limit {limit / 1e6:.0f}", holds=size <= limit
    )


def check_without_gpu(builder: Builder, bundles: Path, port: int) -> None:
    """Start the GPU image without a GPU: it must end with one line, and only the driver may be missing."""
    builder.start([f"{bundles}:/models:ro"], {"SOPDEPLOY_PORT": str(port)})
    code = builder.wait()
    lines = [line for line in builder.logs().splitlines() if line.startswith("error")]
    check(f"without a GPU: {lines}", holds=code != 0 and len(lines) == 1 and NO_GPU in lines[0])

    # The libraries are in the image, except for the driver.
    output = builder.execute("/opt/sopdeploy/bin/python", "-c", CUDA_LIBRARIES)[1].strip()
    check(
        f"CUDA and cuDNN: {output}",
        holds=output.splitlines()[-1].startswith(("libcuda.so.1:", "all found")),
    )
    output = builder.execute("/opt/sopdeploy/bin/python", "-c", TENSORRT)[1].strip()
    sys.stdout.write(f"     the image contains {output}\n")
    builder.clean()


def check_server(builder: Builder, bundles: Path, settings: dict[str, str]) -> None:
    """Run the documented command with *settings*, send requests, inspect the process, and stop it."""
    # The settings of the page, and those given.
    words = documented_run()
    started = time.time()
    settings = {**dict(word.split("=", 1) for word in values(words, "env")), **settings}

    with folder_with_key(builder) as (folder, key):
        # Start it with the volumes of the page.
        volumes = [volume.replace("./", f"{folder}/") for volume in values(words, "volume")]
        volumes.append(f"{folder}/engines:{CACHE}")  # as with TensorRT
        builder.start(
            [volume.replace(f"{folder}/bundles", str(bundles)) for volume in volumes], settings
        )
        with timed("server ready"):
            wait_until_ready(builder)

        # Requests, and what the process is.
        check_requests(builder, bundles, int(settings["SOPDEPLOY_PORT"]), key, folder / "kept")
        check(f"the server runs as user {USER}", holds=builder.server_user() == USER)
        code, output = builder.execute("/opt/sopdeploy/bin/python", "-c", NO_TORCH)
        check(
            f"torch is not installed: {output.strip()}",
            holds=code == 0 and output.strip().endswith("[]"),
        )

        # It writes to its own folders only.
        find = f"find / -xdev -type f -newermt @{started:.0f} -user {USER} 2>/dev/null"
        lines = builder.execute("sh", "-c", find)[1].splitlines()
        written = [
            line for line in lines if line.startswith("/") and not line.startswith(WRITABLE)
        ]
        check(f"the server wrote no file beside its folders: {written}", holds=not written)
        for path in ("/models/x", "/opt/sopdeploy/x", "/x"):
            output = builder.execute("touch", path)[1]  # buildah adds lines
            check(
                f"the user cannot write {path}",
                holds=any(reason in output for reason in NOT_WRITABLE),
            )
        writable = builder.execute("mkdir", "-p", ENGINE_CACHE)[0] == 0
        check("the user can write to the engine cache", holds=writable)

        with timed("server stopped"):
            code = builder.stop()
        check(f"exit code after SIGTERM: {code}", holds=code == 0)


@contextmanager
def folder_with_key(builder: Builder) -> Iterator[tuple[Path, str]]:
    """Yield a folder with `keys.toml`, `kept` and `engines`, the files of documented commands, and the key."""
    with TemporaryDirectory(dir=WORK) as temporary:
        folder = Path(temporary)
        for name in ("kept", "engines"):
            (folder / name).mkdir(mode=0o700)
        key = sopdeploy("key", "phone-app", "--keys", str(folder / "keys.toml"))
        builder.as_root(folder, "chmod", "755")
        for path in ("keys.toml", "kept", "engines"):
            builder.as_root(folder / path, "chown", str(USER))
        try:
            yield folder, key
        finally:
            builder.as_root(folder, "chown", "-R", str(os.geteuid()))


def check_requests(builder: Builder, bundles: Path, port: int, key: str, kept: Path) -> None:
    """Send a photograph with and without *key*; the server must keep it in *kept*."""
    # Without the key it is refused, with it it has the class that this machine predicts.
    photo = make_photo()
    url = f"http://127.0.0.1:{port}/v1/classify"
    refused = httpx.post(url, content=photo.read_bytes(), timeout=30)
    check(f"without a key: {refused.status_code}", holds=refused.status_code == 401)
    response = httpx.post(
        url, content=photo.read_bytes(), timeout=30, headers={"X-API-Key": key}
    )
    best = response.json()["classes"][0]
    local = sopdeploy("predict", str(bundles / "latest"), str(photo))
    label = f"{best['label']} {best['probability']:.4f}"
    check(f"the container predicts {label}, like this machine", holds=f": {label}," in local)

    # It is kept, a little later.
    deadline = time.monotonic() + KEEP_SECONDS
    names = ""
    while ".jpg" not in names and time.monotonic() < deadline:
        time.sleep(0.1)
        names = builder.as_root(kept, "ls", "-R")
    check(f"the photograph is kept: {names.split()}", holds=".jpg" in names)


def main() -> None:
    """Build, run and check the image of the target on the command line."""
    started = time.monotonic()
    target = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if target not in MAX_ADDED_BYTES:
        sys.exit(f"container-test: no target {target}; use TARGET=cpu or TARGET=gpu")

    # Build a bundle and the image.
    builder = builder_for_test(target)
    sys.stdout.write(
        f"     target {target} with {type(builder).__name__.lower()} on {builder.base}\n"
    )
    with timed("bundle and image built in parallel"), ThreadPoolExecutor() as pool:
        bundle = pool.submit(make_bundle)
        builder.build(ROOT, target)
        bundles = bundle.result()

    # Check the image, then run it; one for GPUs must also run on a CPU.
    builder.clean()  # of an earlier test that was killed
    try:
        check_image(builder, target)
        settings = {"SOPDEPLOY_PORT": str(free_port()), "SOPDEPLOY_KEEP_SAMPLE": "1"}
        if target == "gpu":
            check_without_gpu(builder, bundles, free_port())
            settings |= ON_CPU
        check_server(builder, bundles, settings)
    finally:
        builder.clean()
    sys.stdout.write(f"container-test passed in {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
