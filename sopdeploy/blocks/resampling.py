"""Changing the size of a feature map with two small constant matrices: rows @ map @ columns.

Adaptive average pooling has no ONNX form at sizes that do not divide each other (28 to 8), and as
an up-sampler (8 to 14) it is not interpolation: windows straddle two source rows. As products
with constants both are exact, and every runtime has them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rows = Callable[[int, int], list[list[float]]]


def averaging_rows(size: int, target: int) -> list[list[float]]:
    """Return the (target, size) matrix of adaptive average pooling along one side.

    Row i averages from floor(i size / target) up to, not including, ceil((i + 1) size / target).
    """
    rows = []
    for i in range(target):
        start, stop = i * size // target, -(-(i + 1) * size // target)
        rows.append([1.0 / (stop - start) if start <= j < stop else 0.0 for j in range(size)])
    return rows


def nearest_rows(size: int, target: int) -> list[list[float]]:
    """Return the (target, size) matrix of nearest-neighbour sampling: row i takes floor(i size / target)."""
    return [[1.0 if j == i * size // target else 0.0 for j in range(size)] for i in range(target)]


def resample(x_BCHW: Tensor, height: int, width: int, rows: Rows) -> Tensor:
    """Return *x_BCHW* as (B, C, height, width), each side by the matrix that *rows* gives."""
    down = torch.tensor(rows(x_BCHW.shape[2], height), dtype=x_BCHW.dtype, device=x_BCHW.device)
    across = torch.tensor(rows(x_BCHW.shape[3], width), dtype=x_BCHW.dtype, device=x_BCHW.device)
    return down @ x_BCHW @ across.T
