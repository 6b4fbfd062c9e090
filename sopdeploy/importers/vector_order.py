"""The order of a covariance's triangle: row by row here, column by column in MatConvNet and GSoP.

Letters: d channels, i <= j. Here (0,0), (0,1) .. (0,d-1), (1,1) ..; there (0,0), (0,1), (1,1), (0,2) ..:
element (i, j) stands at j (j + 1) / 2 + i. fast-MPN-COV has the order of here.
"""

import math

import torch
from torch import Tensor


def column_positions(channels: int) -> Tensor:
    """Return where each element of the row-wise order stands in the column-wise one, int64."""
    rows, columns = torch.triu_indices(channels, channels)
    position: Tensor = columns * (columns + 1) // 2 + rows
    return position


def triangle_side(length: int) -> int | None:
    """Return d for a *length* of d (d + 1) / 2, else `None`."""
    side = (math.isqrt(8 * length + 1) - 1) // 2
    return side if side > 0 and side * (side + 1) // 2 == length else None
