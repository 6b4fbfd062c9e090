"""Data sets with official parts: Aircraft, Cars and Places365, as torchvision reads them.

torchvision reads the lists of files and classes; the images are opened like those of any folder. As in
fast-MPN-COV, the images are not cropped: bounding boxes are ignored, and photos of aircraft keep the line of
text at their bottom. Sources: Maji et al. (2013), Krause et al. (2013), Zhou et al. (2017).
"""

import importlib
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sopdeploy.data.base import ClassSubset, Split
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import expand_user


class OfficialConfig(ClassSubset):
    """`path` is the `root` of the class in `torchvision.datasets`.

    The held-out images are the official test images, for Places365 the validation images. `skip_corrupt`
    is that of `FolderConfig`.
    """

    kind: Literal["aircraft", "cars", "places365"]
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
    return next((kind for kind, layout in LAYOUTS.items() if (root / layout.content).exists()), None)


def open_official(kind: str, path: Path | None) -> Split:
    """Open the official training and held-out images at *path*; raises `DataError` if torchvision cannot."""
    if path is None:
        raise ConfigError(f"data.path: not set; give the folder that holds {LAYOUTS[kind].content}")
    root = expand_user(path)
    return Split(train=open_part(kind, "train", root), held_out=open_part(kind, "held_out", root))


def open_part(kind: str, part: Literal["train", "held_out"], root: Path) -> ImageFiles:
    """Open a part of the official layout *kind* in *root*; raises `DataError` if files are wrong."""
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
