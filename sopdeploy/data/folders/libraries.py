"""Data sets of libraries: CIFAR, FGVC-Aircraft, Stanford Cars and Places365, and the digits of scikit-learn.

torchvision reads the lists of files and classes, and verifies the published checksums of CIFAR.
The images are opened like those of any folder. As in fast-MPN-COV, they are not cropped:
bounding boxes are ignored, and photos of aircraft keep the line of text at their bottom.
Sources: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009); Maji et al.
(2013), Krause et al. (2013), Zhou et al. (2017).

Both libraries are imported when a data set is opened, because their import takes seconds and
every command that reads a recipe would wait for it.
"""

import importlib
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sopdeploy.data.photos.photo import ArrayImages, ImageFiles, Split
from sopdeploy.data.photos.split import hold_out
from sopdeploy.errors import DataError

MAX_DIGIT_VALUE = 16.0  # of a pixel in scikit-learn's digits
DIGITS_HELD_OUT = 0.2
DIGITS_SEED = 0  # not the seed of the run: all runs are evaluated on the same images


def open_cifar(kind: str, root: Path) -> Split:
    """Open the official training and test images; raises `DataError` if the files are not complete."""
    dataset_class: Any = getattr(importlib.import_module("torchvision.datasets"), kind.upper())
    try:
        parts = [
            dataset_class(root=str(root), train=train, download=False)
            for train in (True, False)
        ]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root}: holds no complete {dataset_class.base_folder}; unpack "
            f"{dataset_class.url} there"
        ) from error
    train, held_out = (
        ArrayImages(tuple(part.classes), part.data, np.asarray(part.targets, dtype=np.int64))
        for part in parts
    )
    return Split(train=train, held_out=held_out)


def open_digits() -> Split:
    """Open the digits as 8 x 8 gray images; one fifth of every class is held out."""
    dataset = importlib.import_module("sklearn.datasets").load_digits()
    images = np.rint(dataset.images * (255.0 / MAX_DIGIT_VALUE)).astype(np.uint8)
    targets = dataset.target.astype(np.int64)
    labels = tuple(str(digit) for digit in range(10))
    keys = [str(index) for index in range(len(targets))]
    mask = hold_out(keys, targets, DIGITS_HELD_OUT, DIGITS_SEED)
    digits = ArrayImages(labels, images, targets)
    return Split(train=digits.select(~mask), held_out=digits.select(mask))


CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


class _Layout(NamedTuple):
    """A class of `torchvision.datasets`, the file or folder that identifies its root, its names of parts."""

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
    return next((kind for kind in LAYOUTS if has_files_of(kind, root)), None)


def has_files_of(kind: str, root: Path) -> bool:
    """Tell whether the folder *root* has the files of the data set *kind* of a library."""
    layout = LAYOUTS.get(kind)
    content = CIFAR_FOLDERS.get(kind) if layout is None else layout.content
    return content is not None and (root / content).exists()


def open_part(kind: str, part: Literal["train", "held_out"], root: Path) -> ImageFiles:
    """Open the official training or held-out images of the layout *kind* in *root*; raises `DataError`."""
    # The arguments of the class of torchvision.
    layout = LAYOUTS[kind]
    split = getattr(layout, part)
    dataset_class: Any = getattr(
        importlib.import_module("torchvision.datasets"), layout.class_name
    )
    options: dict[str, Any] = {"loader": str}  # the images are their paths
    if kind == "places365":
        # `val_256` is in the official files with images of 256 pixels.
        options["small"] = (root / "val_256").is_dir()

    try:
        dataset = dataset_class(str(root), split=split, download=False, **options)
        files, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    except Exception as error:  # torchvision and scipy raise many types for damaged files
        raise DataError(
            f"{root}: torchvision.datasets.{layout.class_name} cannot read the "
            f"{split} images ({error}); use the official files in its layout"
        ) from error

    labels = sorted(dataset.class_to_idx, key=dataset.class_to_idx.get)
    # The label of `/a/apartment_building/outdoor` is `apartment_building-outdoor`.
    if kind == "places365":
        without_letter = [name.strip("/").partition("/")[2] for name in labels]
        labels = [name.replace("/", "-") for name in without_letter]

    paths = np.asarray(
        [os.fsencode(file.removeprefix(f"{root}/")) for file in files], dtype=np.bytes_
    )
    return ImageFiles(root, tuple(labels), paths, np.asarray(targets, dtype=np.int64))
