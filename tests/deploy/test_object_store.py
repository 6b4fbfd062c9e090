"""The chart's own command pulls a bundle from an object store with static keys, and its server serves it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.test_deploy import needs_helm, run_helm, yaml
from tests.service.conftest import picture_bytes, wait_for, write_bundle

KEYS = {"AWS_ACCESS_KEY_ID": "static", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
SOPDEPLOY = [sys.executable, "-m", "sopdeploy"]


@contextmanager
def background(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[Callable[[], str]]:
    """Run *command* while the block runs; yields a function that reads its log."""
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as child,
    ):
        try:
            yield log.read_text
        finally:
            child.terminate()


def address_in(read_log: Callable[[], str]) -> str:
    """Wait until a server prints its address."""
    wait_for(lambda: "http://127.0.0.1:" in read_log())
    return "http://127.0.0.1:" + read_log().partition("http://127.0.0.1:")[2].split()[0].strip(".,/\"'")


def containers(path: Path, source: str, endpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Render the chart; return the containers `pull` and `server`."""
    env = [{"name": name, "value": value} for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items()]
    values = {"models": {"path": str(path), "pull": {"source": source}}, "extraEnv": env}
    for text in run_helm([values])[1][0]:
        for document in yaml.safe_load_all(text):
            if document and document["kind"] == "Deployment":
                pod = document["spec"]["template"]["spec"]
                return pod["initContainers"][0], pod["containers"][0]
    raise AssertionError("no deployment")


@needs_helm
@pytest.mark.slow
def test_the_chart_pulls_from_a_store_with_static_keys_and_serves(tmp_path: Path) -> None:
    bundle, models = write_bundle(tmp_path / "bundles"), tmp_path / "models"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SOPDEPLOY_"))}
    uvx = Path(sys.executable).with_name("uvx")
    command = [str(uvx), "--python", sys.executable, "--from", "moto[server]", "moto_server", "-p", "0"]
    with background(command, tmp_path / "moto.log", clean) as moto:
        endpoint = address_in(moto)
        # Without the store's own client: a bucket is a PUT, which moto accepts from anyone.
        deadline = time.monotonic() + 60
        while httpx.put(f"{endpoint}/models", timeout=10).status_code != 200:
            assert time.monotonic() < deadline
        keys = {**clean, **KEYS, "AWS_ENDPOINT_URL": endpoint}
        subprocess.run([*SOPDEPLOY, "push", str(bundle), "s3://models"], env=keys, check=True, timeout=120)

        source = f"s3://models/{bundle.name}.tar"
        pull, server = containers(models, source, endpoint)
        given = {variable["name"]: variable["value"] for variable in pull["env"]}
        subprocess.run([*SOPDEPLOY, *pull["args"]], env={**clean, **given}, check=True, timeout=120)
        assert [path.name for path in models.iterdir() if path.is_dir() and not path.is_symlink()] == [
            bundle.name
        ]

        given = {variable["name"]: variable["value"] for variable in server["env"]} | {"SOPDEPLOY_PORT": "0"}
        arguments = ["127.0.0.1" if argument == "0.0.0.0" else argument for argument in server["args"]]  # noqa: S104
        with background([*SOPDEPLOY, *arguments], tmp_path / "server.log", {**clean, **given}) as log:
            answer = httpx.post(f"{address_in(log)}/v1/classify", content=picture_bytes(), timeout=30)
            assert answer.status_code == 200, log()
