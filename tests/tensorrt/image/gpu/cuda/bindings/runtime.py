"""A GPU, simulated."""

import sys

from tests.tensorrt.fake_cuda import FakeCuda

sys.modules[__name__] = FakeCuda()
