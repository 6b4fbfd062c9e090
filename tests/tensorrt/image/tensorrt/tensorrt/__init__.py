"""TensorRT, simulated."""

import sys

from tests.tensorrt.fake_tensorrt import FakeTensorRT

sys.modules[__name__] = FakeTensorRT("11.1")
