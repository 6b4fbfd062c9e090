"""The images of a folder by the folders that hold them, which `readings` and `doubts` ask about."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

from sopdeploy.photos.class_folders import find_leftover_paths
from sopdeploy.photos.files import TRAINING, is_general, list_images

FEW_IMAGES = 3  # that names and subfolders must have per class on average
# Names such as `day 1`, `ch12` and `c0`, but not `class 1`; WordNet's have more digits
NUMBERED = re.compile(r"(?!class)\D*[^\W\d]\D*\d{1,3}", re.IGNORECASE)


class Tree:
    """The images of a folder, as paths below it, and the folders at its top that hold some.

    Those in the folders *leave_out*, and masks and the like, do not count. Raises `DataError` for a
    folder that cannot be listed.
    """

    def __init__(self, root: Path, leave_out: Collection[str]) -> None:
        paths, others = list_images(root)
        self.root = root
        leftovers = find_leftover_paths(root, paths)
        self.paths = [
            path
            for path in paths
            if os.fsdecode(path).partition("/")[0] not in leave_out and path not in leftovers
        ]
        self.leave_out = ",".join(leave_out)
        self.others = others
        self.images = [os.fsdecode(path) for path in self.paths]
        self.counts = Counter(path.partition("/")[0] for path in self.images if "/" in path)
        # Folders in each folder at the top, with the number of images that each holds itself.
        self.inner = defaultdict[str, Counter[str]](Counter)
        for path in self.images:
            top, _, rest = path.partition("/")
            if "/" in rest:
                self.inner[top][rest.rpartition("/")[0]] += 1

    @property
    def tops(self) -> list[str]:
        """The folders at the top that hold images, sorted."""
        return sorted(self.counts)

    @property
    def numbered(self) -> list[list[str]]:
        """The families of folders at its top whose names are the same except for a number, sorted."""
        by_word = defaultdict[str, list[str]](list)
        for top in filter(NUMBERED.fullmatch, self.tops):
            by_word[_without_digits(top)].append(top)
        return [tops for tops in by_word.values() if len(tops) > 1]

    @property
    def differs_in_numbers(self) -> bool:
        """Whether the names of the folders at its top are the same except for a number."""
        return self.numbered == [self.tops]

    def by_top(self) -> dict[str, list[bytes]]:
        """List the images below each folder at the top."""
        paths = {top: list[bytes]() for top in self.tops}
        for path in self.paths:
            top, separator, _ = path.partition(b"/")
            if separator:
                paths[os.fsdecode(top)].append(path)
        return paths

    def may_hold_classes(self, folder: str) -> bool:
        """Tell whether the folders in *folder* differ in words, and hold several images each.

        Fewer images suffice if another folder at the top holds folders of the same names. Folders
        that differ in a number only are the objects of a class or the days of a camera, unless the
        name of *folder* is no class, such as `images`, or it `is_training`.
        """
        inner = self.inner.get(folder, Counter[str]())
        words = {_without_digits(name) for name in inner}
        is_no_class = is_general(folder) or self.is_training(folder)
        if len(inner) < 2 or (len(words) < 2 and not is_no_class):
            return False
        is_shared = any(
            inner.keys() == one.keys() for top, one in self.inner.items() if top != folder
        )
        return is_shared or inner.total() >= FEW_IMAGES * len(inner)

    def is_training(self, folder: str) -> bool:
        """Tell whether the name of *folder* is a training part of what is in it, as `train_shapes` of `shape_0`.

        It begins or ends with the word of the part. Other words say that it holds images, or are
        those of a folder in it. A `steam train` with `day_1` is none.
        """
        first, *others = re.split(r"[\W_]+", folder.lower())
        if first not in TRAINING:
            *others, last = first, *others
            if last not in TRAINING:
                return False
        inside = "\n".join(self.inner.get(folder, ())).lower()
        return all(is_general(word) or word.removesuffix("s") in inside for word in others)


def _without_digits(name: str) -> str:
    return re.sub(r"[\d\W_]+", "", name)
