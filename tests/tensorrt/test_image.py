"""The TensorRT path of the container image, in processes that run as in the container.

They have the variables of the Dockerfile, another user than root, a read-only file system with a volume for
the cache, and no torch. The folders of `image` are mounted over the packages: TensorRT and a GPU, simulated.
TensorRT's own Python modules are used where `make cuda-stand-in` installed them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from sopdeploy.bundle.folder import Bundle
from tests.cuda.stand_in import ABSENT as NO_PROVIDER
from tests.cuda.stand_in import FOLDER, installed
from tests.gpu_graphs import ABSENT, real_tensorrt
from tests.service.conftest import picture_bytes
from tests.tensorrt.networks import write

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "tests" / "tensorrt" / "image"
TENSORRT, GPU, BINDINGS = IMAGE / "tensorrt", IMAGE / "gpu", FOLDER / "bindings"
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


def cannot_isolate() -> str | None:
    if real_tensorrt() is None:
        return ABSENT
    try:
        subprocess.run([*NAMESPACE, "mount -t tmpfs tmpfs /mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"user namespaces with mounts are not permitted here ({error})"
    return None


pytestmark = pytest.mark.skipif(cannot_isolate() is not None, reason=str(cannot_isolate()))


def image_variables() -> dict[str, str]:
    """Read the variables of the image from the Dockerfile, without the path of its programs."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    assert "USER 10001:10001" in text
    assert f"VOLUME {CACHE}\n" in text
    pairs = [pair for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for pair in line.split()]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs) if name != "PATH"}


class Served(NamedTuple):
    """What a server that was ready logged and answered."""

    messages: list[str]
    model: dict[str, Any]
    status: int


class Container:
    """Runs `sopdeploy` as in the container; *bundle* is mounted read-only, the cache is *cache*."""

    def __init__(self, bundle: Bundle, cache: Path) -> None:
        self.bundle, self.cache = bundle, cache
        cache.mkdir()

    def start(self, *arguments: str, packages: tuple[Path, ...]) -> subprocess.Popen[str]:
        """Start `sopdeploy` with *packages* mounted."""
        folders = [IMAGE / "packages", *packages, FOLDER, ROOT, ROOT / "export", ROOT / "service"]
        libraries = [FOLDER / "driver", BINDINGS]
        variables = {
            **image_variables(),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        }
        command = [CONTAINER, str(self.bundle.path.parent), str(self.cache)]
        return subprocess.Popen(
            [*NAMESPACE, *command, sys.executable, "-W", "ignore", "-m", "sopdeploy", *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def serve(self, *packages: Path) -> Served:
        """Start a server with `--runtime auto` and its log, classify an image, and stop it."""
        command = ["serve", str(self.bundle.path.parent), "--port", "0", "--log", "json", "--runtime", "auto"]
        with self.start(*command, packages=packages) as server:
            assert server.stdout
            assert server.stderr
            try:
                ready = server.stdout.readline().split()
                assert ready[:1] == ["ready:"], server.stderr.read()
                model = httpx.get(f"{ready[1]}/info").json()["models"][0]
                status = httpx.post(f"{ready[1]}/v1/classify", content=picture_bytes()).status_code
            finally:
                server.terminate()
            return Served([json.loads(line)["event"] for line in server.stderr], model, status)


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(write(tmp_path / "models"), tmp_path / "cache")


def test_an_engine_is_built_into_the_volume_and_served_also_from_beside_the_bundle(
    container: Container,
) -> None:
    name, models = container.bundle.name, container.bundle.path.parent
    before = sorted(models.rglob("*"))
    with container.start("engine", str(container.bundle.path), "--json", packages=(TENSORRT, GPU)) as engine:
        output, errors = engine.communicate(timeout=120)
    assert engine.returncode == 0, errors
    assert Path(json.loads(output)["plan"]).parent == Path(CACHE, "engines", name)
    assert sorted(models.rglob("*")) == before
    served = container.serve(TENSORRT, GPU)
    assert f"{name}: runtime tensorrt: engines in {CACHE}/engines/{name}" in served.messages
    assert (served.model["runtime"], served.model["device"], served.status) == (
        "tensorrt 11.1.0",
        "cuda:0",
        200,
    )
    shutil.move(container.cache / "engines", models / "engines")
    served = container.serve(TENSORRT, GPU)
    assert f"{name}: runtime tensorrt: engines in {models}/engines/{name}" in served.messages
    assert (served.model["runtime"], served.status) == ("tensorrt 11.1.0", 200)


@pytest.mark.skipif(not installed(), reason=NO_PROVIDER)
def test_the_real_bindings_without_a_device_end_in_one_line(container: Container) -> None:
    with container.start("engine", str(container.bundle.path), packages=(BINDINGS, GPU)) as process:
        *_, line = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2
    assert re.search(r"TensorRT 11\.\S+ cannot start here: .*`sopdeploy env` shows the driver", line), line
