"""Data sets with official parts: Aircraft, Cars and Places365 as torchvision reads them, and ImageNet.

torchvision reads the lists of files and classes; the images are opened like those of any folder. As in
fast-MPN-COV, the images are not cropped: bounding boxes are ignored, and photos of aircraft keep the line of
text at their bottom. Sources: Maji et al. (2013), Krause et al. (2013), Zhou et al. (2017).

ImageNet (Russakovsky et al., 2015) is read as it is distributed: the validation images lie in one folder.
Files beside the folders say their classes: `val.txt`, Kaggle's `LOC_val_solution.csv`, or the ground truth
and `meta.mat` of the development kit, in the folder itself or in that of the kit.
"""

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sopdeploy.data.base import ClassSubset, Split
from sopdeploy.data.datasets.folder import class_problems, list_classes
from sopdeploy.data.folders import list_folder
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.files import expand_user

VAL_LIST, KAGGLE_LIST = "val.txt", "LOC_val_solution.csv"
TRUTH, CLASSES = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_KIT = Path("ILSVRC2012_devkit_t12/data")
_HEADER = "ImageId,PredictionString"  # the first line of `KAGGLE_LIST`
# `ILSVRC2012_val_00000001.JPEG n01751748`, or `ILSVRC2012_val_00000001,n01751748 10 20 30 40`
_LINE = re.compile(r"(?:val/)?(\w+)(?:\.JPEG)?[ ,\t]+(n\d{8})(?: .*)?", re.ASCII)


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
    if has_imagenet(root):
        return "imagenet"
    return next((kind for kind, layout in LAYOUTS.items() if (root / layout.content).exists()), None)


def open_official(kind: str, path: Path | None) -> Split:
    """Open the official training and held-out images at *path*; raises `DataError` if torchvision cannot."""
    if path is None:
        content = VAL_LIST if kind == "imagenet" else LAYOUTS[kind].content
        raise ConfigError(f"data.path: not set; give the folder that holds {content}")
    root = expand_user(path)
    return Split(train=open_part(kind, "train", root), held_out=open_part(kind, "held_out", root))


def open_part(kind: str, part: Literal["train", "held_out"], root: Path) -> ImageFiles:
    """Open a part of the official layout *kind* in *root*; raises `DataError` if files are wrong."""
    if kind == "imagenet":
        return open_imagenet(root, part)
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


def has_imagenet(root: Path) -> bool:
    """Check whether `val` in *root* holds the validation images of ImageNet without class folders."""
    if not (root / "val").is_dir():
        return False
    entries = list_folder(root / "val")
    official = any(entry.name.startswith("ILSVRC2012_val_") for entry in entries)
    return not any(entry.is_dir() for entry in entries) and (official or _find_list(root) is not None)


def open_imagenet(root: Path, part: Literal["train", "held_out"]) -> ImageFiles:
    """Open the class folders in `train`, or the listed images in `val` for the *part* `held_out`.

    Raises `DataError` naming the first line of the list that is not understood, images without a line, lines
    without an image, a missing file, or classes that differ between the parts.
    """
    listed = _read_list(root)
    labels = sorted(set(listed.values()))
    if part == "train":
        listing = list_classes(root / "train")
        if problems := list(class_problems(listing, tuple(labels))):
            raise DataError("; ".join(problems))
        return listing.images
    found = {entry.name for entry in list_folder(root / "val")}
    if missing := [name for name in listed if name not in found]:
        raise DataError(f"{root / 'val'}: {shorten(missing)} missing; unpack the official archive there")
    if unlisted := sorted(found - set(listed)):
        raise DataError(f"{root / 'val'}: {shorten(unlisted)} without a line in {_find_list(root)}; add it")
    targets = np.searchsorted(labels, list(listed.values()))
    paths = np.asarray([os.fsencode(name) for name in listed], dtype=np.bytes_)
    return ImageFiles(root / "val", tuple(labels), paths, targets.astype(np.int64))


def _find_list(root: Path) -> Path | None:
    files = (root / VAL_LIST, root / KAGGLE_LIST, root / TRUTH, root / _KIT / TRUTH)
    return next((file for file in files if file.is_file()), None)


def _read_list(root: Path) -> dict[str, str]:
    """Read the WordNet ID of each validation image by file name."""
    file = _find_list(root)
    if file is None:
        raise DataError(
            f"{root}: val holds images without class folders, and there is no {VAL_LIST}, {KAGGLE_LIST} or "
            f"{TRUTH} with their classes; add one of them"
        )
    listed: dict[str, str] = {}
    for line, name, wordnet_id in _read_truth(file) if file.name == TRUTH else _read_lines(file):
        if name in listed:
            raise DataError(f"{file}: line {line}: {name} is listed twice; keep one line per image")
        listed[name] = wordnet_id
    if not listed:
        raise DataError(f"{file}: lists no images; use the official file")
    return listed


def _read_lines(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, file name and WordNet ID of each image in a list of names."""
    for number, line in _numbered_lines(file):
        match = _LINE.fullmatch(line)
        if match is not None:
            yield number, f"{match[1]}.JPEG", match[2]
        elif (number, line) != (1, _HEADER):
            advice = "write a file name and a WordNet ID, such as ILSVRC2012_val_00000001.JPEG n01751748"
            if line.split()[-1].isdecimal():
                advice = (
                    f"a number does not say which class it is; use WordNet IDs, or {TRUTH} with {CLASSES}"
                )
            raise DataError(f"{file}: line {number}: {line[:80]!r}: {advice}")


def _read_truth(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, file name and WordNet ID of each image in the ground truth of the development kit.

    Line n is the `ILSVRC2012_ID` of image n; `meta.mat` has the WordNet ID of each.
    """
    from scipy.io import loadmat  # noqa: PLC0415  # of the extra `train`

    classes = file.with_name(CLASSES)
    try:
        entries: Any = loadmat(classes, squeeze_me=True)["synsets"]
        ids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in np.atleast_1d(entries)}
    except Exception as error:  # scipy raises many types for damaged files
        raise DataError(
            f"{classes}: cannot be read ({error}); add this file of the development kit"
        ) from error
    for number, line in _numbered_lines(file):
        if not line.isdecimal() or int(line) not in ids:
            raise DataError(f"{file}: line {number}: {line[:80]!r} is no ILSVRC2012_ID of {CLASSES}")
        yield number, f"ILSVRC2012_val_{number:08}.JPEG", ids[int(line)]


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of *file* that are not empty, with their numbers from 1."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); use the official file") from error
    return ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())
