"""A subset of the classes of any data set, such as the 250 classes of ImageNet in GSoP's Tables 3 and 4."""

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.data.base import Split, derive_seed
from sopdeploy.data.folders import Log
from sopdeploy.errors import ConfigError, DataError

_SEED = 0  # not the seed of the run: the same number gives the same classes in every run


class ClassSubset(StrictModel):
    """Base class of data configs; `classes` is the number of classes to draw. They keep their order."""

    classes: Annotated[int, pydantic.Field(ge=2)] | None = None


class DataSource(ClassSubset):
    """Base class of the options of a data source that a plug-in adds; the field `kind` is its name."""

    def open(self, log: Log) -> Split:
        """Open the training and held-out images; *log* receives warnings.

        Raises `DataError` if they cannot be used.
        """
        raise NotImplementedError


def select_subset(split: Split, classes: int | None) -> Split:
    """Keep the images of *classes* drawn classes; `None` keeps all.

    Raises `DataError` for more classes than the data have, `ConfigError` if images have several classes.
    """
    if classes is None:
        return split
    if split.train.targets.ndim == 2:
        raise ConfigError("data.classes: not for several classes per image; remove it")
    labels = split.train.labels
    if classes > len(labels):
        raise DataError(
            f"data.classes: {classes}, but the data have {len(labels)} classes; give a smaller number"
        )
    names = sorted(labels, key=lambda label: (derive_seed(_SEED, "classes", label), label))[:classes]
    kept = tuple(label for label in labels if label in names)
    train, held_out = (_select_classes(images, kept) for images in (split.train, split.held_out))
    return replace(split, train=train, held_out=held_out)


def _select_classes(images: Any, labels: tuple[str, ...]) -> Any:
    """Keep the images of the classes *labels*, with targets in this order."""
    position = {label: index for index, label in enumerate(labels)}
    new = np.asarray([position.get(label, -1) for label in images.labels], dtype=np.int64)
    targets = new[images.targets.astype(np.int64)]
    return replace(images.select(targets >= 0), labels=labels, targets=targets[targets >= 0])
