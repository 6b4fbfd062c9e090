"""`sopdeploy env`: all that a report of a bug needs, and no secret."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.cli import env as environment
from sopdeploy.cli.app import app
from sopdeploy.errors import RuntimeUnavailableError

SECRETS = [
    "SOPDEPLOY_API_KEY", "SOPDEPLOY_KEYS", "OTEL_EXPORTER_OTLP_HEADERS", "CUDA_TOKEN", "TORCH_PASSWORD",
    "ORT_client_secret", "SLURM_Auth", "NCCL_CREDENTIALS",
]  # fmt: skip
WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=20)


@given(st.sampled_from(SECRETS), WORD)
def test_no_secret_is_shown(name: str, secret: str) -> None:
    assert environment.shown({name: secret}) == {name: "(hidden)"}


@given(WORD, WORD)
def test_no_login_of_a_url_is_shown(user: str, password: str) -> None:
    url = f"https://{user}:{password}@collector.example:4318/v1"
    assert environment.shown({"OTEL_EXPORTER_OTLP_ENDPOINT": url}) == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://(hidden)@collector.example:4318/v1"
    }


def test_only_what_matters_is_shown_and_no_name_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/people/ada"))
    given = {
        "OMP_NUM_THREADS": "4",
        "AWS_REGION": "x",
        "PYTHONPATH": "/people/ada/src",
        "SOPDEPLOY_PORT": "1",
    }
    expected = {"OMP_NUM_THREADS": "4", "PYTHONPATH": "~/src", "SOPDEPLOY_PORT": "1"}
    assert environment.shown(given) == expected


def test_versions_machine_accelerators_and_environment_are_there() -> None:
    found = CliRunner(env={"SOPDEPLOY_TOKEN": "abc123"}).invoke(app, ["env", "--json"])
    assert (found.exit_code, found.stderr) == (0, "")
    told = json.loads(found.stdout)
    assert list(told) == ["versions", "machine", "accelerators", "environment"]
    assert told["versions"]["sopdeploy"] == sopdeploy.__version__
    assert {"python", "numpy", "pydantic"} <= set(told["versions"])
    assert {"processor", "cores", "system", "release"} <= set(told["machine"])
    assert set(told["accelerators"]) == {"onnxruntime", "tensorrt"}
    assert told["environment"]["SOPDEPLOY_TOKEN"] == "(hidden)"
    assert "abc123" not in CliRunner(env={"SOPDEPLOY_TOKEN": "abc123"}).invoke(app, ["env"]).stdout


def test_what_is_not_installed_is_told_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    def missing() -> ModuleType:
        raise RuntimeUnavailableError("TensorRT is not installed")

    monkeypatch.setattr("sopdeploy.tensorrt.binding.import_tensorrt", missing)
    assert environment.onnxruntime_sees().startswith("none (")
    assert environment.tensorrt_sees() == "none (TensorRT is not installed)"


def test_the_gpu_that_tensorrt_would_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def gpu(self) -> "Cuda":
            return self

        name = "NVIDIA H200"

    trt = ModuleType("tensorrt")
    trt.__version__ = "10.16.1"
    monkeypatch.setattr("sopdeploy.tensorrt.binding.import_tensorrt", lambda: trt)
    monkeypatch.setattr("sopdeploy.tensorrt.cuda.open_cuda", Cuda)
    assert environment.tensorrt_sees() == "10.16.1 on NVIDIA H200"
