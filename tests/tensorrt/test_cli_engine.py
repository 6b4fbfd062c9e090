"""The command `sopdeploy engine`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sopdeploy.bundle.folder import Bundle
from sopdeploy.cli.app import app
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import network, write

Install = Callable[..., FakeTensorRT]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["engine", *map(str, arguments)])


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TensorRT, no cuda-python."""
    for name in ("tensorrt", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)


def one_line(found: Result) -> str:
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1
    return found.stderr


def test_the_dry_run_needs_no_tensorrt(nothing: None, bundle: Bundle) -> None:
    found = run(bundle.path, "--dry-run", "--profiles", "1,8")
    assert found.exit_code == 0, found.stderr
    assert "batches 1, 2-8" in found.stdout
    assert "MiB without workspace" in found.stdout
    assert "TensorRT 8.6.1: " in found.stdout
    assert "rewritten from opset 18 to 17" in found.stdout
    assert "key       not known: TensorRT is not installed" in found.stdout


def test_the_dry_run_prints_json(nothing: None, bundle: Bundle) -> None:
    planned = json.loads(run(bundle.path, "--dry-run", "--json").stdout)
    releases = ["8.6.1", "10.0.1", "10.16.0", "11.0.0", "11.1.0"]
    assert [lint["tensorrt"] for lint in planned["lint"]] == releases
    assert (planned["key"], planned["precision"]) == (None, "fp32")
    assert [p["maximum"] for p in planned["profiles"]] == [1, 4, 16]
    assert planned["memory"]["weights"] > 0


def test_the_dry_run_computes_the_key_of_the_build(install: Install, bundle: Bundle) -> None:
    trt = install()
    planned = json.loads(run(bundle.path, "--dry-run", "--json").stdout)
    assert trt._builds == 0
    built = json.loads(run(bundle.path, "--json").stdout)
    assert Path(built["plan"]).stem == planned["key"]
    assert [lint["tensorrt"] for lint in planned["lint"]] == ["10.16.0"]


@pytest.mark.usefixtures("nothing")
def test_the_dry_run_rejects_what_the_build_rejects(bundle: Bundle, tmp_path: Path) -> None:
    message = "fp16 was requested but the graph is fp32"
    assert message in one_line(run(bundle.path, "--dry-run", "--precision", "fp16"))
    assert "--profiles 1,99" in one_line(run(bundle.path, "--dry-run", "--profiles", "1,99"))
    fixed = write(tmp_path / "fixed", network(batch=1), probes=1)
    assert "fixes the batch of images to 1" in one_line(run(fixed.path, "--dry-run"))


def test_a_build_is_logged_and_summarized_and_the_second_comes_from_the_cache(
    trt: FakeTensorRT, bundle: Bundle
) -> None:
    first = run(bundle.path)
    assert (first.exit_code, first.stderr[:34]) == (0, "building: no engine of this bundle")
    assert "built     no engine of this bundle was built here yet" in first.stdout
    assert "precision second order: asked fp32; layers: fp32 in 3" in first.stdout
    assert "probes    batch 16: logits deviates by" in first.stdout
    assert "built     no, it was in the cache" in run(bundle.path).stdout
    assert "--rebuild was given" in run(bundle.path, "--rebuild").stdout
    assert trt._builds == 2


def test_without_tensorrt_or_a_gpu_the_error_is_one_line(
    install: Install, bundle: Bundle, cuda: Any, request: pytest.FixtureRequest
) -> None:
    install()
    cuda.gpus = None
    message = "no NVIDIA GPU can be used here (CUDA: cudaGetDeviceCount failed"
    assert message in one_line(run(bundle.path))
    request.getfixturevalue("nothing")
    assert "TensorRT is not installed; run: pip install" in one_line(run(bundle.path))
