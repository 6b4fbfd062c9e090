"""CIFAR-10 and CIFAR-100: 50 000 + 10 000 colour pictures of 32 x 32 pixels.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). torchvision checks the
files against their published checksums before it reads them.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from sopdeploy.data.base import ArrayPictures, Split
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.frozen import Frozen

KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class CifarConfig(Frozen):
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
        ArrayPictures(tuple(part.classes), part.data, np.asarray(part.targets, dtype=np.int64))
        for part in parts
    )
    return Split(train=train, held_out=held_out)
