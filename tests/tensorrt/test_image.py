"""The TensorRT path of the container image, in processes that run as in the container.

They have the variables of the Dockerfile, another user than root, a read-only file system with a volume for
the cache, and no torch. The folders of `image` are mounted over the packages: TensorRT and a GPU, simulated.
TensorRT's own Python modules are used where `make cuda-stand-in` installed them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from sopdeploy.bundle.folder import Bundle
from tests.cuda.stand_in import FOLDER, installed
from tests.gpu_graphs import ABSENT, real_tensorrt
from tests.service.conftest import picture_bytes
from tests.tensorrt.networks import write

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "tests" / "tensorrt" / "image"
BINDINGS = FOLDER / "bindings"
CACHE = "/var/cache/sopdeploy"
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
# $0 is the folder of the bundles, $1 that of the cache, the rest is the command.
CONTAINER = f"""
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
mount --bind "$1" /mnt
mount -t tmpfs tmpfs /var/cache
mkdir {CACHE}
mount --bind /mnt {CACHE}
mount -o remount,bind,ro /
shift
exec unshare --user --map-user=10001 --map-group=10001 "$@"
"""


def image_variables() -> dict[str, str]:
    """Read the variables of the image from the Dockerfile, without the path of its programs."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    assert "USER 10001:10001" in text
    assert f"VOLUME {CACHE}\n" in text
    pairs = [pair for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for pair in line.split()]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs) if name != "PATH"}


def start(bundle: Bundle, cache: Path, tensorrt: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `sopdeploy` as in the container with the package in *tensorrt* and a simulated GPU."""
    cache.mkdir(exist_ok=True)
    folders = [IMAGE / "packages", tensorrt, IMAGE / "gpu", FOLDER, ROOT, ROOT / "export", ROOT / "service"]
    variables = {
        **image_variables(),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "LD_LIBRARY_PATH": f"{FOLDER / 'driver'}:{BINDINGS}",
    }
    command = [*NAMESPACE, CONTAINER, str(bundle.path.parent), str(cache), sys.executable, "-W", "ignore"]
    return subprocess.Popen(
        [*command, "-m", "sopdeploy", *arguments],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_engine_is_built_into_the_volume_and_served(tmp_path: Path) -> None:
    if real_tensorrt() is None:
        pytest.skip(ABSENT)
    try:
        subprocess.run([*NAMESPACE, "mount -t tmpfs tmpfs /mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"user namespaces with mounts are not permitted here ({error})")
    bundle, cache = write(tmp_path / "models"), tmp_path / "cache"
    before = sorted(bundle.path.parent.rglob("*"))
    if installed():
        with start(bundle, cache, BINDINGS, "engine", str(bundle.path)) as engine:
            *_, line = engine.communicate(timeout=120)[1].splitlines()
        assert re.search(r"TensorRT 11\.\S+ cannot start here: .*`sopdeploy env` shows the driver", line), (
            line
        )
    with start(bundle, cache, IMAGE / "tensorrt", "engine", str(bundle.path), "--json") as engine:
        output, errors = engine.communicate(timeout=120)
    assert engine.returncode == 0, errors
    assert Path(json.loads(output)["plan"]).parent == Path(CACHE, "engines", bundle.name)
    assert sorted(bundle.path.parent.rglob("*")) == before
    command = ("serve", str(bundle.path.parent), "--port", "0", "--log", "json", "--runtime", "auto")
    with start(bundle, cache, IMAGE / "tensorrt", *command) as server:
        assert server.stdout
        assert server.stderr
        try:
            ready = server.stdout.readline().split()
            assert ready[:1] == ["ready:"], server.stderr.read()
            model = httpx.get(f"{ready[1]}/info").json()["models"][0]
            assert (model["runtime"], model["device"]) == ("tensorrt 11.1.0", "cuda:0")
            assert httpx.post(f"{ready[1]}/v1/classify", content=picture_bytes()).status_code == 200
        finally:
            server.terminate()
        messages = [json.loads(line)["event"] for line in server.stderr]
    assert f"{bundle.name}: runtime tensorrt: engines in {CACHE}/engines/{bundle.name}" in messages
