"""Names of files, folders and classes: which are equal, hidden, images, or parts of a data set.

File systems encode a letter such as `Ä` in two ways, which look the same and are the same name (`normalize`).
Names that differ only in case, spaces or variants of letters are different, but easily confused (`fold`).

The folders of a data set that hold its training and its held-out images are recognized by their names. Any
case is accepted, and the usual affixes: `Training/`, `Val/`, `seg_train/seg_train/`, `test_set/`.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable

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


def normalize(name: str) -> str:
    """Return *name* in the encoding that all its spellings on file systems share (NFC)."""
    return unicodedata.normalize("NFC", name)


def fold(name: str) -> str:
    """Return what names share that are easily confused: *name* without case, variants and extra spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def hint_at_spelling(unknown: Collection[str], known: Collection[str]) -> str:
    """Name the *unknown* classes that are easily confused with *known* ones; "" if none are."""
    lines = describe_confusable([*unknown, *known]) if unknown else []
    return f" ({'; '.join(lines)})" if lines else ""


def describe_confusable(names: Iterable[str]) -> list[str]:
    """Describe each set of *names* of classes that are easily confused."""
    alike = defaultdict[str, list[str]](list)
    for name in sorted(set(names)):
        alike[fold(name)].append(name)
    return [
        f"{' and '.join(map(repr, several))} are different classes; rename one if they are the same"
        for several in alike.values()
        if len(several) > 1
    ]
