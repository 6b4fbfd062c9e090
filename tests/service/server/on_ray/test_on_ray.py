"""A real Ray cluster on this machine; one test, because it takes seconds to start."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from tests.ports import held_port
from tests.service.children import START_SECONDS, below, line_of, listening
from tests.service.server.on_ray.clusters import Clients, Cluster, own_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 16


def write_config(folder: Path, bundle: Path, port: int) -> str:
    """Write the config of two replicas whose batches wait one second, so that a kill hits requests."""
    file = folder / f"{bundle.name}.yaml"
    words = ["ray", f"tiny={bundle}", "--replicas", "2", "--port", str(port), "--setting", "max_batch=64"]
    done = CliRunner().invoke(app, [*words, "--setting", "max_queue_delay_ms=1000", "--emit", str(file)])
    assert done.exit_code == 0, done.output
    return str(file)


def digest(bundle: Path) -> str:
    return bundle.name.rpartition("-")[2]


def test_replicas_swap_bundles_and_a_killed_one_loses_only_its_requests(
    make_bundle: Callable[..., Path], tmp_path: Path, jpeg: bytes, until: Callable[..., None]
) -> None:
    before, after = (make_bundle(tmp_path, seed=seed) for seed in range(2))
    with held_port() as port, own_cluster() as cluster:
        check_command_serves_until_a_signal(cluster, before, port)
        cluster.run("ray.serve.scripts", "run", "--non-blocking", write_config(tmp_path, before, port))
        until(lambda: ready(port), START_SECONDS)
        check_command_rejects_a_running_application(cluster, after, port)
        clients = Clients(port, jpeg, CLIENTS)
        with clients.sending():
            replicas = cluster.replicas()
            assert len(replicas) == 2
            until(lambda: both_have_responded(cluster), START_SECONDS)
            cluster.run("ray.serve.scripts", "run", "--non-blocking", write_config(tmp_path, after, port))
            until(lambda: clients.latest() == {digest(after)}, START_SECONDS)
            assert cluster.replicas() == replicas
            assert {answer.status for answer in clients.responses} == {200}

            until(lambda: clients.waiting == CLIENTS, START_SECONDS)
            time.sleep(0.1)  # the requests reach the replicas
            killed = time.monotonic()
            os.kill(replicas[0], signal.SIGKILL)
            until(lambda: replicas[0] not in cluster.replicas(), START_SECONDS)
            until(lambda: len(cluster.replicas()) == 2, START_SECONDS)
            time.sleep(1.0)
        lost = [answer for answer in clients.responses if answer.status != 200]
        assert 0 < len(lost) <= CLIENTS
        assert all(answer.sent <= killed <= answer.done for answer in lost)


def test_a_cluster_of_its_own_listens_on_loopback_only(bundle_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        held_port() as port,
        tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-m", "sopdeploy", "ray", str(bundle_path), "--port", str(port)],
            env=environment | {"RAY_TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
        ) as child,
    ):
        try:
            while not (line := line_of(child)).startswith("ready: "):
                assert line, "it did not start"
            addresses = [address for process in below(child.pid) for address in listening(process)]
            assert ready(port)
            assert len(addresses) > 3
            assert {str(address) for address in addresses} == {"127.0.0.1"}
        finally:
            child.terminate()
            child.communicate(timeout=START_SECONDS)


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10).json() == {"status": "ok"}
    except (httpx.HTTPError, ValueError):
        return False


def both_have_responded(cluster: Cluster) -> bool:
    found = cluster.numbers("ray_sopdeploy_requests_total").values()
    return sum(number > CLIENTS / 2 for number in found) == 2  # an ended replica had few


def check_command_serves_until_a_signal(cluster: Cluster, bundle: Path, port: int) -> None:
    command = [sys.executable, "-m", "sopdeploy", "ray", f"tiny={bundle}", "--port", str(port)]
    with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            while not (line := line_of(child)).startswith("ready: "):
                assert line, "it did not start"
            assert line == f"ready: http://127.0.0.1:{port}  {bundle.name}\n"
            answer = httpx.get(f"http://127.0.0.1:{port}/info", timeout=30)
            assert [model["id"] for model in answer.json()["models"]] == [digest(bundle)]
            assert len(answer.headers.get_list("x-request-id")) == 1
            child.terminate()
            child.communicate(timeout=START_SECONDS)
        finally:
            child.kill()
    assert child.returncode == 0
    assert not ready(port)


def check_command_rejects_a_running_application(cluster: Cluster, bundle: Path, port: int) -> None:
    command = [sys.executable, "-m", "sopdeploy", "ray", f"tiny={bundle}", "--port", str(port)]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: sopdeploy already runs on this Ray" in done.stderr
    assert ready(port)
