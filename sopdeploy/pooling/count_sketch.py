"""The count sketch: a random projection that adds each channel, with a random sign, to a random place.

Paper: Pham and Pagh, "Fast and Scalable Polynomial Kernels via Explicit Feature Maps" (KDD 2013). The
draws are part of the network, though not of its weights: they follow from the seed alone.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor


class Sketch(NamedTuple):
    """h, the place (0 .. dim - 1) of each channel, and s, its sign; lists of length C."""

    places: list[int]
    signs: list[float]


def draw_sketches(count: int, channels: int, dim: int, seed: int) -> list[Sketch]:
    """Return *count* independent sketches.

    Python's own generator keeps its sequence for a seed across versions and machines, torch's does not.
    """
    generator = random.Random(seed)  # noqa: S311 (a projection, not a secret)
    return [
        Sketch(
            [int(generator.random() * dim) for _ in range(channels)],
            [1.0 if generator.random() < 0.5 else -1.0 for _ in range(channels)],
        )
        for _ in range(count)
    ]


def sketched(x_BMC: Tensor, places_C: Tensor, signs_C: Tensor, dim: int) -> Tensor:
    """Return the sketch (B, M, dim) of features (B, M, C)."""
    empty_BMD = x_BMC.new_zeros(*x_BMC.shape[:2], dim)
    return torch.index_add(empty_BMD, 2, places_C, x_BMC * signs_C)
