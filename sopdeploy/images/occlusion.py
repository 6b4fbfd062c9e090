"""Occlusion maps: the probability of a class that an image loses without one of its parts.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014: a gray
square covers one part of the image after the other. This works with every network, and needs
`IMAGES_PER_MAP` predictions.
"""

import numpy as np

from sopdeploy.images.preprocess import Pixels, Preprocess

GRID = 7  # rows and columns
IMAGES_PER_MAP = 1 + GRID**2  # the image itself and one copy per cell


def cell_slices(side: int, cell: int) -> tuple[slice, slice]:
    """Return the rows and columns of *cell*, counted row by row, in an image of *side* x *side* pixels."""
    bounds = np.linspace(0, side, GRID + 1).round().astype(int).tolist()
    row, column = divmod(cell, GRID)
    return slice(bounds[row], bounds[row + 1]), slice(bounds[column], bounds[column + 1])


def occlude(pixels: Pixels, rules: Preprocess) -> Pixels:
    """Copy *pixels* (S, S, 3), the network's input, for each cell, which gets the mean color of *rules*.

    Returns (GRID * GRID, S, S, 3), in the order of `cell_slices`.
    """
    copies = np.repeat(pixels[None], GRID**2, axis=0)
    for cell, copy in enumerate(copies):
        copy[cell_slices(len(pixels), cell)] = np.round(255 * np.array(rules.rgb_mean))
    return copies
