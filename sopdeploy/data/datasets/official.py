"""Aircraft, Cars and Places365 as `torchvision.datasets` reads them, and ImageNet as it is distributed.

torchvision reads the lists of files and classes; the images are opened like those of any folder. As in
fast-MPN-COV, the images are not cropped: bounding boxes are ignored, and photos of aircraft keep the line of
text at their bottom. Sources: Maji et al. (2013), Krause et al. (2013), Zhou et al. (2017).

The validation images of ImageNet (Russakovsky et al., 2015) lie in one folder. A file beside the folders
lists their WordNet IDs: `val.txt`, or `LOC_val_solution.csv` from Kaggle.
"""

import importlib
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sopdeploy.data.base import ClassSubset, Split
from sopdeploy.data.datasets.folder import class_problems, list_classes
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.files import expand_user

_LISTS = ("val.txt", "LOC_val_solution.csv")
# `ILSVRC2012_val_00000001.JPEG n01751748`, or `ILSVRC2012_val_00000001,n01751748 10 20 30 40`
_LINE = re.compile(r"(\w+)(?:\.JPEG)?[ ,](n\d{8})\b", re.ASCII)


class OfficialConfig(ClassSubset):
    """`path` is the `root` of the class in `torchvision.datasets`; for ImageNet, it holds train and val.

    The held-out images are the official test images, for Places365 and ImageNet the validation images.
    `skip_corrupt` is that of `FolderConfig`.
    """

    kind: Literal["aircraft", "cars", "places365", "imagenet"]
    path: Path | None = None
    skip_corrupt: bool = False


class _Layout(NamedTuple):
    """A class of `torchvision.datasets` and its names of the two parts.

    `content` is the file or folder that identifies its root.
    """

    class_name: str
    content: str
    train: str
    held_out: str


LAYOUTS = {
    "aircraft": _Layout("FGVCAircraft", "fgvc-aircraft-2013b", "trainval", "test"),
    "cars": _Layout("StanfordCars", "stanford_cars", "train", "test"),
    "places365": _Layout("Places365", "categories_places365.txt", "train-standard", "val"),
}


def detect_kind(root: Path) -> str | None:
    """Find the `data.kind` of the official layout in the folder *root*, if there is one."""
    if _find_list(root) is not None:
        return "imagenet"
    return next((kind for kind, layout in LAYOUTS.items() if (root / layout.content).exists()), None)


def open_official(kind: str, path: Path | None) -> Split:
    """Open the official training and held-out images at *path*; raises `DataError` if torchvision cannot."""
    if path is None:
        content = _LISTS[0] if kind == "imagenet" else LAYOUTS[kind].content
        raise ConfigError(f"data.path: not set; give the folder that holds {content}")
    root = expand_user(path)
    return Split(train=open_part(kind, "train", root), held_out=open_part(kind, "held_out", root))


def open_part(kind: str, part: Literal["train", "held_out"], root: Path) -> ImageFiles:
    """Open a part of the official layout *kind* in *root*; raises `DataError` if files are wrong."""
    if kind == "imagenet":
        return _open_imagenet(root, part)
    layout = LAYOUTS[kind]
    split = getattr(layout, part)
    dataset_class: Any = getattr(importlib.import_module("torchvision.datasets"), layout.class_name)
    size = {"small": (root / "val_256").is_dir()} if kind == "places365" else {}
    try:
        dataset = dataset_class(str(root), split=split, loader=str, download=False, **size)
        files, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    except Exception as error:  # torchvision and scipy raise many types for damaged files
        raise DataError(
            f"{root}: torchvision.datasets.{layout.class_name} cannot read the {split} images ({error}); "
            "use the official files in its layout"
        ) from error
    labels = sorted(dataset.class_to_idx, key=dataset.class_to_idx.get)
    if kind == "places365":  # `/a/apartment_building/outdoor` is `apartment_building-outdoor` in folders
        labels = [name.strip("/").partition("/")[2].replace("/", "-") for name in labels]
    paths = [os.fsencode(file.removeprefix(f"{root}/")) for file in files]
    return ImageFiles(
        root, tuple(labels), np.asarray(paths, dtype=np.bytes_), np.asarray(targets, dtype=np.int64)
    )


def _find_list(root: Path) -> Path | None:
    """Find the list of the validation images of *root*, unless these are in class folders."""
    listing = next((root / name for name in _LISTS if (root / name).is_file()), None)
    if listing is None or not (root / "val").is_dir():
        return None
    return None if any(path.is_dir() for path in (root / "val").iterdir()) else listing


def _open_imagenet(root: Path, part: str) -> ImageFiles:
    """Open the class folders in `train`, or the listed images in `val` for the *part* `held_out`.

    Raises `DataError` if listed images are missing or the classes of the parts differ.
    """
    file = _find_list(root)
    if file is None:
        raise DataError(f"{root}: holds no {_LISTS[0]} with the classes of the images in val; add it")
    listed = [_LINE.match(line) for line in file.read_text(encoding="utf-8").splitlines()]
    names = [f"{match[1]}.JPEG" for match in listed if match]
    wordnet_ids = [match[2] for match in listed if match]
    labels = sorted(set(wordnet_ids))
    if part == "train":
        listing = list_classes(root / "train")
        if problems := list(class_problems(listing, tuple(labels))):
            raise DataError("; ".join(problems))
        return listing.images
    if missing := [name for name in names if not (root / "val" / name).is_file()]:
        raise DataError(f"{root / 'val'}: {shorten(missing)} missing; unpack the official archive there")
    targets = np.searchsorted(labels, wordnet_ids)
    paths = np.asarray([os.fsencode(name) for name in names], dtype=np.bytes_)
    return ImageFiles(root / "val", tuple(labels), paths, targets.astype(np.int64))
