"""The folders of a data set that hold its training and its held-out images, recognized by their names.

Any case is accepted, and the usual affixes: `Training/`, `Val/`, `seg_train/seg_train/`, `test_set/`.
"""

import re
from typing import Any, NamedTuple

from sopdeploy.errors import DataError, shorten

TRAIN = "train"
TRAINING = (TRAIN, "training")
HELD_OUT = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")  # in this order
AFFIXES = {"set", "seg", "data", "images", "photos", "split"}


class Parts(NamedTuple):
    """Names of folders: that of the training images (empty if there is none), held-out ones, best first.

    `others` are neither; they are not read if there is a training folder.
    """

    train: str
    held_out: tuple[str, ...]
    others: tuple[str, ...]


def part_kind(name: str) -> str:
    """Find the usual name that the folder *name* stands for, one of `TRAINING` or `HELD_OUT`, or ""."""
    words = [word for word in re.split(r"[\s_.-]+", name.lower()) if word and word not in AFFIXES]
    known = words[0].removesuffix("set") if len(words) == 1 else ""
    return known if known in TRAINING or known in HELD_OUT else ""


def find_parts(store: Any) -> Parts:
    """Find the parts of *store*, a `FileStore`; raises `DataError` for two folders of training images.

    A folder that has the name of a part next to classes, but no folders in it, is a class.
    """
    names = store.folders()
    kinds = {name: part_kind(name) for name in names}
    only_parts = all(kinds.values())
    training = [
        name for name in names if kinds[name] in TRAINING and (only_parts or has_folders(store, name))
    ]
    if len(training) > 1:
        raise DataError(
            f"{store.root}: {shorten(training)} may all hold the training images; rename all but one"
        )
    held_out = sorted(
        (name for name in names if kinds[name] in HELD_OUT), key=lambda name: HELD_OUT.index(kinds[name])
    )
    train = training[0] if training else ""
    return Parts(train, tuple(held_out), tuple(name for name in names if name not in (train, *held_out)))


def has_folders(store: Any, name: str) -> bool:
    """Check whether the folder *name* of *store* contains folders."""
    return bool(store.open_folder(name).folders())


def open_part(store: Any, name: str) -> Any:
    """Open the part *name* of *store*; of `seg_train/seg_train/` the inner folder."""
    part = store.open_folder(name)
    while len(inside := part.folders()) == 1 and part_kind(inside[0]) == part_kind(name):
        part = part.open_folder(inside[0])
    return part
