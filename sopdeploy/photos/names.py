"""Names of files and folders: which are hidden, which are images, which are parts of a data set.

The folders of a data set that hold its training and its held-out images are recognized by their names. Any
case is accepted, and the usual affixes: `Training/`, `Val/`, `seg_train/seg_train/`, `test_set/`.
"""

import re

from sopdeploy.images.limits import SUFFIXES

# Written by macOS, Synology, QNAP, Windows and file systems; they hold copies and thumbnails.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__",
}  # fmt: skip
TRAIN = "train"
TRAINING = (TRAIN, "training")
HELD_OUT = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")  # best first
AFFIXES = {"set", "seg", "data", "images", "photos", "split"}


def is_hidden(name: str) -> bool:
    """Check whether programs ignore the file or folder *name*: hidden, or written by a file system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Check whether the file *name* is visible and has an image suffix."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def part_kind(name: str) -> str:
    """Return *name* without affixes, `train` for `seg_train`; "" if it is not in `TRAINING` or `HELD_OUT`."""
    words = [word for word in re.split(r"[\s_.-]+", name.lower()) if word and word not in AFFIXES]
    kind = words[0].removesuffix("set") if len(words) == 1 else ""  # as in `trainset`
    return kind if kind in TRAINING or kind in HELD_OUT else ""
