"""A simulated GPU and TensorRT of each release."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from sopdeploy.bundle.folder import Bundle
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import VERSIONS, FakeTensorRT
from tests.tensorrt.networks import write

Install = Callable[..., FakeTensorRT]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Install:
    """`install("10.16")` simulates an installed TensorRT 10.16."""

    def put(version: str = "10.16", *faults: str) -> FakeTensorRT:
        fake = FakeTensorRT(version)
        fake._faults.update(faults)
        fake.__spec__ = ModuleSpec("tensorrt", None)  # torch asks for it
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        return fake

    return put


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, install: Install) -> FakeTensorRT:
    """Every TensorRT release in turn."""
    return install(request.param)
