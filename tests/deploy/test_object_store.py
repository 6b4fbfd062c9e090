"""The chart's own command pulls a bundle from an object store with static keys, and its server serves it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.test_deploy import run_helm, yaml
from tests.support.children import serving
from tests.support.service import picture_bytes, wait_for, write_bundle

KEYS = {
    "AWS_ACCESS_KEY_ID": "static",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
ADDRESS = "http://127.0.0.1:"


@contextmanager
def object_store(log: Path) -> Iterator[str]:
    """Run moto's server with the bucket `models`; yields its address."""
    uvx = str(Path(sys.executable).with_name("uvx"))
    command = [
        uvx,
        "--python",
        sys.executable,
        "--from",
        "moto[server]",
        "moto_server",
        "-p",
        "0",
    ]

    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as child,
    ):
        try:
            wait_for(lambda: ADDRESS in log.read_text())
            address = ADDRESS + log.read_text().partition(ADDRESS)[2].split()[0]
            # Without the store's own client: a bucket is a PUT, which moto accepts from anyone.
            httpx.put(f"{address}/models", timeout=60).raise_for_status()
            yield address
        finally:
            child.terminate()


def containers(path: Path, source: str, endpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Render the chart; return the containers `pull` and `server`."""
    env = [
        {"name": name, "value": value}
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items()
    ]
    values = {"models": {"path": str(path), "pull": {"source": source}}, "extraEnv": env}
    for text in run_helm([values])[1][0]:
        for document in yaml.safe_load_all(text):
            if document and document["kind"] == "Deployment":
                pod = document["spec"]["template"]["spec"]
                return pod["initContainers"][0], pod["containers"][0]
    raise AssertionError("no deployment")


def run(*arguments: str, **variables: str) -> None:
    """Run a command of this project with the environment *variables* in addition."""
    command = [sys.executable, "-m", "sopdeploy", *arguments]
    subprocess.run(command, env={**os.environ, **variables}, check=True, timeout=120)


def variables_of(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


@pytest.mark.nightly
def test_the_chart_pulls_from_a_store_with_static_keys_and_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, models = write_bundle(tmp_path / "bundles"), tmp_path / "models"
    for name in [name for name in os.environ if name.startswith(("AWS_", "SOPDEPLOY_"))]:
        monkeypatch.delenv(name)

    with object_store(tmp_path / "moto.log") as endpoint:
        run("push", str(bundle), "s3://models", **KEYS, AWS_ENDPOINT_URL=endpoint)
        pull, server = containers(models, f"s3://models/{bundle.name}.tar", endpoint)
        run(*pull["args"], **variables_of(pull))
    pulled = [path.name for path in models.iterdir() if path.is_dir() and not path.is_symlink()]

    assert pulled == [bundle.name]
    for name, value in variables_of(server).items():
        monkeypatch.setenv(name, value)
    command, *arguments = server["args"]

    assert command == "serve"
    arguments[arguments.index("--host") + 1] = (
        "127.0.0.1"  # instead of all addresses; on any free port
    )
    with serving(*arguments) as client:
        assert client.post("/v1/classify", content=picture_bytes()).status_code == 200
