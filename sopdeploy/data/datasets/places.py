"""Places365 in its original layout: lists of files and classes beside two folders of images.

`categories_places365.txt` has lines such as `/a/airport_terminal 2`, `places365_train_standard.txt` such as
`/a/airport_terminal/00000001.jpg 2` and `places365_val.txt` such as `Places365_val_00000001.jpg 165`. Source:
Zhou et al., "Places: A 10 Million Image Database" (2017). Use `folder` for its "easy directory" layout.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.folder import open_store
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.data.subset import ClassSubset
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.files import expand_user

CATEGORIES = "categories_places365.txt"
IMAGE_FOLDERS = {
    "places365_train_standard.txt": ("data_256", "data_256_standard", "data_large", "data_large_standard"),
    "places365_val.txt": ("val_256", "val_large"),
}


class PlacesConfig(ClassSubset):
    """`path` is the folder of the lists; each folder of images may be a tar archive instead.

    `cache` and `skip_corrupt` are those of `FolderConfig`.
    """

    kind: Literal["places365"]
    path: Path | None = None
    cache: Path | None = None
    skip_corrupt: bool = False


def open_places(config: PlacesConfig, options: OpenOptions | None = None) -> Split:
    """Open the training and validation images; raises `DataError` naming what is missing or wrong.

    Missing image files are only detected when they are read, or by `sopdeploy data check`.
    """
    if config.path is None:
        raise ConfigError(f"data.path: not set; give the folder that holds {CATEGORIES}")
    root = expand_user(config.path)
    labels = _read_categories(root / CATEGORIES)
    options = options or OpenOptions(config.cache)
    train, held_out = (
        _open_list(root / listing, folders, labels, options) for listing, folders in IMAGE_FOLDERS.items()
    )
    return Split(train=train, held_out=held_out)


def _read_categories(path: Path) -> tuple[str, ...]:
    """Read the class names in the order of their numbers.

    Names are those of the "easy directory" layout: `/a/apartment_building/outdoor` becomes
    `apartment_building-outdoor`.
    """
    found = dict[int, str]()
    for name, number in _read_list(path):
        if number in found:
            raise DataError(f"{path}: number {number} occurs twice; use the official file")
        found[number] = name.strip("/").partition("/")[2].replace("/", "-")
    labels = tuple(found[number] for number in sorted(found))
    if sorted(found) != list(range(len(found))) or len(set(labels)) != len(labels) or len(labels) < 2:
        raise DataError(
            f"{path}: needs different classes, numbered from 0 without gaps; use the official file"
        )
    return labels


def _read_list(path: Path) -> list[tuple[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); put the official list there") from error
    entries = []
    for count, line in enumerate(text.splitlines(), start=1):
        name, _, number = line.strip().rpartition(" ")
        if not name or not number.isdecimal():
            raise DataError(f"{path}: line {count} is not a name and a number; use the official file")
        entries.append((name, int(number)))
    return entries


def _open_list(
    listing: Path, folders: tuple[str, ...], labels: tuple[str, ...], options: OpenOptions
) -> ImageFiles:
    root = listing.parent
    candidates = [root / f"{name}{suffix}" for name in folders for suffix in ("", ".tar", ".tar.xz")]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise DataError(f"{root}: holds no {folders[0]}; unpack the images there")
    entries = _read_list(listing)
    targets = np.asarray([number for _, number in entries], dtype=np.int64)
    unknown = sorted(set(targets.tolist()) - set(range(len(labels))))
    if unknown:
        raise DataError(
            f"{listing}: classes {shorten(list(map(str, unknown)))} are not in {CATEGORIES}; use the "
            "official lists"
        )
    empty = sorted(set(range(len(labels))) - set(targets.tolist()))
    if empty:
        raise DataError(
            f"{listing}: no images of the classes {shorten([labels[number] for number in empty])}; "
            "use the official lists"
        )
    paths = np.asarray([name.strip("/").encode() for name, _ in entries], dtype=np.bytes_)
    return ImageFiles(open_store(path, options), labels, paths, targets)
