"""Fail the build of an image that holds what only training and export need."""

import importlib.util
import sys

UNWANTED = ("torch", "torchvision", "timm", "onnx", "onnxscript", "sklearn")

if __name__ == "__main__":
    found = [name for name in UNWANTED if importlib.util.find_spec(name)]
    sys.exit(f"an image of the server must not hold {', '.join(found)}" if found else 0)
