"""Second-order statistics are taken in float32 at least, whatever autocast says.

A product of features with themselves leaves the range of float16 and drops most of what bfloat16 can
tell apart, and the matrix square root after it multiplies the error.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return *x*, a half-precision tensor widened to float32."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which operations on the device of *x* keep the type of their operands.

    Where autocast is off it does nothing, so that an exported program holds no trace of it.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
