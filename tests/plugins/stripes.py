"""A data source of a plug-in: synthetic images of horizontal and vertical stripes."""

from typing import Literal

import numpy as np
import pydantic

from sopdeploy.data.photos.files import Log
from sopdeploy.data.photos.photo import ArrayImages, Split
from sopdeploy.data.sources import DataSource


class StripesConfig(DataSource):
    """`count` is the number of training images of each class."""

    kind: Literal["stripes"]
    count: int = pydantic.Field(default=64, ge=2)

    def open(self, log: Log) -> Split:
        """Draw the training images and a quarter as many held-out ones."""
        return Split(train=draw(self.count, 0), held_out=draw(-(-self.count // 4), 1))


def draw(count: int, seed: int) -> ArrayImages:
    """Draw *count* images (16, 16) of each class."""
    rows = np.random.default_rng(seed).integers(0, 256, (2 * count, 16, 1), dtype=np.uint8)
    horizontal = rows[:count].repeat(16, axis=2)
    vertical = rows[count:].repeat(16, axis=2).transpose(0, 2, 1)
    targets = np.repeat(np.arange(2), count)
    return ArrayImages(
        ("horizontal", "vertical"), np.concatenate([horizontal, vertical]), targets
    )
