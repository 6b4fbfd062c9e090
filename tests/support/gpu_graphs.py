"""Exported graphs as GPU runtimes receive them, checked without a GPU.

TensorRT: our cast of images, parser call and strongly typed build with TensorRT-RTX, a sibling
of TensorRT whose builder needs no driver. It proves that a graph parses, is typed correctly and
builds; not tactics or numbers. ONNX Runtime: its CUDA provider opens the graph, leaves no
operator to the CPU, and copies nothing between GPU and CPU inside the graph; see
tests/cuda/build.py. A graph in float32 is also opened with the options of fp16.
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import onnx
import pytest

from tests.cuda.stand_in import ABSENT as NOT_HERE
from tests.cuda.stand_in import installed, opened

WORKSPACE = 1 << 32  # bytes
ABSENT = "tensorrt-rtx-cu13 is not installed (it exists for Linux on x86-64)"


class RealTensorRT(ModuleType):
    """TensorRT-RTX in the place of TensorRT 11; its builder compiles for a GPU that is not here."""

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self._rtx = rtx = importlib.import_module("tensorrt_rtx")
        self.__version__ = "11.0.0"

        class Builder(rtx.Builder):
            def create_builder_config(self) -> Any:
                config = super().create_builder_config()
                config.num_compute_capabilities = 1
                assert config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
                return config

            def __del__(self) -> None:
                """Replace the one of TensorRT, which only warns that it is deprecated."""

        self.Builder = Builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rtx, name)


PACKAGES = ("tensorrt_rtx", "sopdeploy_commands.engine_builder")
BUILDS = all(map(importlib.util.find_spec, PACKAGES))
with_a_runtime = pytest.mark.skipif(
    not BUILDS and not installed(), reason=f"{ABSENT}; {NOT_HERE}"
)


@functools.cache
def real_tensorrt() -> RealTensorRT | None:
    """Return the real builder; None where its package does not exist."""
    return RealTensorRT() if BUILDS else None


def accepted(model: onnx.ModelProto, precision: str) -> None:
    """Assert that every GPU runtime that is installed accepts *model*."""
    built(model, precision)
    for options in ("fp32", "fp16") if precision == "fp32" else (precision,):
        answer = opened(model, options)
        assert answer in {"ok", NOT_HERE}, answer


def built(model: onnx.ModelProto, precision: str) -> None:
    """Build the plan of *model* with our own code."""
    trt = real_tensorrt()
    if trt is None:
        return
    from sopdeploy_commands.engine_builder.build import cast_images_first, parse_and_build
    from sopdeploy_service.runtime.tensorrt_cache import Profile

    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    profiles = (Profile(minimum=fixed or 1, maximum=fixed or 3),)
    assert parse_and_build(
        trt, cast_images_first(model).SerializeToString(), profiles, WORKSPACE, lambda _: None
    )
