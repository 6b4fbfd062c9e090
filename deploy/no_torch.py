"""Fail the build of an image that contains packages for training and export.

`sopdeploy engine` needs onnx, so it is allowed beside TensorRT.
"""

import importlib.util
import sys

UNWANTED = {"torch", "torchvision", "timm", "onnx", "onnxscript", "sklearn"}

if __name__ == "__main__":
    allowed = {"onnx"} if importlib.util.find_spec("tensorrt") else set()
    unwanted = [name for name in sorted(UNWANTED - allowed) if importlib.util.find_spec(name)]
    sys.exit(f"the server image must not contain {', '.join(unwanted)}" if unwanted else 0)
