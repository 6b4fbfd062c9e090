"""Parts of a data set: which of its subfolders hold its training and its held-out images.

They are recognized by their names. Any case is accepted, and the usual affixes: `Training/`,
`Val/`, `seg_train/seg_train/`, `test_set/`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sopdeploy.data.photos.files import holds_other_files, list_subfolders
from sopdeploy.errors import DataError, shorten

# Where the classes are, if each folder at the top is one, or each innermost folder by its name, or by its
# path: `Greek/alpha`
FOLDERS = "folders"
SUBFOLDERS = "subfolders"
PATHS = "paths"
FORMER_FILES = "files"  # a file beside each image, until 0.3
LABELS_FILE = "labels.csv"
TRAIN = "train"
VAL = "val"
TRAINING = (TRAIN, "training")
# Best first
HELD_OUT = (
    "val",
    "valid",
    "validation",
    "dev",
    "eval",
    "evaluation",
    "test",
    "testing",
)
AFFIXES = {"set", "seg", "data", "images", "photos", "split"}


class Parts(NamedTuple):
    """Names of the subfolders of a data set.

    `train` holds the training images and is empty if there is no such folder. `held_out` is
    sorted as `HELD_OUT` is. `others` are all other subfolders.
    """

    train: str
    held_out: tuple[str, ...]
    others: tuple[str, ...]


def is_general(name: str) -> bool:
    """Tell whether the folder *name* says only that it holds images, such as `images` or `dataset`."""
    words = [word for word in re.split(r"[\s_.-]+", name.lower()) if word]
    stems = [word.removesuffix("s").removesuffix("set") for word in words]
    return bool(words) and all({stem, f"{stem}s"} & (AFFIXES | {"imgs", ""}) for stem in stems)


def part_kind(name: str) -> str:
    """Return *name* without affixes, `train` for `seg_train2`; "" if it is not in `TRAINING` or `HELD_OUT`."""
    kind, others = _read_part(name)
    return "" if others else kind


def part_kinds(names: Iterable[str]) -> dict[str, str]:
    """Return the kind of the part that each of the folders *names* is, or "".

    Other words may name the data set if a training part and a held-out one share them, as
    `cars_train` and `cars_test` do.
    """
    read = {name: _read_part(name) for name in names}
    trained = {others for kind, others in read.values() if kind in TRAINING}
    held_out = {others for kind, others in read.values() if kind in HELD_OUT}
    shared = {"", *(trained & held_out)}
    return {name: kind if others in shared else "" for name, (kind, others) in read.items()}


def _read_part(name: str) -> tuple[str, str]:
    """Divide *name* into its word in `TRAINING` or `HELD_OUT`, and its other words, joined.

    The first text is "" unless there is exactly one such word. `AFFIXES` and a number at the end
    are left out.
    """
    without_number = re.sub(r"\d+$", "", name.lower())  # of `test1` or `val_2017`
    words = [
        word for word in re.split(r"[\s_.-]+", without_number) if word and word not in AFFIXES
    ]
    stems = [word.removesuffix("set") for word in words]  # as in `trainset`
    kinds = [stem for stem in stems if stem in TRAINING or stem in HELD_OUT]
    others = [word for word, stem in zip(words, stems, strict=True) if stem not in kinds]
    return (kinds[0] if len(kinds) == 1 else ""), " ".join(others)


def find_parts(root: Path, names: Sequence[str]) -> Parts:
    """Find the parts of the data set in *root* among the folders *names* in it.

    Raises `DataError` for two folders of training images.
    """
    kinds = part_kinds(names)

    # The training part contains folders. One without any may be a class, beside a folder that
    # may be another one.
    candidates = [name for name in names if kinds[name] in TRAINING]
    flat = [name for name in candidates if not list_subfolders(root / name)]
    if flat and any(not kinds[name] and not holds_other_files(root, name) for name in names):
        candidates = [name for name in candidates if name not in flat]
    if len(candidates) > 1:
        candidates = [name for name in candidates if not holds_other_files(root, name)]
    if len(candidates) > 1:
        raise DataError(
            f"{root}: {shorten(candidates)} may all hold the training images; "
            "rename all but one"
        )

    # The held-out parts, in the order of `HELD_OUT`.
    held_out = [name for name in names if kinds[name] in HELD_OUT]
    held_out.sort(key=lambda name: HELD_OUT.index(kinds[name]))
    train = candidates[0] if candidates else ""
    others = tuple(name for name in names if name not in (train, *held_out))
    return Parts(train, tuple(held_out), others)


def part_folder(root: Path, name: str) -> Path:
    """Return the folder of the part *name* in *root*; for `seg_train/seg_train/`, the innermost one.

    A single folder that says only that it holds images, as in `Training/Images/`, is the part, too.
    """
    folder = root / name
    kind, others = _read_part(name)
    same_part = {(kind, others), (kind, "")}
    while True:
        inner = list_subfolders(folder)
        if len(inner) != 1:
            return folder
        if _read_part(inner[0]) not in same_part and not is_general(inner[0]):
            return folder
        folder /= inner[0]


def split_names(leave_out: str, root: Path) -> tuple[str, ...]:
    """Divide *leave_out*, names of folders in *root* separated by commas.

    Commas in a name, and spaces around it, are part of it if *root* has such a folder.
    """
    names = list[str]()
    pieces = leave_out.split(",")
    while pieces:
        # As many pieces as make the name of a folder, or one. `Path.is_dir` raises for a text that is
        # longer than a name can be.
        count = len(pieces)
        while count > 1 and not os.path.isdir(root / ",".join(pieces[:count])):  # noqa: PTH112
            count -= 1
        name = ",".join(pieces[:count])
        names.append(name if os.path.isdir(root / name) else name.strip())  # noqa: PTH112
        pieces = pieces[count:]
    return tuple(name for name in names if name.strip())
