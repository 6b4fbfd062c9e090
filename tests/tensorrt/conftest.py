"""A simulated GPU and a simulated TensorRT."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from sopdeploy.bundle.folder import Bundle
from tests.support.gpu_graphs import ABSENT, real_tensorrt
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import write

Install = Callable[..., FakeTensorRT]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path)


def simulate(monkeypatch: pytest.MonkeyPatch, version: str, *faults: str) -> FakeTensorRT:
    """Install TensorRT *version* until the end of *monkeypatch*."""
    if real_tensorrt() is None:
        pytest.skip(ABSENT)
    fake = FakeTensorRT(version)
    fake._faults.update(faults)
    fake.__spec__ = ModuleSpec("tensorrt", None)  # torch asks for it
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Install:
    """`install("11.4")` simulates an installed TensorRT 11.4."""
    return lambda version="11.1", *faults: simulate(monkeypatch, version, *faults)


@pytest.fixture
def trt(install: Install) -> FakeTensorRT:
    return install()
