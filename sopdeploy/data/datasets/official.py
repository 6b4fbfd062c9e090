"""Aircraft, Cars and Places365 as `torchvision.datasets` reads them, and ImageNet as it is distributed.

torchvision reads the lists of files and classes; the images are opened as those of any folder. The validation
images of ImageNet (Russakovsky et al., 2015) are in one folder, and a file lists their WordNet IDs. As in
fast-MPN-COV, the whole images are used: no bounding boxes, and the line of text below the photos of aircraft
stays. Sources: Maji et al. (2013), Krause et al. (2013), Zhou et al. (2017).
"""

import importlib
import os
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.folder import class_problems, list_classes, open_store
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.data.subset import ClassSubset
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.files import expand_user


class OfficialConfig(ClassSubset):
    """`path` is the `root` of the class in `torchvision.datasets`; for ImageNet, it holds train/ and val/.

    The official test images, of Places365 the validation images, are the held-out ones. `skip_corrupt` is
    that of `FolderConfig`.
    """

    kind: Literal["aircraft", "cars", "places365", "imagenet"]
    path: Path | None = None
    skip_corrupt: bool = False


class _Layout(NamedTuple):
    """The class in `torchvision.datasets`, what its root contains, and its names of the two parts."""

    class_name: str
    content: str
    train: str
    held_out: str


LAYOUTS = {
    "aircraft": _Layout("FGVCAircraft", "fgvc-aircraft-2013b", "trainval", "test"),
    "cars": _Layout("StanfordCars", "stanford_cars", "train", "test"),
    "places365": _Layout("Places365", "categories_places365.txt", "train-standard", "val"),
}
IMAGENET_LISTS = ("val.txt", "LOC_val_solution.csv")
IMAGENET_CLASSES = (
    "imagenet_classes.txt"  # WordNet ID and name of each class, as published weights order them
)
WORDNET_ID = re.compile(r"n\d{8}")


def detect_kind(root: Path) -> str | None:
    """Find the `data.kind` of the official layout in the folder *root*, if there is one."""
    if _imagenet_list(root) is not None:
        return "imagenet"
    return next((kind for kind, layout in LAYOUTS.items() if (root / layout.content).exists()), None)


def open_official(kind: str, path: Path | None) -> Split:
    """Open the official training and held-out images at *path*; raises `DataError` if torchvision cannot."""
    if path is None:
        content = "train and val" if kind == "imagenet" else LAYOUTS[kind].content
        raise ConfigError(f"data.path: not set; give the folder that holds {content}")
    root = expand_user(path)
    return Split(train=open_part(kind, "train", root), held_out=open_part(kind, "held_out", root))


def open_part(kind: str, part: Literal["train", "held_out"], root: Path) -> ImageFiles:
    """Open a part of the official layout *kind* in *root*; raises `DataError` if torchvision cannot."""
    if kind == "imagenet":
        return _open_imagenet(part, root)
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
        open_store(root),
        tuple(labels),
        np.asarray(paths, dtype=np.bytes_),
        np.asarray(targets, dtype=np.int64),
    )


@cache
def class_aliases() -> dict[str, str]:
    """Map the WordNet ID of each ImageNet class to the name that published weights have, and back."""
    text = resources.files("sopdeploy.data.datasets").joinpath(IMAGENET_CLASSES).read_text("utf-8")
    pairs = [line.split(" ", 1) for line in text.splitlines()]
    return {first: second for pair in pairs for first, second in (pair, pair[::-1])}


def _imagenet_list(root: Path) -> Path | None:
    """Find the file with the classes of the validation images, if these are not in class folders."""
    listing = next((root / name for name in IMAGENET_LISTS if (root / name).is_file()), None)
    if listing is None or not (root / "val").is_dir():
        return None
    return None if any(path.is_dir() for path in (root / "val").iterdir()) else listing


def _open_imagenet(part: str, root: Path) -> ImageFiles:
    """Open class folders for training, or the listed validation images.

    Lines are `ILSVRC2012_val_00000001.JPEG n01751748`, or as in LOC_val_solution.csv.
    """
    listing = _imagenet_list(root)
    if listing is None:
        raise DataError(f"{root}: holds no {IMAGENET_LISTS[0]} for the images in val; add it")
    names, wordnet_ids = _read_imagenet_list(listing)
    labels = tuple(sorted(set(wordnet_ids)))
    if part == "train":
        store = open_store(root / "train")
        images = list_classes(store, tuple(store.folders()))
        if problems := [*class_problems(images, labels)]:
            raise DataError("; ".join(problems))
        return images
    missing = [name for name in names if not (root / "val" / name).is_file()]
    if missing:
        raise DataError(f"{root / 'val'}: {shorten(missing)} missing; unpack the official archive there")
    indices = {label: index for index, label in enumerate(labels)}
    return ImageFiles(
        open_store(root / "val"),
        labels,
        np.asarray([os.fsencode(name) for name in names], dtype=np.bytes_),
        np.asarray([indices[wordnet_id] for wordnet_id in wordnet_ids], dtype=np.int64),
    )


def _read_imagenet_list(listing: Path) -> tuple[list[str], list[str]]:
    """Read the file names in `val` and their WordNet IDs; raises `DataError` for a line without an ID."""
    names, wordnet_ids = [], []
    for count, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        name, wordnet_id, *_ = [*re.split(r"[,\s]+", line.strip()), ""]
        if WORDNET_ID.fullmatch(wordnet_id):
            name = Path(name).name
            names.append(name if Path(name).suffix else f"{name}.JPEG")
            wordnet_ids.append(wordnet_id)
        elif line.strip() and not line.startswith("ImageId,"):
            raise DataError(
                f"{listing}: line {count}: no WordNet ID such as n01751748; use the official file"
            )
    return names, wordnet_ids
