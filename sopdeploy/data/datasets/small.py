"""Small datasets: CIFAR-10, CIFAR-100 and the scikit-learn digits.

Source of CIFAR: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). torchvision
verifies the published checksums of its files before reading them. Both libraries are imported when a dataset
is opened, because their import takes seconds and every command that reads a recipe would wait for it.
"""

import importlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sopdeploy.data.base import ArrayImages, ClassSubset, Split, hold_out
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import expand_user

MAX_DIGIT_VALUE = 16.0  # of a pixel in scikit-learn's digits
DIGITS_HELD_OUT = 0.2
DIGITS_SEED = 0  # not the seed of the run: all runs are evaluated on the same images


class CifarConfig(ClassSubset):
    """`path` is the folder that holds `cifar-10-batches-py` or `cifar-100-python`."""

    kind: Literal["cifar10", "cifar100"]
    path: Path | None = None


class DigitsConfig(ClassSubset):
    """The digits of scikit-learn; only the subset of classes can be set."""

    kind: Literal["digits"]


def cifar_class(kind: str) -> Any:
    """Import torchvision's class for *kind*: "cifar10" or "cifar100"."""
    return getattr(importlib.import_module("torchvision.datasets"), kind.upper())


def open_cifar(config: CifarConfig) -> Split:
    """Open the official training and test images; raises `DataError` if the files are not complete."""
    dataset = cifar_class(config.kind)
    if config.path is None:
        raise ConfigError(f"data.path: not set; give the folder that holds {dataset.base_folder}")
    root = expand_user(config.path)
    try:
        parts = [dataset(root=str(root), train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root}: holds no complete {dataset.base_folder}; unpack {dataset.url} there"
        ) from error
    train, held_out = (
        ArrayImages(tuple(part.classes), part.data, np.asarray(part.targets, dtype=np.int64))
        for part in parts
    )
    return Split(train=train, held_out=held_out)


def open_digits() -> Split:
    """Open the digits as 8 x 8 gray images; one fifth of every class is held out."""
    dataset = importlib.import_module("sklearn.datasets").load_digits()
    images = np.rint(dataset.images * (255.0 / MAX_DIGIT_VALUE)).astype(np.uint8)
    targets = dataset.target.astype(np.int64)
    labels = tuple(str(digit) for digit in range(10))
    keys = [str(index) for index in range(len(targets))]
    mask = hold_out(keys, targets, DIGITS_HELD_OUT, DIGITS_SEED)
    digits = ArrayImages(labels, images, targets)
    return Split(train=digits.select(~mask), held_out=digits.select(mask))
