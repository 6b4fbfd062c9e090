"""A subset of the classes of any data set, such as the 250 classes of ImageNet in GSoP's Tables 3 and 4."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.data.base import Split, derive_seed
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import expand_user

SEED = 0  # not the seed of the run: the same number gives the same classes in every run


class ClassSubset(StrictModel):
    """Base class of data configs; `classes` is a number of classes to draw, or a file with one name per line.

    The classes keep their order.
    """

    classes: Annotated[int, pydantic.Field(ge=2)] | Path | None = None


def select_subset(split: Split, classes: int | Path | None) -> Split:
    """Keep the images of *classes*: a number to draw, or a file of names; `None` keeps all.

    Raises `DataError` for an unknown name, fewer than two names or more classes than the data have, and
    `ConfigError` if images have several classes.
    """
    if classes is None:
        return split
    if split.train.targets.ndim == 2:
        raise ConfigError("data.classes: not for several classes per image; remove it")
    labels = split.train.labels
    names = _draw(labels, classes) if isinstance(classes, int) else _read_names(expand_user(classes), labels)
    kept = tuple(label for label in labels if label in names)
    train, held_out = (_select_classes(images, kept) for images in (split.train, split.held_out))
    return replace(split, train=train, held_out=held_out)


def _select_classes(images: Any, labels: tuple[str, ...]) -> Any:
    """Keep the images of the classes *labels*, with targets in this order."""
    position = {label: index for index, label in enumerate(labels)}
    new = np.asarray([position.get(label, -1) for label in images.labels], dtype=np.int64)
    targets = new[images.targets.astype(np.int64)]
    return replace(images.select(targets >= 0), labels=labels, targets=targets[targets >= 0])


def _draw(labels: tuple[str, ...], count: int) -> set[str]:
    if count > len(labels):
        raise DataError(
            f"data.classes: {count}, but the data have {len(labels)} classes; give a smaller number"
        )
    return set(sorted(labels, key=lambda label: (derive_seed(SEED, "classes", label), label))[:count])


def _read_names(path: Path, labels: tuple[str, ...]) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"data.classes: {path}: cannot be read ({reason}); give one name per line") from error
    names = [name for line in lines if (name := line.strip())]
    unknown = next((name for name in names if name not in labels), None)
    if unknown is not None:
        raise DataError(f"{path}: {unknown!r} is no class of the data; write names such as {labels[0]!r}")
    if len(set(names)) < 2:
        raise DataError(f"{path}: names fewer than two classes; a classifier needs at least two")
    return set(names)
