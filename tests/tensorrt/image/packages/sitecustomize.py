"""Python imports this module at its start: the image has no packages for training and export."""

import sys

sys.modules.update(dict.fromkeys(["torch", "torchvision", "timm", "onnxscript", "sklearn"]))
