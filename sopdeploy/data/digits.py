"""The digits of scikit-learn: 1797 handwritten digits of 8 x 8 pixels, no download.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998).
"""

from typing import Literal

import numpy as np
from sklearn.datasets import load_digits

from sopdeploy.data.base import ArrayPictures, Split, hold_out
from sopdeploy.frozen import Frozen

BRIGHTEST = 16.0  # the data set counts ink in 0..16
HELD_OUT = 0.2
SEED = 0  # of the split, not of the run: runs with other seeds are measured on the same pictures


class DigitsConfig(Frozen):
    """The digits need no settings; the preprocessing enlarges them."""

    kind: Literal["digits"]


def open_digits() -> Split:
    """Return the digits as 8 x 8 grey pictures, one fifth of every class held out."""
    stored = load_digits()
    images = np.rint(stored.images * (255.0 / BRIGHTEST)).astype(np.uint8)
    targets = stored.target.astype(np.int64)
    labels = tuple(str(digit) for digit in range(10))
    keys = [str(index) for index in range(len(targets))]
    held = np.asarray(hold_out(keys, targets.tolist(), HELD_OUT, SEED))
    return Split(
        train=ArrayPictures(labels, images[~held], targets[~held]),
        held_out=ArrayPictures(labels, images[held], targets[held]),
    )
