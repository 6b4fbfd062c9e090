"""Rule: resampling in GSoP's position block as fixed small products.

Algebra: adaptive averaging and nearest neighbour are linear along each side, so they are rows @ map @ columns
with constants of at most side x side numbers. The network computes them so already; the rule checks the
constants: averaging rows sum to 1 and no weight is negative, nearest rows are one-hot.
"""

import numpy as np

from sopdeploy.blocks.gsop_position import PositionAttention
from sopdeploy.blocks.resampling import averaging_rows, nearest_rows
from sopdeploy.errors import LoweringError
from sopdeploy_export.lowering.work import Work

NAME = "position block as fixed small products"


def apply(work: Work) -> None:
    """Check and write down the constants of every position block."""
    for where, part in work.parts(PositionAttention):
        side = part.switches.side
        height, width = work.calls[where].inputs[0].shape[2:]
        up = nearest_rows if part.switches.upsampling == "nearest" else averaging_rows
        constants = [
            averaging_rows(height, side),
            averaging_rows(width, side),
            up(side, height),
            up(side, width),
        ]
        for rows in constants:
            check_rows(where, np.array(rows))
        work.note(
            NAME,
            where,
            "rows of the constants are non-negative and sum to 1",
            f"{height} x {width} to {side} x {side} and back in 4 products; no adaptive pooling, no resize",
        )


def check_rows(where: str, rows: np.ndarray) -> None:
    """Refuse a matrix that is not one of averages."""
    if (rows < 0).any() or np.abs(rows.sum(axis=1) - 1).max() > 1e-12:
        raise LoweringError(f"{where}: a resampling matrix does not average")
