"""Places365 in its original layout: three lists of files and classes beside two folders of images.

`categories_places365.txt` has lines such as `/a/airport_terminal 2`, `places365_train_standard.txt` such as
`/a/airport_terminal/00000001.jpg 2` and `places365_val.txt` such as `Places365_val_00000001.jpg 165`. Source:
Zhou et al., "Places: A 10 Million Image Database" (2017). Its "easy directory" layout is a plain `folder`.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from sopdeploy.config import StrictModel
from sopdeploy.data.base import Split
from sopdeploy.data.datasets.folder import open_store
from sopdeploy.data.image_files import ImageFiles, Opening
from sopdeploy.errors import ConfigError, DataError

CATEGORIES = "categories_places365.txt"
PARTS = {
    "places365_train_standard.txt": ("data_256", "data_256_standard", "data_large", "data_large_standard"),
    "places365_val.txt": ("val_256", "val_large"),
}


class PlacesConfig(StrictModel):
    """`path` is the folder of the lists; each folder of images may be one tar archive instead.

    `cache` and `skip_corrupt` are as for a folder.
    """

    kind: Literal["places365"]
    path: Path | None = None
    cache: Path | None = None
    skip_corrupt: bool = False


def open_places(config: PlacesConfig, opening: Opening | None = None) -> Split:
    """Return the training and validation images; raises `DataError` naming what is missing or wrong."""
    if config.path is None:
        raise ConfigError(f"data.path: not set; give the folder that holds {CATEGORIES}")
    root = config.path.expanduser()
    labels = categories(root / CATEGORIES)
    opening = opening or Opening(config.cache)
    train, held_out = (
        listed(root / listing, images(root, names), labels, opening) for listing, names in PARTS.items()
    )
    return Split(train=train, held_out=held_out)


def categories(path: Path) -> tuple[str, ...]:
    """Return the classes in the order of their numbers, called as the folders of the "easy directory" layout.

    `/a/apartment_building/outdoor` is `apartment_building-outdoor` there.
    """
    found = dict[int, str]()
    for name, number in lines_of(path):
        if number in found:
            raise DataError(f"{path}: number {number} stands twice; use the official file")
        found[number] = name.strip("/").partition("/")[2].replace("/", "-")
    labels = tuple(found[number] for number in sorted(found))
    if sorted(found) != list(range(len(found))) or len(set(labels)) != len(labels) or len(labels) < 2:
        raise DataError(
            f"{path}: needs different classes, numbered from 0 without gaps; use the official file"
        )
    return labels


def lines_of(path: Path) -> list[tuple[str, int]]:
    """Return the name and the number on each line; raises `DataError` naming the line that has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem}); put the official list there") from problem
    found = []
    for count, line in enumerate(text.splitlines(), start=1):
        name, _, number = line.strip().rpartition(" ")
        if not name or not number.isdecimal():
            raise DataError(f"{path}: line {count} is no name and number; use the official file")
        found.append((name, int(number)))
    return found


def images(root: Path, names: tuple[str, ...]) -> Path:
    """Return the folder or archive of images that has one of *names*."""
    for name in names:
        for path in (root / name, root / f"{name}.tar", root / f"{name}.tar.xz"):
            if path.exists():
                return path
    raise DataError(f"{root}: holds no {names[0]}; unpack the images there")


def listed(listing: Path, place: Path, labels: tuple[str, ...], opening: Opening) -> ImageFiles:
    """Return the images that *listing* names; raises `DataError` for unknown and for empty classes.

    Whether each file is there shows when it is read, or by `sopdeploy data check`.
    """
    lines = lines_of(listing)
    targets = np.asarray([number for _, number in lines], dtype=np.int64)
    unknown = sorted(set(targets.tolist()) - set(range(len(labels))))
    if unknown:
        raise DataError(f"{listing}: classes {', '.join(map(str, unknown))} are none of {CATEGORIES}")
    empty = sorted(set(range(len(labels))) - set(targets.tolist()))
    if empty:
        raise DataError(
            f"{listing}: no images of the classes {', '.join(labels[number] for number in empty)}"
        )
    paths = np.asarray([name.strip("/").encode() for name, _ in lines], dtype=np.bytes_)
    return ImageFiles(open_store(place, opening), labels, paths, targets)
