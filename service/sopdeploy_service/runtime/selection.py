"""Choose the runtime of a bundle on this machine.

`auto` takes the first runtime that is set up here, and only that one: if the GPU was meant and does not work,
the server ends with an error instead of silently using the CPU. On the CPU, `auto` takes OpenVINO if it is
installed and measured to be faster than ONNX Runtime, which has no bfloat16 convolutions.
"""

import logging
from functools import partial
from importlib.util import find_spec
from typing import Any

from sopdeploy.bundle.folder import Bundle
from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.fastest import fastest
from sopdeploy_service.runtime.onnxruntime import CUDA, OnnxRuntime, cuda_options, has_cuda
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.settings import Settings

ON_CPU = ("onnxruntime-cpu", "openvino")
TENSORRT = "sopdeploy_service.runtime.tensorrt"  # optional: a service without it uses ONNX Runtime

log = logging.getLogger("sopdeploy.service")


def open_runtime(bundle: Bundle, settings: Settings) -> Runtime:
    """Open the runtime that *settings* name, or for `auto` the first one that is set up here.

    Raises `RuntimeUnavailableError` if the runtime cannot run *bundle*.
    """
    name: str = settings.runtime
    if name == "auto":
        name, reason = _choose(bundle, settings)
        log.info("%s: runtime %s: %s", bundle.name, name, reason)
    try:
        return _open(name, bundle, settings)
    except RuntimeUnavailableError as error:
        if settings.runtime != "auto" or name in ON_CPU:
            raise
        raise RuntimeUnavailableError(
            f"{name} is set up here but does not work: {error} "
            "(SOPDEPLOY_RUNTIME=onnxruntime-cpu would serve from the CPU)"
        ) from error


def _choose(bundle: Bundle, settings: Settings) -> tuple[str, str]:
    """Return the name of the first runtime that is set up here, and the reason."""
    if find_spec(TENSORRT) and (folders := _tensorrt().usable_engines(bundle, settings)):
        return "tensorrt", f"engines in {' and '.join(map(str, folders))}"
    if has_cuda():
        return "onnxruntime-cuda", "the bundle has no TensorRT engine that can be used here"
    if find_spec("openvino") is None:
        return "onnxruntime-cpu", "ONNX Runtime has no CUDA here, and OpenVINO is not installed"
    if bundle.manifest.precision == "bf16-backbone":
        return "openvino", "ONNX Runtime has no convolutions in bfloat16 for CPUs"
    return fastest(bundle, settings, {name: partial(_open, name, bundle, settings) for name in ON_CPU})


def _open(name: str, bundle: Bundle, settings: Settings) -> Runtime:
    if name == "tensorrt":
        runtime: Runtime = _tensorrt().TensorRTRuntime(bundle, settings)
        return runtime
    if name == "openvino":
        return OpenVINORuntime(bundle, threads=settings.threads)
    if name == "onnxruntime-cuda":
        options = cuda_options(bundle.manifest.precision)
        return OnnxRuntime(bundle, threads=settings.threads, provider=CUDA, options=options)
    return OnnxRuntime(bundle, threads=settings.threads)


def _tensorrt() -> Any:
    return import_optional(TENSORRT, "TensorRT", "sopdeploy[tensorrt]", RuntimeUnavailableError)
