"""Several views of one picture, whose answers are averaged: test-time augmentation. No torch here.

"ten-crop" is that of Krizhevsky et al. (NIPS 2012), section 4.1: the four corners and the centre of the
central square, as they are and mirrored.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess

Views = Literal["none", "flip", "ten-crop"]
Pixels = NDArray[np.uint8]


def check_views(wish: str, preprocess: Preprocess) -> Views:
    """Return *wish*; raises `ConfigError` where there are no such views of what *preprocess* makes."""
    known: dict[str, Views] = {name: name for name in get_args(Views)}
    if wish not in known:
        raise ConfigError(f"--tta {wish}: none of {', '.join(known)}")
    if wish == "ten-crop" and preprocess.crop == preprocess.resize:
        raise ConfigError(
            f"--tta ten-crop: pictures are resized to {preprocess.resize} and cropped to the same, "
            "so there are no corners to cut; use --tta flip"
        )
    return known[wish]


def views(prepare: Callable[[Preprocess], Pixels], preprocess: Preprocess, wish: Views) -> Pixels:
    """Return the views (V, crop, crop, 3) uint8 of the picture of *prepare*; the first is the plain one."""
    centre = prepare(preprocess)
    if wish == "none":
        return centre[None]
    found = [centre]
    if wish == "ten-crop":
        side, crop = preprocess.resize, preprocess.crop
        square = prepare(preprocess.model_copy(update={"crop": side}))
        ends = (slice(0, crop), slice(side - crop, side))
        found += [square[rows, columns] for rows in ends for columns in ends]
    return np.stack([*found, *(view[:, ::-1] for view in found)])
