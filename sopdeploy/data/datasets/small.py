"""CIFAR-10 and CIFAR-100: 50 000 + 10 000 colour pictures of 32 x 32 pixels.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). torchvision checks the
files against their published checksums before it reads them.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100

from sopdeploy.config import StrictModel
from sopdeploy.data.base import ArrayImages, Split, hold_out
from sopdeploy.errors import ConfigError, DataError

KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class CifarConfig(StrictModel):
    """`path` is the folder that holds `cifar-10-batches-py` or `cifar-100-python`."""

    kind: Literal["cifar10", "cifar100"]
    path: Path | None = None


def open_cifar(config: CifarConfig) -> Split:
    """Return the official training and test pictures; raises `DataError` where they do not lie there."""
    official = KINDS[config.kind]
    if config.path is None:
        raise ConfigError(f"data.path: not set; give the folder that holds {official.base_folder}")
    root = config.path.expanduser()
    try:
        parts = [official(root=str(root), train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as problem:
        raise DataError(
            f"{root}: holds no complete {official.base_folder}; unpack {official.url} there"
        ) from problem
    train, held_out = (
        ArrayImages(tuple(part.classes), part.data, np.asarray(part.targets, dtype=np.int64))
        for part in parts
    )
    return Split(train=train, held_out=held_out)


BRIGHTEST = 16.0  # the data set counts ink in 0..16
HELD_OUT = 0.2
SEED = 0  # of the split, not of the run: runs with other seeds are measured on the same pictures


class DigitsConfig(StrictModel):
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
        train=ArrayImages(labels, images[~held], targets[~held]),
        held_out=ArrayImages(labels, images[held], targets[held]),
    )
