"""Fail the build of an image that contains packages for training and export."""

import importlib.util
import sys

UNWANTED = ("torch", "torchvision", "timm", "onnx", "onnxscript", "sklearn")

if __name__ == "__main__":
    unwanted = [name for name in UNWANTED if importlib.util.find_spec(name)]
    sys.exit(f"the server image must not contain {', '.join(unwanted)}" if unwanted else 0)
