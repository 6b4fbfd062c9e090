"""What is known of the processes that share a piece of work: which one this is, and how to add up."""

from typing import Protocol

from torch import Tensor


class Processes(Protocol):
    """The processes that share a piece of work; `rank` counts from 0 to `world` - 1."""

    rank: int
    world: int

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of *values* over the processes."""


class OneProcess:
    """Nobody to share with."""

    rank = 0
    world = 1

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return *values*."""
        return values
