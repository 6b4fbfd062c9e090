"""`sopdeploy ray` without Ray: config files and errors."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy_service.server.on_ray import plan
from sopdeploy_service.settings import load_settings


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOPDEPLOY_RUNTIME", raising=False)


def ray(*words: object) -> Result:
    return CliRunner().invoke(app, ["ray", *map(str, words)])


def emitted(*words: object) -> dict[str, Any]:
    done = ray(*words, "--emit", "serve.yaml")
    assert (done.exit_code, done.stderr) == (0, "")
    return yaml.safe_load(Path("serve.yaml").read_text())


def deployment(*words: object) -> dict[str, Any]:
    (application,) = emitted(*words)["applications"]
    (found,) = application["deployments"]
    return found


def test_the_config_names_its_use_the_import_path_and_the_bundles(bundle_path: Path) -> None:
    config = emitted(f"flowers={bundle_path}", "--replicas", 2, "--port", 9000)
    (application,) = config["applications"]
    assert config["http_options"]["port"] == 9000
    assert application["import_path"] == plan.IMPORT_PATH
    (found,) = application["deployments"]
    assert found["num_replicas"] == 2
    assert found["user_config"] == {"bundles": {"flowers": str(bundle_path)}}
    assert "serve deploy" in Path("serve.yaml").read_text().splitlines()[0]
    assert "`serve run serve.yaml` starts it here" in ray(bundle_path, "--emit", "serve.yaml").stdout


def test_the_queue_size_limits_ongoing_and_queued_requests(bundle_path: Path) -> None:
    found = deployment(bundle_path, "--setting", "queue_size=64", "--setting", "drain_seconds=7")
    assert found["max_ongoing_requests"] == found["max_queued_requests"] == 64
    assert found["graceful_shutdown_timeout_s"] == 7


SCALES: list[tuple[list[object], dict[str, Any]]] = [
    ([], {"num_replicas": 1}),
    (["--replicas", 3], {"num_replicas": 3}),
    (["--max-replicas", 4], {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 4}),
    (
        ["--min-replicas", 0, "--max-replicas", 2, "--gpus-per-replica", 0.5],
        {"min_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 64},
    ),
    (
        ["--min-replicas", 2, "--max-replicas", 8, "--setting", "max_batch=16"],
        {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 16},
    ),
]


@pytest.mark.parametrize(("words", "scaling"), SCALES, ids=str)
def test_autoscaling_targets_one_full_batch(
    bundle_path: Path, words: list[object], scaling: dict[str, Any]
) -> None:
    found = deployment(bundle_path, *words)
    assert found.get("autoscaling_config", {"num_replicas": found.get("num_replicas")}) == scaling
    assert ("num_replicas" in found) != ("autoscaling_config" in found)


def test_a_replica_reserves_cpus_and_gpus(bundle_path: Path) -> None:
    config = emitted(bundle_path, "--gpus-per-replica", 0.5, "--cpus-per-replica", 3)
    (application,) = config["applications"]
    assert application["deployments"][0]["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 0.5}
    assert application["args"]["settings"] == {"threads": 3}


def test_settings_reach_the_replica_with_absolute_paths(bundle_path: Path) -> None:
    words = (
        "--setting",
        "keys=keys.toml",
        "--setting",
        "top_k=3",
        "--setting",
        "threads=2",
        "--host",
        "127.0.0.2",
    )
    config = emitted(bundle_path, *words)
    given = config["applications"][0]["args"]["settings"]
    assert given == {"keys": str(Path.cwd() / "keys.toml"), "top_k": 3, "threads": 2}
    assert load_settings(**given).top_k == 3
    assert config["http_options"]["host"] == "127.0.0.2"


INVALID: list[tuple[list[object], str]] = [
    (["--setting", "devices=0,1"], "--gpus-per-replica"),
    (["--setting", "health_port=9000"], "would conflict"),
    (["--setting", "model_control=true"], "user_config"),
    (["--setting", "port=0"], "port 0"),
    (["--replicas", 2, "--max-replicas", 3], "fixed number"),
    (["--min-replicas", 2], "--max-replicas"),
    (["--min-replicas", 3, "--max-replicas", 2], "more than"),
    (["--gpus-per-replica", 1.5], "whole number"),
    (["--emit", "no/folder/serve.yaml"], "cannot be written"),
]


@pytest.mark.parametrize(("words", "message"), INVALID, ids=str)
def test_invalid_options_are_one_line_errors(bundle_path: Path, words: list[object], message: str) -> None:
    done = ray(bundle_path, "--emit", "serve.yaml", *words)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(Path.cwd().iterdir()) == []


def test_a_damaged_bundle_is_detected_before_writing(make_bundle: Any, tmp_path: Path) -> None:
    damaged = make_bundle(tmp_path / "damaged")
    (damaged / "labels.json").write_text("[]")
    assert "labels.json" in ray(damaged, "--emit", "serve.yaml").stderr
    assert not Path("serve.yaml").exists()


def test_without_ray_the_error_names_the_package(bundle_path: Path) -> None:
    """In a subprocess, independent of earlier imports of Ray."""
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from sopdeploy.cli.app import app\n"
        f"app(['ray', {str(bundle_path)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert 'pip install "sopdeploy[ray]"' in done.stderr


def test_a_flag_overrides_an_assignment(bundle_path: Path) -> None:
    words = ["serve", str(bundle_path), "--setting", "port=9001", "--print-config"]
    assert "port = 9001" in CliRunner().invoke(app, words).stdout.splitlines()
    flagged = emitted(bundle_path, "--setting", "port=9001", "--port", 9002)
    assert flagged["http_options"]["port"] == 9002
