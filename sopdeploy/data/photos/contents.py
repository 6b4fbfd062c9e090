"""What a folder holds: its images and other files, listed once, and the folders at its top."""

import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from sopdeploy.data.photos.files import list_images, list_subfolders


class Contents(NamedTuple):
    """The images of the folder *root*, its other files, and all folders at its top, sorted.

    Paths are relative to *root*. Those of images are bytes, as `ImageFiles` has them in an array.
    `left_out` are names of files and folders that are not read, `missing` those that are not there.
    """

    root: Path
    images: list[bytes]
    others: list[str]
    folders: list[str]
    left_out: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()

    @property
    def tops(self) -> Counter[str]:
        """The number of images in each folder at the top that holds some."""
        return Counter(
            os.fsdecode(path).partition("/")[0] for path in self.images if b"/" in path
        )

    @property
    def files(self) -> list[str]:
        """The files in *root* itself that are not images."""
        return [file for file in self.others if "/" not in file]

    @property
    def num_beside(self) -> int:
        """The number of images in *root* itself."""
        return sum(b"/" not in path for path in self.images)

    def within(self, folder: Path) -> "Contents":
        """Return what *folder*, below *root*, holds."""
        name = f"{folder.relative_to(self.root).as_posix()}/"
        start = os.fsencode(name)
        images = [path.removeprefix(start) for path in self.images if path.startswith(start)]
        others = [file.removeprefix(name) for file in self.others if file.startswith(name)]
        folders = [name for name in list_subfolders(folder) if name not in self.left_out]
        return Contents(folder, images, others, folders, self.left_out, self.missing)


def list_contents(root: Path, leave_out: Collection[str] = ()) -> Contents:
    """List what *root* holds, without files and folders that are named as *leave_out*, also with `*`.

    Bundles and runs are not listed. Raises `DataError` for a folder that cannot be listed.
    """
    images, others = list_images(root)
    folders = list_subfolders(root)
    names = {
        part
        for path in (*map(os.fsdecode, images), *others, *folders)
        for part in path.split("/")
    }
    left_out = {name for name in names if any(_matches(name, pattern) for pattern in leave_out)}
    missing = [
        pattern
        for pattern in leave_out
        if not (
            os.path.lexists(root / pattern) or any(_matches(name, pattern) for name in left_out)
        )
    ]

    def is_kept(path: str) -> bool:
        return left_out.isdisjoint(path.split("/"))

    return Contents(
        root,
        [path for path in images if is_kept(os.fsdecode(path))],
        [*filter(is_kept, others)],
        [*filter(is_kept, folders)],
        frozenset(left_out),
        tuple(missing),
    )


def _matches(name: str, pattern: str) -> bool:
    """Tell whether *name* is *pattern*, in which `*` stands for any text."""
    parts = map(re.escape, pattern.split("*"))
    return re.fullmatch(".*".join(parts), name) is not None
