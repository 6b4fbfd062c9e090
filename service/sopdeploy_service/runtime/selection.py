"""Choose the runtime of a bundle on this machine.

`auto` takes the first runtime that is set up here, and only that one: if the GPU was meant and does not work,
the server ends with an error instead of silently using the CPU.
"""

from importlib.util import find_spec
from typing import Any

from sopdeploy.bundle.folder import Bundle
from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import (
    CPU,
    CUDA,
    CUDA_OPTIONS,
    OnnxRuntime,
    has_cuda,
)
from sopdeploy_service.settings import Settings

TENSORRT = "sopdeploy_service.runtime.tensorrt"  # optional: a service without it uses ONNX Runtime


def open_runtime(bundle: Bundle, settings: Settings) -> Runtime:
    """Open the runtime that *settings* name, or for `auto` the first one that is set up here.

    Raises `RuntimeUnavailableError` if the runtime cannot run *bundle*.
    """
    name: str = settings.runtime
    if name == "auto" and find_spec(TENSORRT) and _tensorrt().is_set_up(bundle, settings):
        name = "tensorrt"
    elif name == "auto":
        name = "onnxruntime-cuda" if has_cuda() else "onnxruntime-cpu"
    provider = CUDA if name == "onnxruntime-cuda" else CPU
    try:
        if name == "tensorrt":
            runtime: Runtime = _tensorrt().TensorRTRuntime(bundle, settings)
            return runtime
        options = CUDA_OPTIONS if provider == CUDA else {}
        return OnnxRuntime(bundle, threads=settings.threads, provider=provider, options=options)
    except RuntimeUnavailableError as error:
        if settings.runtime != "auto" or name == "onnxruntime-cpu":
            raise
        raise RuntimeUnavailableError(
            f"{name} is set up here but does not work: {error} "
            "(SOPDEPLOY_RUNTIME=onnxruntime-cpu would serve from the CPU)"
        ) from error


def _tensorrt() -> Any:
    return import_optional(TENSORRT, "TensorRT", "sopdeploy[tensorrt]", RuntimeUnavailableError)
