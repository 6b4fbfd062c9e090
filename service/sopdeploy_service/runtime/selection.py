"""Choose the runtime of a bundle on this machine.

`auto` takes the first runtime that is set up here, and only that one: if the GPU was meant and does not work,
the server ends with an error instead of silently using the CPU.
"""

import logging

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError, SopdeployError, first_line
from sopdeploy.plugins import RUNTIMES
from sopdeploy_service.runtime.base import OpenRuntime, Runtime
from sopdeploy_service.runtime.onnxruntime import CudaOnnxRuntime, OnnxRuntime, has_cuda
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings

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
        if settings.runtime != "auto" or name == "onnxruntime-cpu":
            raise
        raise RuntimeUnavailableError(
            f"{name} is set up here but does not work: {error} "
            "(SOPDEPLOY_RUNTIME=onnxruntime-cpu would serve from the CPU)"
        ) from error


def _choose(bundle: Bundle, settings: Settings) -> tuple[str, str]:
    """Return the name of the first runtime that is set up here, and the reason."""
    if folders := TensorRTRuntime.usable_engines(bundle, settings):
        return "tensorrt", f"engines in {' and '.join(map(str, folders))}"
    if has_cuda():
        if bundle.manifest.precision == "int8":
            raise RuntimeUnavailableError(
                f"{bundle.path}: onnxruntime computes int8 on CUDA in float32; export the checkpoint in "
                "precision fp16, or build a TensorRT engine (sopdeploy engine)",
                remedies={"runtime": "onnxruntime-cuda"},
            )
        return "onnxruntime-cuda", "the bundle has no TensorRT engine that can be used here"
    return "onnxruntime-cpu", "ONNX Runtime has no CUDA here"


def _open(name: str, bundle: Bundle, settings: Settings) -> Runtime:
    if name == "openvino":
        return OpenVINORuntime(bundle, threads=settings.threads)
    if name == "onnxruntime-cpu":
        return OnnxRuntime(bundle, threads=settings.threads)
    if name == "onnxruntime-cuda":
        return CudaOnnxRuntime(bundle, threads=settings.threads)
    if name == "tensorrt":
        return TensorRTRuntime(bundle, settings)
    open_registered: OpenRuntime | None = RUNTIMES.find(name)
    if open_registered is None:
        raise RuntimeUnavailableError(f"runtime {name!r}: no installed package has it; choose another one")
    try:
        return open_registered(bundle, settings)
    except SopdeployError:
        raise
    except Exception as error:  # code of others
        reason = f"{name} cannot open {bundle.path} ({first_line(error)}); choose another runtime"
        raise RuntimeUnavailableError(reason) from error
