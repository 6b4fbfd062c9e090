"""Random numbers for a part of a batch: drawn for the whole batch, cut to the rows that are here.

Processes that start a step from the same seed and draw for the same whole batch give each sample the same
numbers, however many of them share the batch.
"""

from collections.abc import Callable

from torch import Tensor, nn


class Rows:
    """Which rows of a step's batch are computed here: from `start`, of `total`; `None` is all of them.

    One object is shared by everything in a network that draws, and set before each forward.
    """

    start: int = 0
    total: int | None = None

    def draw(self, like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """Return numbers for the rows of *like*, of its shape, dtype and device; *fill* draws in place."""
        total = len(like) if self.total is None else self.total
        return fill(like.new_empty((total, *like.shape[1:])))[self.start : self.start + len(like)]


class RowsDropout(nn.Dropout):
    """Dropout whose mask is drawn for the whole batch."""

    def __init__(self, p: float, rows: Rows) -> None:
        super().__init__(p)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Return *x* with a share p of its numbers 0 and the others larger, in train mode."""
        if not self.training or self.p == 0:
            return x
        kept = self.rows.draw(x.detach(), lambda mask: mask.bernoulli_(1 - self.p))
        return x * kept.div_(1 - self.p)
