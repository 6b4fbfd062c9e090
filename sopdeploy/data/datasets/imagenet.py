"""ImageNet (ILSVRC 2012) with its validation images in one folder and their classes in a file.

The training images are `train/<WordNet ID>/*.JPEG` or the official archives of one class each. The classes of
the validation images are read from one of three files: the official `ILSVRC2012_validation_ground_truth.txt`
with one number per image, next to `meta.mat` with the WordNet IDs; `LOC_val_solution.csv`; or `val.txt` with
lines such as `ILSVRC2012_val_00000001.JPEG n01751748`. Source: Russakovsky et al., "ImageNet Large Scale
Visual Recognition Challenge" (2015). Use `folder` for validation images that are sorted into class folders.
"""

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.folder import match_classes, open_store
from sopdeploy.data.datasets.listed import OFFICIAL, list_images, read_lines
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.data.matlab_file import read_v5
from sopdeploy.data.subset import ClassSubset
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import expand_user

WORDNET_ID = re.compile(r"n\d{8}")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT = "ILSVRC2012_devkit_t12/data"
LISTS = (GROUND_TRUTH, f"{DEVKIT}/{GROUND_TRUTH}", f"data/{GROUND_TRUTH}", "LOC_val_solution.csv", "val.txt")
VAL_FOLDERS = ("val", "ILSVRC2012_img_val", "ILSVRC2012_img_val.tar", "ILSVRC/Data/CLS-LOC/val")
TRAIN_FOLDERS = ("train", "ILSVRC2012_img_train", "ILSVRC2012_img_train.tar", "ILSVRC/Data/CLS-LOC/train")
CLASSES = "imagenet_classes.txt"  # WordNet ID and name of each class, in the order of published weights


class ImageNetConfig(ClassSubset):
    """`path` is the folder of `train/`, `val/` and the file with the classes of the validation images.

    `val_labels` is this file if it is elsewhere. `cache` and `skip_corrupt` are those of `FolderConfig`.
    """

    kind: Literal["imagenet"]
    path: Path | None = None
    val_labels: Path | None = None
    cache: Path | None = None
    skip_corrupt: bool = False


def open_imagenet(config: ImageNetConfig, options: OpenOptions | None = None) -> Split:
    """Open the training and validation images; raises `DataError` naming what is missing or wrong."""
    if config.path is None:
        raise ConfigError("data.path: not set; give the folder that holds train/ and val/")
    root, options = expand_user(config.path), options or OpenOptions(config.cache)
    listing = find_list(root) if config.val_labels is None else expand_user(config.val_labels)
    if listing is None:
        raise DataError(f"{root}: holds no {GROUND_TRUTH}; set data.val_labels to this file")
    held_out = open_validation(root, listing, options)
    train = next((root / name for name in TRAIN_FOLDERS if (root / name).exists()), None)
    if train is None:
        raise DataError(f"{root}: holds no train; put the training images there, one folder per WordNet ID")
    return Split(train=match_classes(open_store(train, options), held_out.labels), held_out=held_out)


def find_list(root: Path) -> Path | None:
    """Find the file with the classes of the validation images of *root*, if there are such images."""
    if _validation_folder(root) is None:
        return None
    return next((root / name for name in LISTS if (root / name).is_file()), None)


def open_validation(root: Path, listing: Path, options: OpenOptions) -> ImageFiles:
    """Open the validation images of *root* with their classes in the file *listing*; raises `DataError`."""
    folder = _validation_folder(root)
    if folder is None:
        raise DataError(f"{root}: holds no {VAL_FOLDERS[0]}; put the validation images there")
    lines = read_lines(listing)
    entries = (
        _read_ground_truth(listing, lines) if lines and lines[0].isdecimal() else _read_pairs(listing, lines)
    )
    labels = tuple(sorted({wordnet_id for _, wordnet_id in entries}))
    index = {wordnet_id: number for number, wordnet_id in enumerate(labels)}
    return list_images(folder, listing, labels, [(name, index[found]) for name, found in entries], options)


@cache
def class_aliases() -> dict[str, str]:
    """Map the WordNet ID of each ImageNet class to the name that published weights have, and back."""
    lines = resources.files("sopdeploy.data.datasets").joinpath(CLASSES).read_text("utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return {first: second for pair in pairs for first, second in (pair, pair[::-1])}


def _validation_folder(root: Path) -> Path | None:
    """Find the folder or archive of validation images; None if it is missing or has class folders."""
    found = next((root / name for name in VAL_FOLDERS if (root / name).exists()), None)
    has_folders = found is not None and found.is_dir() and any(path.is_dir() for path in found.iterdir())
    return None if has_folders else found


def _read_ground_truth(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    """Read the class numbers in *lines*, and map them to WordNet IDs by the `meta.mat` next to *path*."""
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise DataError(f"{meta}: missing, it names the classes of {path.name}; {OFFICIAL}")
    synsets = read_v5(meta, ("synsets",), DataError).get("synsets")
    names: dict[str, str] = {}
    for synset in synsets if isinstance(synsets, list) else []:
        number, wordnet_id = synset.get("ILSVRC2012_ID"), synset.get("WNID")
        if isinstance(number, np.ndarray) and number.size == 1 and isinstance(wordnet_id, str):
            names[str(int(number.item()))] = wordnet_id
    unknown = next((line for line in lines if line not in names), None)
    if unknown is not None:
        raise DataError(f"{path}: {unknown!r} is not a number of a class in {meta.name}; {OFFICIAL}")
    return [(f"ILSVRC2012_val_{count:08}.JPEG", names[line]) for count, line in enumerate(lines, start=1)]


def _read_pairs(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    """Read names and WordNet IDs, separated by a comma or spaces; further columns are boxes."""
    entries = []
    for count, line in enumerate(lines, start=1):
        name, found, *_ = [*re.split(r"[,\s]+", line), ""]
        if (name, found) == ("ImageId", "PredictionString"):
            continue
        if not WORDNET_ID.fullmatch(found):
            raise DataError(
                f"{path}: line {count}: {found!r} is not a WordNet ID such as n01751748; {OFFICIAL}"
            )
        entries.append((name if Path(name).suffix else f"{name}.JPEG", found))
    return entries
