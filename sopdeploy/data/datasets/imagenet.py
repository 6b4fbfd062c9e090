"""ImageNet (Russakovsky et al., 2015) as it is distributed: the validation images lie in one folder.

A file beside the folders lists their WordNet IDs: `val.txt`, or `LOC_val_solution.csv` from Kaggle.
"""

import os
import re
from pathlib import Path

import numpy as np

from sopdeploy.data.datasets.folder import class_problems, list_classes
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import DataError, shorten

LISTS = ("val.txt", "LOC_val_solution.csv")
# `ILSVRC2012_val_00000001.JPEG n01751748`, or `ILSVRC2012_val_00000001,n01751748 10 20 30 40`
LINE = re.compile(r"(\w+)(?:\.JPEG)?[ ,](n\d{8})\b", re.ASCII)


def find_list(root: Path) -> Path | None:
    """Find the list of the validation images of *root*, unless these are in class folders."""
    listing = next((root / name for name in LISTS if (root / name).is_file()), None)
    if listing is None or not (root / "val").is_dir():
        return None
    return None if any(path.is_dir() for path in (root / "val").iterdir()) else listing


def open_imagenet(root: Path, part: str) -> ImageFiles:
    """Open the class folders in `train`, or the listed images in `val` for the *part* `held_out`.

    Raises `DataError` if listed images are missing or the classes of the parts differ.
    """
    listing = find_list(root)
    if listing is None:
        raise DataError(f"{root}: holds no {LISTS[0]} with the classes of the images in val; add it")
    listed = [LINE.match(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    names = [f"{match[1]}.JPEG" for match in listed if match]
    wordnet_ids = [match[2] for match in listed if match]
    labels = sorted(set(wordnet_ids))
    if part == "train":
        images = list_classes(root / "train")
        if problems := list(class_problems(images, tuple(labels))):
            raise DataError("; ".join(problems))
        return images
    if missing := [name for name in names if not (root / "val" / name).is_file()]:
        raise DataError(f"{root / 'val'}: {shorten(missing)} missing; unpack the official archive there")
    targets = np.searchsorted(labels, wordnet_ids)
    paths = np.asarray([os.fsencode(name) for name in names], dtype=np.bytes_)
    return ImageFiles(root / "val", tuple(labels), paths, targets.astype(np.int64))
