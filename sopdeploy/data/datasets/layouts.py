"""The labeled images of a folder, for commands without a recipe: `eval`, `calibrate`, `data check`."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from sopdeploy.data.datasets import official
from sopdeploy.data.datasets.folder import list_classes, open_store
from sopdeploy.data.datasets.label_table import has_label_table, read_label_table
from sopdeploy.data.folder_store import LABELS_FILE, Log, ignore
from sopdeploy.data.image_files import FileStore, ImageFiles
from sopdeploy.data.parts import find_parts, open_part
from sopdeploy.errors import DataError, shorten
from sopdeploy.files import expand_user


def open_evaluation_images(
    root: Path, labels: tuple[str, ...], *, multi_label: bool = False, log: Log = ignore
) -> ImageFiles:
    """Open the labeled images below *root* for a network with the classes *labels*, in their order.

    `eval`, `calibrate` and `export --evaluate` read folders with this function. Of a folder with parts, such
    as train/ and val/, of an official layout and of a `labels.csv` with a column `split`, the held-out images
    are opened. Classes are matched by name; WordNet IDs match the names of ImageNet's classes. With
    *multi_label*, the network predicts several classes per image, which `labels.csv` lists.

    *log* receives a line about what is not as expected: classes without images, which part is opened, and
    images of an official layout that are of no class of the network. Raises `DataError` for folders that are
    no class of the network, or if there are no images.
    """
    root = expand_user(root)
    if multi_label:
        store = open_store(root)
        if not store.label_tables():
            raise DataError(
                f"{root}: has no {LABELS_FILE}, but the network predicts several classes per image; list the "
                "images and their classes in this file"
            )
        return read_label_table(store, labels, multi_label=True).held_out()
    if (kind := official.detect_kind(root)) is not None:
        images = _match(root, official.open_part(kind, "held_out", root), labels, must_match=False)
    else:
        store = _open_held_out(open_store(root), labels, log)
        if has_label_table(store):
            stored = read_label_table(store, labels, multi_label=False).held_out()
        else:
            stored = list_classes(store, tuple(store.folders()))
        images = _match(root, stored, labels, must_match=True)
    empty = [labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        log(f"{root}: no images of {len(empty)} of {len(labels)} classes: {shorten(empty)}")
    return images


def open_any_images(root: Path) -> ImageFiles:
    """Open all images below *root*, without their classes; raises `DataError` if there are none."""
    store = open_store(expand_user(root))
    paths = np.asarray(store.list_files("")[0], dtype=np.bytes_)
    if not len(paths):
        raise DataError(f"{root}: holds no images; sort images into one subfolder per class")
    return ImageFiles(store, ("",), paths, np.zeros(len(paths), dtype=np.int64))


def _open_held_out(store: FileStore, labels: tuple[str, ...], log: Log) -> FileStore:
    """Open the part of *store* with the held-out images, if its folders are parts and not classes."""
    if set(store.folders()) <= set(labels):
        return store
    parts = find_parts(store)
    if not parts.held_out or (not parts.train and parts.others):
        return store
    part: FileStore = open_part(store, parts.held_out[0])
    log(f"{part.root}: the images in this folder are used")
    return part


def _match(root: Path, images: ImageFiles, labels: tuple[str, ...], *, must_match: bool) -> ImageFiles:
    """Give *images* the classes *labels*; raises `DataError` if *must_match* and a class is no label."""
    if not images.labels:
        raise DataError(f"{root}: holds no class folders; sort the images into one subfolder per class")
    indices = {label: index for index, label in enumerate(labels)}
    aliases = official.class_aliases()
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
    chosen = images.select(targets >= 0)
    return replace(chosen, labels=labels, targets=targets[targets >= 0])
