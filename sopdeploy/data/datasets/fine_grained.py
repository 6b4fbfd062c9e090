"""CUB-200-2011, FGVC-Aircraft and Stanford Cars in the layouts of their official archives.

| data set | lists | images |
|---|---|---|
| CUB-200-2011 | `images.txt`, `image_class_labels.txt`, `classes.txt`, `train_test_split.txt` | `images/` |
| FGVC-Aircraft | `variants.txt`, `images_variant_trainval.txt`, `images_variant_test.txt` | `images/` |
| Stanford Cars | `cars_annos.mat` | `car_ims/` |
| Cars in two parts | `devkit/cars_meta.mat` and two more `.mat` files | `cars_train/`, `cars_test/` |

Sources: Wah et al. (2011), Maji et al. (2013), Krause et al. (2013). As in fast-MPN-COV, the whole images are
used: no bounding boxes, and the line of text below the photos of aircraft stays.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.listed import OFFICIAL, find_folder, list_images, read_lines
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.data.matlab_file import read_v5
from sopdeploy.data.subset import ClassSubset
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import expand_user

CARS_TEST = ("devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat")
Entries = list[tuple[str, int]]


class FineGrainedConfig(ClassSubset):
    """`path` is the folder that the official archive unpacks to, or the folder around it.

    The official test images are the held-out ones. `cache` and `skip_corrupt` are those of `FolderConfig`.
    """

    kind: Literal["cub", "aircraft", "cars"]
    path: Path | None = None
    cache: Path | None = None
    skip_corrupt: bool = False


def open_fine_grained(config: FineGrainedConfig, options: OpenOptions | None = None) -> Split:
    """Open the official training and test images; raises `DataError` naming what is missing or wrong."""
    if config.path is None:
        raise ConfigError("data.path: not set; give the folder that the official archive unpacks to")
    found = find_fine_grained(expand_user(config.path), config.kind)
    if found is None:
        markers = " or ".join(marker for marker, _, _ in LAYOUTS[config.kind])
        raise DataError(
            f"{config.path}: holds no {markers}; give the folder that the official archive unpacks to"
        )
    root, read = found
    return read(root, options or OpenOptions(config.cache))


def find_fine_grained(path: Path, kind: str) -> tuple[Path, Callable[[Path, OpenOptions], Split]] | None:
    """Find the layout of *kind* in the folder *path*; returns its root and its reader, None if absent."""
    for marker, places, read in LAYOUTS[kind]:
        root = find_folder(path, places, marker)
        if root is not None:
            return root, read
    return None


def _open_cub(root: Path, options: OpenOptions) -> Split:
    names, classes = _numbered(root / "images.txt"), _numbered(root / "classes.txt")
    targets, split = _numbered(root / "image_class_labels.txt"), _numbered(root / "train_test_split.txt")
    if not names.keys() == targets.keys() == split.keys():
        raise DataError(f"{root / 'images.txt'}: lists other images than the files next to it; {OFFICIAL}")
    order = {number: index for index, number in enumerate(classes)}
    parts: dict[str, Entries] = {"1": [], "0": []}
    for number, name in names.items():
        if targets[number] not in order or split[number] not in parts:
            raise DataError(
                f"{root / 'images.txt'}: image {number} has class {targets[number]} and split "
                f"{split[number]}; {OFFICIAL}"
            )
        parts[split[number]].append((name, order[targets[number]]))
    labels = tuple(classes.values())
    train, test = (
        list_images(root / "images", root / "images.txt", labels, parts[part], options) for part in "10"
    )
    return Split(train=train, held_out=test)


def _numbered(path: Path) -> dict[str, str]:
    """Read lines such as `1 001.Black_footed_Albatross`, in the order of the file."""
    found: dict[str, str] = {}
    for count, line in enumerate(read_lines(path), start=1):
        number, _, text = line.partition(" ")
        if not number.isdecimal() or not text or number in found:
            raise DataError(f"{path}: line {count} does not have a new number and a text; {OFFICIAL}")
        found[number] = text.strip()
    return found


def _open_aircraft(root: Path, options: OpenOptions) -> Split:
    labels = tuple(read_lines(root / "variants.txt"))
    parts = []
    for part in ("trainval", "test"):
        listing = root / f"images_variant_{part}.txt"
        entries: Entries = []
        for count, line in enumerate(read_lines(listing), start=1):
            number, _, variant = line.partition(" ")
            if variant not in labels:
                raise DataError(f"{listing}: line {count}: {variant!r} is not in variants.txt; {OFFICIAL}")
            entries.append((f"{number}.jpg", labels.index(variant)))
        parts.append(list_images(root / "images", listing, labels, entries, options))
    return Split(train=parts[0], held_out=parts[1])


def _open_cars(root: Path, options: OpenOptions) -> Split:
    """Open the layout with all images in one folder; the field `test` of an annotation selects the part."""
    listing = root / "cars_annos.mat"
    content = _read_matlab(listing, "annotations", "class_names")
    labels = _car_names(listing, content["class_names"])
    parts: dict[bool, Entries] = {False: [], True: []}
    for record in content["annotations"]:
        name, target = _car(listing, record, "relative_im_path")
        parts[bool(_number(listing, record, "test"))].append((name, target))
    train, test = (list_images(root, listing, labels, parts[part], options) for part in (False, True))
    return Split(train=train, held_out=test)


def _open_cars_in_parts(root: Path, options: OpenOptions) -> Split:
    meta = root / "devkit" / "cars_meta.mat"
    labels = _car_names(meta, _read_matlab(meta, "class_names")["class_names"])
    test = next((root / name for name in CARS_TEST if (root / name).is_file()), None)
    if test is None:
        raise DataError(f"{root}: holds no {CARS_TEST[0]}, the classes of the test images; put it there")
    parts = []
    for listing, folder in ((root / "devkit" / "cars_train_annos.mat", "cars_train"), (test, "cars_test")):
        records = _read_matlab(listing, "annotations")["annotations"]
        entries = [_car(listing, record, "fname") for record in records]
        parts.append(list_images(root / folder, listing, labels, entries, options))
    return Split(train=parts[0], held_out=parts[1])


def _read_matlab(path: Path, *names: str) -> dict[str, Any]:
    content = read_v5(path, names, DataError)
    if any(not isinstance(content.get(name), list) for name in names):
        raise DataError(f"{path}: needs the lists {' and '.join(names)}; {OFFICIAL}")
    return content


def _car_names(path: Path, names: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise DataError(f"{path}: class_names must be different texts; {OFFICIAL}")
    return tuple(names)


def _car(path: Path, record: Any, key: str) -> tuple[str, int]:
    """Read the name and the class, from 0, of one annotation."""
    name = record.get(key) if isinstance(record, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{path}: an annotation has no {key}; {OFFICIAL}")
    return name, _number(path, record, "class") - 1


def _number(path: Path, record: Any, key: str) -> int:
    value = record.get(key)
    if not isinstance(value, np.ndarray) or value.size != 1:
        raise DataError(f"{path}: an annotation has no {key}; {OFFICIAL}")
    return int(value.item())


# For each data set: a file that only its layout has, the folders of `path` that may contain it, the reader.
LAYOUTS: dict[str, tuple[tuple[str, tuple[str, ...], Callable[[Path, OpenOptions], Split]], ...]] = {
    "cub": (("train_test_split.txt", (".", "CUB_200_2011"), _open_cub),),
    "aircraft": (("images_variant_trainval.txt", (".", "data", "fgvc-aircraft-2013b/data"), _open_aircraft),),
    "cars": (
        ("cars_annos.mat", (".", "stanford_cars"), _open_cars),
        ("devkit/cars_train_annos.mat", (".", "stanford_cars"), _open_cars_in_parts),
    ),
}
