"""The runtimes of this project; `auto` asks the last one first."""

from sopdeploy_service.runtime.base import OwnRuntime
from sopdeploy_service.runtime.onnxruntime import CudaOnnxRuntime, OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime

_CLASSES: tuple[type[OwnRuntime], ...] = (
    OnnxRuntime,
    OpenVINORuntime,
    CudaOnnxRuntime,
    TensorRTRuntime,
)
OWN = {runtime.setting: runtime for runtime in _CLASSES}
