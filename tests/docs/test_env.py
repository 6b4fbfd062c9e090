"""`sopdeploy env` shows what a bug report needs and hides secrets."""

from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.cli import env
from sopdeploy.cli.app import app

SECRETS = [
    "SOPDEPLOY_API_KEY", "SOPDEPLOY_KEYS", "OTEL_EXPORTER_OTLP_HEADERS", "CUDA_TOKEN", "TORCH_PASSWORD",
    "ORT_client_secret", "SLURM_Auth", "NCCL_CREDENTIALS",
]  # fmt: skip
WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=20)


@given(st.sampled_from(SECRETS), WORD)
def test_values_of_secret_variables_are_hidden(name: str, secret: str) -> None:
    assert env.relevant_variables({name: secret}) == {name: "(hidden)"}


@given(WORD, WORD)
def test_logins_in_urls_are_hidden(user: str, password: str) -> None:
    for separator in ("", "@"):  # programs take the text before the last @ as the login
        url = f"https://{user}:{separator}{password}@collector.example:4318/v1"
        assert env.relevant_variables({"OTEL_EXPORTER_OTLP_ENDPOINT": url}) == {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://(hidden)@collector.example:4318/v1"
        }


def test_only_relevant_variables_are_shown_and_the_home_folder_is_shortened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/people/ada"))
    variables = {
        **{"SOPDEPLOY_PORT": "1", "OMP_NUM_THREADS": "4"},
        **{"AWS_REGION": "x", "PYTHONPATH": "/people/ada/src"},
    }
    expected = {"OMP_NUM_THREADS": "4", "PYTHONPATH": "~/src", "SOPDEPLOY_PORT": "1"}
    assert env.relevant_variables(variables) == expected


def test_all_sections_are_printed() -> None:
    found = CliRunner(env={"SOPDEPLOY_TOKEN": "abc123"}).invoke(app, ["env"])
    assert (found.exit_code, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    sections = [line for line in lines if line[0] != " "]
    assert sections == ["versions", "machine", "accelerators", "plug-ins", "environment"]
    values = dict(line.split(maxsplit=1) for line in lines if line[0] == " ")
    assert values["sopdeploy"] == sopdeploy.__version__
    assert {"python", "numpy", "pydantic", "processor", "cores", "system", "release"} <= set(values)
    assert {"onnxruntime", "tensorrt"} <= set(values)
    assert values["SOPDEPLOY_TOKEN"] == "(hidden)"
    assert "abc123" not in found.stdout


def test_the_tensorrt_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def gpu(self) -> "Cuda":
            return self

        name = "NVIDIA H200"

    trt = ModuleType("tensorrt")
    trt.__version__ = "11.4.0"
    monkeypatch.setattr("sopdeploy.tensorrt.binding.import_tensorrt", lambda: trt)
    monkeypatch.setattr("sopdeploy.tensorrt.cuda.open_cuda", Cuda)
    assert env.accelerators()["tensorrt"] == "11.4.0 on NVIDIA H200"
