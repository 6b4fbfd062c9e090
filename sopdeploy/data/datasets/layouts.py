"""The labeled images of a folder, for commands without a recipe: `eval`, `data check`."""

from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from sopdeploy.data.base import ImageFiles
from sopdeploy.data.datasets.folder import list_classes, no_classes
from sopdeploy.data.datasets.label_table import LABELS_FILE, has_label_table, read_label_table
from sopdeploy.data.datasets.libraries import detect_kind, open_part
from sopdeploy.data.folders import (
    Log,
    data_folder,
    find_parts,
    ignore,
    list_images,
    list_subfolders,
    part_folder,
)
from sopdeploy.errors import DataError, shorten


def open_evaluation_images(
    root: Path,
    labels: tuple[str, ...],
    *,
    multi_label: bool = False,
    other_classes: bool = False,
    log: Log = ignore,
) -> ImageFiles:
    """Open the labeled images below *root* for a network with the classes *labels*, in their order.

    `eval` and `export --evaluate` read folders with this function. It opens only the held-out
    images if the data are split: by folders such as train/ and val/, by an official layout, or by the column
    `split` of a `labels.csv`. Classes are matched by name; WordNet IDs match the names of ImageNet's classes.
    With *multi_label*, the network predicts several classes per image, which `labels.csv` lists.

    *log* receives a line about classes without images and about the part that is opened. Raises `DataError`
    for folders that are no class of the network, or if there are no images. With *other_classes*, such
    folders are left out with a line, as images of an official layout are without one.
    """
    root = check_holds_classes(root)
    if multi_label:
        if not (root / LABELS_FILE).is_file():
            raise DataError(
                f"{root}: has no {LABELS_FILE}, but the network predicts several classes per image; list the "
                "images and their classes in this file"
            )
        return read_label_table(root, labels, multi_label=True).held_out()
    if (kind := detect_kind(root)) is not None:
        images = _match(root, open_part(kind, "held_out", root), labels, must_match=False)
    else:
        folder = _held_out_folder(root, labels, log)
        if has_label_table(folder):
            images = read_label_table(folder, labels, multi_label=False).held_out()
        else:
            images = list_classes(folder).images
        if other_classes and (others := [name for name in images.labels if not is_class(name, labels)]):
            log(f"{root}: left out, of no class: {shorten(others)}")
        images = _match(root, images, labels, must_match=not other_classes)
    empty = [labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        log(f"{root}: no images of {len(empty)} of {len(labels)} classes: {shorten(empty)}")
    return images


def check_holds_classes(root: Path) -> Path:
    """Return the data folder *root*; raises `DataError` unless it has class folders, or a file with labels.

    Reads no image and needs no network. Commands call this before they import torch, which takes seconds.
    """
    root = data_folder(root)
    if not list_subfolders(root) and not has_label_table(root) and detect_kind(root) is None:
        raise no_classes(root)
    return root


@cache
def class_aliases() -> dict[str, str]:
    """Map the WordNet ID of each ImageNet class to the name that published weights have, and back."""
    text = resources.files("sopdeploy.data.datasets").joinpath("imagenet_classes.txt").read_text("utf-8")
    pairs = [line.split(" ", 1) for line in text.splitlines()]
    return {first: second for pair in pairs for first, second in (pair, pair[::-1])}


def is_class(name: str, labels: tuple[str, ...]) -> bool:
    """Tell whether the folder *name* is one of *labels*, or its WordNet ID."""
    return name in labels or class_aliases().get(name) in labels


def open_any_images(root: Path) -> ImageFiles:
    """Open all images below *root*, without their classes; raises `DataError` if there are none."""
    root = data_folder(root)
    paths = np.asarray(list_images(root)[0], dtype=np.bytes_)
    if not len(paths):
        raise DataError(f"{root}: holds no images; give a folder of JPEG or PNG files")
    return ImageFiles(root, ("",), paths, np.zeros(len(paths), dtype=np.int64))


def _held_out_folder(root: Path, labels: tuple[str, ...], log: Log) -> Path:
    """Return the folder with the held-out images in *root*; *root* itself if its folders are classes."""
    if set(list_subfolders(root)) <= set(labels):
        return root
    parts = find_parts(root)
    if not parts.held_out or (not parts.train and parts.others):
        return root
    folder = part_folder(root, parts.held_out[0])
    log(f"{folder}: the images in this folder are used")
    return folder


def _match(root: Path, images: ImageFiles, labels: tuple[str, ...], *, must_match: bool) -> ImageFiles:
    """Give *images* the classes *labels*; raises `DataError` if *must_match* and a class is no label."""
    indices = {label: index for index, label in enumerate(labels)}
    aliases = class_aliases()
    new_targets = [indices.get(name, indices.get(aliases.get(name, ""), -1)) for name in images.labels]
    unknown = [name for name, target in zip(images.labels, new_targets, strict=True) if target < 0]
    if unknown and (must_match or len(unknown) == len(new_targets)):
        verb = "are not classes" if unknown[1:] else "is no class"
        raise DataError(
            f"{root}: {shorten(unknown)} {verb} of the network, which knows {shorten(labels)}; remove or "
            "rename the folders",
            lists={"unknown": unknown, "classes": labels},
        )
    targets = np.asarray(new_targets, dtype=np.int64)[images.targets.astype(np.int64)]
    if not (targets >= 0).any():
        raise DataError(f"{root}: holds no images of these classes; add some")
    return images.select(targets >= 0).replaced(labels=labels, targets=targets[targets >= 0])
