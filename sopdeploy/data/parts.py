"""The folders of a data set that hold its training and its held-out images, recognized by their names.

Any case is accepted, and the usual affixes: `Training/`, `Val/`, `seg_train/seg_train/`, `test_set/`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from sopdeploy.data.folders import list_subfolders
from sopdeploy.errors import DataError, shorten

TRAIN = "train"
TRAINING = (TRAIN, "training")
HELD_OUT = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")  # best first
AFFIXES = {"set", "seg", "data", "images", "photos", "split"}


class Parts(NamedTuple):
    """Names of the subfolders of a data set.

    `train` holds the training images and is empty if there is no such folder. `held_out` is sorted as
    `HELD_OUT` is. `others` are all other subfolders.
    """

    train: str
    held_out: tuple[str, ...]
    others: tuple[str, ...]


def part_kind(name: str) -> str:
    """Return the word of `TRAINING` or `HELD_OUT` that the folder *name* contains, or ""."""
    words = [word for word in re.split(r"[\s_.-]+", name.lower()) if word and word not in AFFIXES]
    kind = words[0].removesuffix("set") if len(words) == 1 else ""
    return kind if kind in TRAINING or kind in HELD_OUT else ""


def find_parts(root: Path) -> Parts:
    """Find the parts of the data set in *root*; raises `DataError` for two folders of training images.

    A folder with the name of a part is a class if it is next to classes and contains no folders.
    """
    names = list_subfolders(root)
    kinds = {name: part_kind(name) for name in names}
    only_parts = all(kinds.values())
    training = [
        name for name in names if kinds[name] in TRAINING and (only_parts or list_subfolders(root / name))
    ]
    if len(training) > 1:
        raise DataError(f"{root}: {shorten(training)} may all hold the training images; rename all but one")
    held_out = sorted(
        (name for name in names if kinds[name] in HELD_OUT), key=lambda name: HELD_OUT.index(kinds[name])
    )
    train = training[0] if training else ""
    return Parts(train, tuple(held_out), tuple(name for name in names if name not in (train, *held_out)))


def part_folder(root: Path, name: str) -> Path:
    """Return the folder of the part *name* in *root*; for `seg_train/seg_train/`, the inner folder."""
    folder = root / name
    while len(inner := list_subfolders(folder)) == 1 and part_kind(inner[0]) == part_kind(name):
        folder /= inner[0]
    return folder
