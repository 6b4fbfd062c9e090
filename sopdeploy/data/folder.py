"""A folder of images, one subfolder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.data.base import Split, hold_out
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.frozen import Frozen

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "test")  # the first that exists is measured on


class FolderConfig(Frozen):
    """Where the images lie, and which of them are held out where there is no folder of such.

    `hold_out` is the fraction of every class, drawn by `hold_out_seed`: it belongs to the data, not to
    the run, so that runs with other seeds are measured on the same images.
    """

    kind: Literal["folder"]
    path: Path | None = None
    hold_out: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    hold_out_seed: int = 0


@dataclass(frozen=True, slots=True)
class FolderPictures:
    """Image files below `root`; `paths` is one array of bytes, which loader processes can share."""

    root: Path
    labels: tuple[str, ...]
    paths: NDArray[np.bytes_]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_picture(self.path(index)), int(self.targets[index])

    def path(self, index: int) -> Path:
        """Return where the picture *index* lies."""
        return self.root / os.fsdecode(self.paths[index])


def open_picture(path: Path) -> Image.Image:
    """Return the decoded picture at *path*; raises `DataError` naming it where that fails."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except UnidentifiedImageError as problem:
        raise DataError(f"{path}: not an image; delete it or put the right file there") from problem
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as problem:
        raise DataError(f"{path}: cannot be read ({problem}); repair or delete it") from problem


def open_folder(config: FolderConfig) -> Split:
    """Return the images of a folder; raises `DataError` naming what cannot be used.

    Classes are sorted by name. Hidden folders and files of other kinds are ignored.
    """
    if config.path is None:
        raise ConfigError("data.path: not set; give the folder that holds one subfolder per class")
    root = config.path.expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one that holds one subfolder of images per class")
    names = subfolders(root)
    held_names = [name for name in HELD_OUT if name in names]
    if TRAIN not in names:
        if names and not set(names) - set(HELD_OUT):
            raise DataError(f"{root}: holds {names[0]} but no {TRAIN}; put the images to learn from there")
        return split_folder(root, config)
    if not held_names:
        return split_folder(root / TRAIN, config)
    labels = class_names(root / TRAIN)
    return Split(train=scan(root / TRAIN, labels), held_out=open_classes(root / held_names[0], labels))


def open_classes(root: Path, labels: tuple[str, ...]) -> FolderPictures:
    """Return the images below *root* for a network that knows *labels*; folders are matched by name.

    Raises `DataError` naming the classes that only one of both has.
    """
    found = set(subfolders(root))
    unknown, missing = sorted(found - set(labels)), sorted(set(labels) - found)
    wrong = []
    if unknown:
        wrong.append(f"classes {', '.join(unknown)} are none of those learnt, remove them or learn them too")
    if missing:
        wrong.append(f"classes {', '.join(missing)} of those learnt are missing, add them")
    if wrong:
        raise DataError(f"{root}: {'; '.join(wrong)}")
    return scan(root, labels)


def subfolders(root: Path) -> list[str]:
    """Return the names of the visible folders in *root*, sorted."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    except OSError as problem:
        raise DataError(
            f"{root}: cannot be listed ({problem.strerror}); give a folder you may read"
        ) from problem


def is_hidden(name: str) -> bool:
    """Say whether *name* is hidden, as `.ipynb_checkpoints` is."""
    return name.startswith(".")


def class_names(root: Path) -> tuple[str, ...]:
    """Return the classes below *root*; raises `DataError` for fewer than two."""
    names = subfolders(root)
    if len(names) > 1:
        return tuple(names)
    if names:
        raise DataError(f"{root}: holds one class only ({names[0]}); a classifier needs at least two")
    raise DataError(f"{root}: holds no class folders; sort the images into one subfolder per class")


def scan(root: Path, labels: tuple[str, ...]) -> FolderPictures:
    """Return the images of every class below *root*, sorted; raises `DataError` for a class without."""
    paths: list[bytes] = []
    targets: list[int] = []
    for target, label in enumerate(labels):
        found = image_files(root, label)
        if not found:
            raise DataError(
                f"{root / label}: no images in this class folder; "
                f"add some ({', '.join(ENDINGS)}) or remove the folder"
            )
        paths += found
        targets += [target] * len(found)
    return FolderPictures(root, labels, np.asarray(paths, dtype=np.bytes_), np.asarray(targets))


def image_files(root: Path, label: str) -> list[bytes]:
    """Return the images of one class and its subfolders as sorted paths relative to *root*."""
    found = []
    for folder, folders, files in os.walk(root / label):
        folders[:] = [name for name in folders if not is_hidden(name)]
        below = Path(folder).relative_to(root)
        found += [
            os.fsencode(below / name)
            for name in files
            if name.lower().endswith(ENDINGS) and not is_hidden(name)
        ]
    return sorted(found)


def split_folder(root: Path, config: FolderConfig) -> Split:
    """Return the images of *root* with a fraction of every class held out."""
    labels = class_names(root)
    everything = scan(root, labels)
    counts = np.bincount(everything.targets)
    if counts.min() == 1:
        raise DataError(
            f"{root / labels[int(counts.argmin())]}: one image only; add another, one has to be held out"
        )
    keys = [os.fsdecode(path) for path in everything.paths]
    held = np.asarray(hold_out(keys, everything.targets.tolist(), config.hold_out, config.hold_out_seed))
    train, held_out = (
        FolderPictures(root, labels, everything.paths[mask], everything.targets[mask])
        for mask in (~held, held)
    )
    return Split(train=train, held_out=held_out)
